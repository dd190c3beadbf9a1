"""Drafters, one file per kind. ``specjax.types.Drafter`` is the contract."""
