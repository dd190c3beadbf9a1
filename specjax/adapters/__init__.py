"""Models that were not written for specjax, as ``specjax.LanguageModel``."""
