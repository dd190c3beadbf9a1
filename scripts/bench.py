"""Measures drafters, rounds and speed on this machine.

python scripts/bench.py                                   all benchmarks that need no option
python scripts/bench.py speed --batch 1                   speed-up over plain decoding
python scripts/bench.py drafters --prompts 4              every shipped drafter: acceptance, costs, speed-up
python scripts/bench.py sweep acceptance --html page.html by batch; acceptance by position; a page with plots
python scripts/bench.py sweep --random-weights --context 256 4096 16384 --batch 1 8 64 --forced-acceptance 0.7
python scripts/bench.py startup                           time to first token, compile time, peak memory
python scripts/bench.py rollback --target DIR             what it costs a hybrid model to take drafts back
python scripts/bench.py rollouts --updates 50             drafts of a policy in training
python scripts/bench.py --peer transformers               beside transformers, with the same weights
python scripts/bench.py prompts --prompts mt_bench.jsonl  prompts of files, by category; --limit 3 for a short run

The same as `specjax bench`; specjax/commands/bench.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("bench"))
