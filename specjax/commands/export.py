"""The command ``export``: makes a Hugging Face folder of a checkpoint folder."""

import argparse
import sys
from pathlib import Path

import specjax

ABOUT = """Exports a checkpoint folder to a Hugging Face folder: %(prog)s SRC DST.

transformers.AutoModelForCausalLM.from_pretrained(DST) loads the result. DST appears once it is whole.
"""


def main(argv: list[str] | None = None, prog: str = "export_hf.py") -> int:
    """Runs the command and returns the exit status."""
    parser = argparse.ArgumentParser(prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint folder")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to make")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="N", help="at most N GB in each file (default: 5)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.shard_gb < 1e6:
        parser.error(f"--shard-gb is {args.shard_gb}; give a number above 0")
    try:
        files = specjax.export_hf(args.source, args.destination, args.dtype, max(1, round(args.shard_gb * 1e9)))
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {args.destination}: config.json, {', '.join(file.name for file in files)}")
    return 0
