"""Checks of a caller's own model or drafter against the contracts of ``specjax.types``, with reasons in words."""
