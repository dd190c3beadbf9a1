"""Trains the model or draft head of a recipe: ``python scripts/train.py models/NAME`` writes ``checkpoints/NAME``.

python scripts/train.py models/py-14m-draft                       a draft model; its target must be in checkpoints/
python scripts/train.py models/NAME --mesh data=4,tensor=2        over eight devices (docs/distributed.md)

The same as `specjax train`; specjax/commands/train.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("train"))
