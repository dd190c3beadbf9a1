"""Exports a checkpoint folder to a Hugging Face folder, which ``transformers`` loads.

python scripts/export_hf.py checkpoints/py-14m /tmp/py-14m

The same as `specjax export`; specjax/commands/export.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("export"))
