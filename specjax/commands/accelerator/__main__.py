"""``scripts/accelerator.sh DIR``: checks and figures on a borrowed accelerator."""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from specjax.commands.accelerator import driver
from specjax.commands.accelerator.records import Recorder, read_records
from specjax.commands.accelerator.steps import STEPS
from specjax.commands.console import Parser

ABOUT = """Checks specjax and measures it on the accelerator of this machine, within a few minutes.

Each check and figure is a JSON file in DIR, written as it is made; summary.json and summary.md are up to date after
each step. No setting of the device is changed, and nothing is installed or downloaded. Without an accelerator, small
models run on the CPU. The exit status is 0 if all checks passed, 1 if one failed or did not end, and 2 for a wrong
argument.

steps, in order: {}
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the steps, or one step in this process, and returns the exit status."""
    begin = time.monotonic()
    parser = Parser(
        "accelerator.sh",
        description=ABOUT.format(", ".join(STEPS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the files go; made if it is not there")
    parser.add_argument("--seconds", type=float, default=470, metavar="S", help="end after so long (default: 470)")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="run only facts and these, in the order above")
    parser.add_argument("--small", action="store_true", help="small models, to try the script")
    parser.add_argument("--only", metavar="STEP", help=argparse.SUPPRESS)  # in this process, for the driver
    args = parser.parse_args(argv)
    if unknown := {*(args.steps or ()), *filter(None, [args.only])} - STEPS.keys():
        parser.error(f"step {sorted(unknown)[0]!r} is unknown; give some of: {', '.join(STEPS)}")
    if not args.seconds > 0:
        parser.error(f"--seconds is {args.seconds}; give a number above 0")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"DIR is {args.folder}, which cannot be made: {error.strerror}; give another folder")
    if args.only:
        machine = read_records(args.folder, "facts", "machine")
        card = {"card": machine[0]["device"]} if machine else {}
        STEPS[args.only].run(Recorder(args.folder, args.only, card), args.small)
        return 0
    # A signal ends the step's process, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # The first step, "facts", says whether the models must be small.
    steps = {name: step for name, step in STEPS.items() if not args.steps or name in ("facts", *args.steps)}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", temporary))
        passed = driver.run_all(args.folder, steps, begin + args.seconds, cache, args.small)
    print((args.folder / "summary.md").read_text(encoding="utf-8"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
