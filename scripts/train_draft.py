"""Trains a draft for any target, on text that the target writes itself.

python scripts/train_draft.py --target smollm2 --kind eagle                an EAGLE head in checkpoints/smollm2-eagle
python scripts/train_draft.py --target DIR --kind model --minutes 60       a draft model, in about an hour

The same as `specjax train-draft`; specjax/commands/train_draft.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("train-draft"))
