"""Downloads a small chat model with pip into the user's cache, from where its name opens it.

python scripts/fetch.py smollm2

The same as `specjax fetch`; specjax/commands/fetch.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("fetch"))
