"""Standard streams that are closed or full, and terminals without escape codes.

A command whose output is lost goes on, since files that were asked for are still to be written. It says once why the
output is lost, and ends with status 1. Notes on standard error that are lost change nothing.
"""

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class Sink(io.RawIOBase):
    """Writes to a file descriptor. After the first failure everything is dropped.

    Attributes:
      lost: why bytes were dropped, or None if none was.
    """

    def __init__(self, descriptor: int, closed: bool):
        """Writes to ``descriptor``; ``closed``: it stands for a stream that was closed."""
        self._descriptor, self._closed = descriptor, closed
        self.lost: str | None = None

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return not self._closed and os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int | None:
        if self.lost is None and self._closed:
            self.lost = "it is closed"
        if self.lost is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # which is no failure: the reader is slow
                return None
            except OSError as error:
                self.lost = error.strerror or str(error)
        return len(data)


def mend() -> None:
    """Replaces standard output and standard error by streams that never raise, and closed ones by the null device.

    Without this, the next file that is opened would take the number of a stream that was closed, and what libraries
    print would go into that file. A stream that Python code has replaced stays.
    """
    closed = []
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            closed.append(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _text(Sink(descriptor, descriptor in closed), stream))


def _text(sink: Sink, like: Any) -> TextIO:
    """Returns a text stream over a sink, with encoding and buffering as ``like`` has, or as Python's own have."""
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    if isinstance(like, io.TextIOWrapper):
        with contextlib.suppress(OSError):
            like.flush()
        options = {"encoding": like.encoding, "errors": like.errors, "line_buffering": like.line_buffering}
    return io.TextIOWrapper(io.BufferedWriter(sink), **options, write_through=False)


def end(status: Any) -> Any:
    """Flushes both streams, says why standard output was lost if it was, and returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    sink = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(sink, Sink) or sink.lost is None:
        return status
    print(f"error: standard output cannot be written to: {sink.lost}", file=sys.stderr, flush=True)
    return status or 1


def has_escapes(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal that understands escape codes."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colours(stream: TextIO) -> bool:
    """Returns whether to colour what a stream shows: https://no-color.org, by which an empty value is none."""
    return has_escapes(stream) and not os.environ.get("NO_COLOR")
