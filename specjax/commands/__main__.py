"""The console command ``specjax``."""

import argparse
import gc
import importlib
import io
import signal
import sys

import specjax
from specjax.commands import streams

COMMANDS = {
    "generate": "continue prompts, or answer messages, by speculative decoding",
    "train": "train the model or draft head of a recipe",
    "train-draft": "train a draft for any target, on text that the target writes",
    "fetch": "download a small chat model, which then has a name",
    "convert": "convert a Hugging Face folder or GGUF file to a checkpoint folder",
    "export": "export a checkpoint folder to a Hugging Face folder",
    "bench": "measure drafters, rounds and speed on this machine",
    "plan": "compute memory, time and the best number of drafts for a model and a device",
    "aot": "compile for a TPU or GPU that need not exist, and check the program",
}
CLEANS_UP = ("fetch", "convert", "export")  # a signal must not leave a half-made folder
GARBAGE = 100_000  # new objects between two collections; with Python's 700, a tenth of a cold start is collections
RESUMES = ("train", "train-draft")  # after Ctrl-C, a message says how to go on
ABOUT = """Exact speculative decoding for JAX.

{}

`specjax COMMAND --help` lists the options of a command. `specjax generate` alone shows what the library does, with the
models of the repository.
"""


def main(argv: list[str] | None = None) -> int | str | None:
    """Runs ``specjax COMMAND ...`` and returns the exit status."""
    # Only the command's own module is imported: help and version must not wait for training or planning.
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return run(argv[0], argv[1:], f"specjax {argv[0]}")
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="specjax",
        usage="specjax COMMAND ...",
        description=ABOUT.format("\n".join(f"  {name:<{width}}  {about}" for name, about in COMMANDS.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"specjax {specjax.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the above")
    parser.parse_args(argv)  # exits: with help, the version, or an error, since argv starts with no command
    return 2


def run(command: str, argv: list[str] | None = None, prog: str | None = None) -> int | str | None:
    """Runs one command, with the signal handlers that it needs, and returns the exit status.

    Args:
      command: a key of ``COMMANDS``.
      argv: the command's arguments; None takes the arguments of the process.
      prog: the command's name in messages; None takes the name of its script.
    """
    _set_signals(command)
    streams.mend()
    gc.set_threshold(GARBAGE)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its code
    module = importlib.import_module(f"specjax.commands.{command.replace('-', '_')}")
    try:
        status = module.main(argv) if prog is None else module.main(argv, prog)
    except SystemExit as error:
        raise SystemExit(streams.end(error.code)) from None
    return streams.end(status)


def _set_signals(command: str) -> None:
    """Sets the handlers of Ctrl-C and other signals."""
    if command in CLEANS_UP:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    elif command in RESUMES:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:  # Ctrl-C and `| head` end the process quietly and at once, even while XLA compiles
        for name in ("SIGINT", "SIGPIPE"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
