"""Models over eight devices, in a process of its own; see ``on_eight_devices.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import on_eight_devices
import pytest


@pytest.fixture(scope="module")
def outcomes():
    """Runs all checks and returns what each has to say."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
    }
    file = Path(on_eight_devices.__file__)
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        cwd=file.parent.parent,
        env=environment,
        check=False,
        timeout=1800,  # a collective that somebody misses waits for ever
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *printed, last = done.stdout.splitlines()
    print(*printed, sep="\n")
    return json.loads(last)


@pytest.mark.parametrize("name", on_eight_devices.CHECKS)
def test_on_eight_devices(name, outcomes):
    assert not outcomes[name], outcomes[name]
