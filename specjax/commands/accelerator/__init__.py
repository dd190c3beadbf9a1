"""Checks and figures on a borrowed accelerator, by one command that may be cut off at any time.

``scripts/accelerator.sh DIR`` runs ``__main__``. Each step of ``steps.STEPS`` is a process of its own with a time
limit, so a step that crashes or hangs costs the other steps nothing. A record is a JSON file in DIR, written as it is
made.
"""
