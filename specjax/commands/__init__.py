"""Commands: what ``specjax`` and the scripts run."""
