"""Plans speculative decoding on paper: memory, the least time of a round of g drafts, and the best g.

python scripts/plan.py llama-3.1-8b --draft llama-3.2-1b --hardware h100 --acceptance 0.8
python scripts/plan.py checkpoints/py-14m --draft 0.1 --acceptance 0.7 --device-figures bandwidth=2e10,flops=1e11

The same as `specjax plan`; specjax/commands/plan.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("plan"))
