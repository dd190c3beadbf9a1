"""The commands of ``specjax``: one module for each, which ``specjax COMMAND`` and the file of ``scripts/`` run."""
