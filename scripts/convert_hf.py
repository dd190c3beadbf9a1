"""Converts a Hugging Face folder to a checkpoint folder.

python scripts/convert_hf.py Qwen3-8B checkpoints/qwen3-8b --dtype bfloat16
python scripts/convert_hf.py SmolLM2-135M checkpoints/smollm --verify      compares logits with transformers

The same as `specjax convert`; specjax/commands/convert.py has the code.
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends the script quietly, even while modules load
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from specjax.commands.__main__ import run

if __name__ == "__main__":
    sys.exit(run("convert"))
