"""Measures drafters, rounds and speed on this machine.

python scripts/bench.py                                   all benchmarks
python scripts/bench.py speed --batch 1                   speed-up over plain decoding
python scripts/bench.py drafters --prompts 4              every shipped drafter: acceptance, costs, speed-up

The same as `specjax bench`; specjax/commands/bench.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("bench"))
