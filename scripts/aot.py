"""Compiles `generate` for a TPU or GPU that need not exist, and checks the program.

python scripts/aot.py                                                              a small model on one v5e chip
python scripts/aot.py --topology h100 --target llama-3.2-1b --drafter model        an H100
python scripts/aot.py --topology v6e:2x2 --tensor 4 --target llama-3.1-8b --rows 8

The same as `specjax aot`; specjax/commands/aot.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("aot"))
