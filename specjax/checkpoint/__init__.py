"""Opening and writing folders: models, drafters, conversion from and to Hugging Face."""
