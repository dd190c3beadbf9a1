"""Continues prompts by speculative decoding and prints its figures.

python scripts/generate.py                                    the shipped pair on a built-in prompt
python scripts/generate.py --prompt 'def mean(x):' --compare  speed-up over plain decoding
head -30 x.py | python scripts/generate.py --trace t.html     a page with the origin of each token
python scripts/generate.py --target DIR --chat --prompt 'Why is the sky blue?'      asks a chat model
python scripts/generate.py --target DIR --mesh data=2,tensor=4    a model split over eight devices (docs/distributed.md)

The same as `specjax generate`; specjax/commands/generate.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("generate"))
