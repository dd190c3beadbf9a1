"""The commands of ``specjax``, one module each. ``specjax COMMAND`` and the files in ``scripts/`` run these modules."""
