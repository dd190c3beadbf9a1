"""Everything that opens or writes a folder: models, drafters, conversion."""
