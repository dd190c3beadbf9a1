"""Options and checks of commands that run over a mesh of devices, on one host or on several.

On several hosts, every process runs the same command with the same arguments. The first process prints and writes
files. When one process fails or is killed, all of them end.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import platform
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import specjax

AXES = ("data", "tensor", "expert")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "tokenizers")
START_S = 300  # all processes must come within this time
LOST_S = 30  # JAX ends a job when a process has sent no heartbeat for this time
LEAVE_S = 5  # a failed process 0 lets the others say first what they see: JAX aborts them once process 0 is gone
SHOWN = 80  # characters of a value in a message
# A collective operation raises these when another process is gone.
OTHERS = re.compile(r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--mesh``, ``--distributed``, ``--coordinator``, ``--num-processes`` and ``--process-id``, for ``run``."""
    group = parser.add_argument_group("devices", "one, unless these ask for more; docs/distributed.md explains them")
    group.add_argument(
        "--mesh", type=_sizes, metavar="AXIS=N,...", help="split rows over data=N, models over tensor=N and expert=N"
    )
    group.add_argument("--distributed", action="store_true", help="be one process of a Cloud TPU, Slurm or other job")
    group.add_argument("--coordinator", type=_address, metavar="HOST:PORT", help="elsewhere: where process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N", help="elsewhere: how many processes there are")
    group.add_argument("--process-id", type=int, metavar="I", help="elsewhere: which of them this is, from 0")


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not (size.isascii() and size.isdecimal() and int(size) > 0):
            raise argparse.ArgumentTypeError(
                f"{part!r} in {text!r} is not understood; give sizes of at least 1 to axes among {', '.join(AXES)}, "
                "each once, such as data=2,tensor=4"
            )
        sizes[axis] = int(size)
    return sizes


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give HOST:PORT, such as 10.0.0.1:1234")
    return text


@contextlib.contextmanager
def run(args: argparse.Namespace) -> Iterator[Mesh | None]:
    """Yields the mesh that the options of ``add_mesh_options`` ask for, set by ``jax.set_mesh``; None without any.

    Enter this context before anything asks JAX for devices. Several processes get a mesh of all their devices, by
    default along ``data``. Of several processes,

    - all must have the same arguments, code and packages, which is checked first;
    - the first alone prints to standard output;
    - each waits, on leaving, for all others;
    - one that raises an exception prints it and ends, with status 2 for a ValueError, TypeError, OSError or
      FloatingPointError, and with a traceback and status 1 for others. The other processes end with an error, too.

    Raises:
      ValueError: there are too few devices, or the options contradict each other or name a place that is not there.
    """
    # One process: a mesh of its own devices, and errors are the caller's.
    if not _come_together(args):
        mesh = None if args.mesh is None else specjax.make_mesh(**args.mesh)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            yield mesh
        return
    # Several: whatever is raised must end this process, or the others would wait for it.
    try:
        with _first_prints():
            check_same(_origin(args))
            mesh = _mesh_of_all(args.mesh)
            with jax.set_mesh(mesh):
                yield mesh
        jax.distributed.shutdown()
    except BaseException as error:
        _fail(error)


def is_first() -> bool:
    """Returns whether this process prints, shows bars and writes files: the first of several, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def note(text: str) -> None:
    """Writes to standard error, from the first process alone."""
    if is_first():
        print(text, end="", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    """Returns an error in one line; of several processes, with the one that has the error."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if not jax.distributed.is_initialized():
        return reason
    if isinstance(error, KeyboardInterrupt):
        reason = "ended by SIGINT"
    elif OTHERS.search(reason):
        reason = f"another process failed, was killed or is cut off; look at its messages ({reason})"
    return f"process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()}): {reason}"


def exchange(text: str) -> list[str]:
    """Returns the text of every process, by process. All must call it and ``check_same`` alike, in the same order."""
    if not jax.distributed.is_initialized():
        return [text]
    given = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([given.size], np.int32))[:, 0]
    rows = multihost_utils.process_allgather(np.pad(given, (0, int(sizes.max()) - given.size)))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def check_same(values: Mapping[str, str]) -> None:
    """Raises ValueError in every process unless all give the same text for each name."""
    first, *others = map(json.loads, exchange(json.dumps({name: _short(text) for name, text in values.items()})))
    for process, there in enumerate(others, 1):
        for name in first | there:
            if first.get(name) != there.get(name):
                raise ValueError(
                    f"{name} is {there.get(name)} in process {process} and {first.get(name)} in process 0; start all "
                    "processes alike"
                )


