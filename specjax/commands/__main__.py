"""The console command ``specjax``."""

import argparse
import importlib
import io
import signal
import sys

import specjax

COMMANDS = {
    "generate": "continue prompts, or answer messages, by speculative decoding",
    "train": "train the model or draft head of a recipe",
    "convert": "convert a Hugging Face folder to a checkpoint folder",
    "export": "export a checkpoint folder to a Hugging Face folder",
    "bench": "measure drafters, rounds and speed on this machine",
    "plan": "compute memory, time and the best number of drafts for a model and a device",
}
CLEANS_UP = ("convert", "export")  # a signal must remove what is half made
RESUMES = ("train",)  # Ctrl-C says how to go on
ABOUT = """Exact speculative decoding for JAX.

{}

`specjax COMMAND --help` lists the options of a command. `specjax generate` alone shows what the library does, with the
models that come with the repository.
"""


def main(argv: list[str] | None = None) -> int | str | None:
    """Runs ``specjax COMMAND ...`` and returns the exit status."""
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
    parser.parse_args(argv)  # prints help or version, or says what is wrong: no command comes as far as here
    return 2


def run(command: str, argv: list[str] | None = None, prog: str | None = None) -> int | str | None:
    """Runs one command of this process, with the handling of signals that it needs, and returns the exit status.

    Args:
      command: a key of ``COMMANDS``.
      argv: the command's arguments; None takes those of the process.
      prog: how messages call the command; None takes the name of its script.
    """
    _set_signals(command)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its code
    module = importlib.import_module(f"specjax.commands.{command}")
    return module.main(argv) if prog is None else module.main(argv, prog)


def _set_signals(command: str) -> None:
    if command in CLEANS_UP:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    elif command in RESUMES:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:  # Ctrl-C and `| head` end it quietly and at once, even while XLA compiles
        for name in ("SIGINT", "SIGPIPE"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