def check_same_folders(*folders: Path) -> None:
    """Raises ValueError in every process unless all find the same files there: contents of JSON, sizes of others."""
    if jax.distributed.is_initialized():
        check_same({str(folder): _folder(folder) for folder in folders})


def _folder(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("[!.]*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.suffix == ".json" else str(file.stat().st_size).encode()
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + content + b"\0")
    return f"a folder of {len(files)} files with the digest {digest.hexdigest()[:8]}" if files else "no folder of files"


def _short(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    return f"{text[:SHOWN]}... ({len(text)} characters with the digest {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _origin(args: argparse.Namespace) -> dict[str, str]:
    """Returns what must be the same everywhere: packages, code, and all arguments except those that say who is who."""
    given = {f"the argument {name}": repr(value) for name, value in vars(args).items()}
    for name in ("coordinator", "process_id"):
        given.pop(f"the argument {name}")
    packages = {f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    digest = hashlib.sha256()
    for file in sorted(Path(str(importlib.resources.files("specjax"))).rglob("*.py")):
        digest.update(file.read_bytes())
    code = {"the version of Python": platform.python_version(), "the code of specjax": digest.hexdigest()[:8]}
    return given | packages | code


def _mesh_of_all(sizes: dict[str, Any] | None) -> Mesh:
    count = jax.device_count()
    mesh = specjax.make_mesh(**(sizes or {"data": count}))
    if mesh.size < count:
        raise ValueError(
            f"--mesh takes {mesh.size} of the {count} devices of {jax.process_count()} processes, and some would have "
            f"no part; give sizes whose product is {count}"
        )
    return mesh


@contextlib.contextmanager
def _first_prints() -> Iterator[None]:
    """Leaves standard output to Python's printing in the first process: gloo greets on it in every one."""
    place = os.dup(1) if is_first() else os.devnull
    with open(place, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as out:
        sys.stdout.flush()
        os.dup2(2, 1)
        with contextlib.redirect_stdout(out):
            yield
        os.dup2(out.fileno(), 1)


def _come_together(args: argparse.Namespace) -> bool:
    """Joins the other processes, and returns whether there are any to join."""
    place = {"--coordinator": args.coordinator, "--num-processes": args.num_processes, "--process-id": args.process_id}
    missing = [name for name, value in place.items() if value is None]
    if len(missing) == len(place) and not args.distributed:
        return False
    if missing and len(missing) < len(place):
        raise ValueError(f"{missing[0]} is missing; give all of {', '.join(place)}, or just --distributed")
    if not missing:
        _check_place(args.coordinator, args.num_processes, args.process_id)
        # When some do not come, JAX aborts this process with a message that names neither them nor the address.
        who, at = f"process {args.process_id} of {args.num_processes}", args.coordinator
        print(f"{who} waits for the others at {at}, at most {START_S} s", file=sys.stderr, flush=True)
    jax.config.update("jax_enable_preemption_service", False)  # this service would ignore SIGTERM
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            initialization_timeout=START_S,
            heartbeat_timeout_seconds=LOST_S,
        )
    except (ValueError, RuntimeError) as error:
        if not missing:
            raise
        raise ValueError(
            f"--distributed finds no Cloud TPU, Slurm or other job here ({error}); without one, give {', '.join(place)}"
        ) from error
    return True


def _check_place(coordinator: str, count: int, process: int) -> None:
    if not 0 <= process < count:
        raise ValueError(f"--process-id is {process} and --num-processes {count}; number the processes from 0")
    host, _, port = coordinator.rpartition(":")
    try:
        if process == 0:
            socket.create_server(("", int(port))).close()  # JAX aborts when the port is taken
        else:
            socket.getaddrinfo(host.strip("[]"), port)
    except OSError as error:
        raise ValueError(f"--coordinator is {coordinator}: {error.strerror}; give another HOST:PORT") from None


def _fail(error: BaseException) -> NoReturn:
    """Prints an error, unless a parser has printed it, and ends this process without waiting for the others."""
    status = 2 if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)) else 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    else:
        text = describe(error)
        if isinstance(error, KeyboardInterrupt):
            status = 130
        elif OTHERS.search(text):
            status = 1
        elif status == 1:
            traceback.print_exception(error)
        print(f"error: {text}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if is_first():
        time.sleep(LEAVE_S)
    os._exit(status)  # a usual end would wait for all processes, one of which may be gone
