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
LEAVE_S = 5  # a failed process 0 waits, so the others can print their errors: JAX aborts them once process 0 is gone
SHOWN = 80  # characters of a value in a message
# A collective operation raises these when another process is gone.
OTHERS = re.compile(r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--mesh``, ``--distributed``, ``--coordinator``, ``--num-processes`` and ``--process-id``, for ``run``."""
    group = parser.add_argument_group("devices", "one, unless these ask for more; docs/distributed.md explains them")
    group.add_argument(
        "--mesh", type=_sizes, metavar="AXIS=N,...", help="split rows over data=N, models over tensor=N and expert=N"
    )
    group.add_argument(
        "--distributed", action="store_true", help="join a Cloud TPU, Slurm or other job as one of its processes"
    )
    group.add_argument("--coordinator", type=_address, metavar="HOST:PORT", help="elsewhere: where process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N", help="elsewhere: number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="elsewhere: number of this process, from 0")


def _sizes(text: str) -> dict[str, int]:
    """Reads ``data=2,tensor=4``; a type of ``argparse``."""
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
    """Returns the text if it is HOST:PORT; a type of ``argparse``."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give HOST:PORT, such as 10.0.0.1:1234")
    return text


@contextlib.contextmanager
def run(args: argparse.Namespace) -> Iterator[Mesh | None]:
    """Yields the mesh of the options of ``add_mesh_options``, set by ``jax.set_mesh``; None without such options.

    Enter this context before anything asks JAX for devices. Several processes get a mesh of all their devices, by
    default along ``data``. With several processes:

    - All must have the same arguments, code and packages. This is checked first.
    - Only the first process prints to standard output.
    - Each process waits for all others when it leaves the context.
    - No exception leaves the context. The process that raised it prints it and ends: with status 2 for a ValueError,
      TypeError, OSError or FloatingPointError, and with a traceback and status 1 for others. The other processes end
      with an error, too.

    Raises:
      ValueError: there are too few devices, the options contradict each other, or the coordinator's address cannot be
        used. All of these are raised in the only process, or before the processes have met.
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
    """Returns whether this is the process that prints, shows bars and writes files: the first or only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def note(text: str) -> None:
    """Writes to standard error, from the first process alone."""
    if is_first():
        print(text, end="", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    """Returns an error in one line. With several processes, the line names this process."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if not jax.distributed.is_initialized():
        return reason
    if isinstance(error, KeyboardInterrupt):
        reason = "ended by SIGINT"
    elif OTHERS.search(reason):
        reason = f"another process failed, was killed or is cut off; look at its messages ({reason})"
    return f"process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()}): {reason}"


def exchange(text: str) -> list[str]:
    """Returns the text of every process, by process.

    All processes must call ``exchange`` and ``check_same`` equally often, in the same order.
    """
    if not jax.distributed.is_initialized():
        return [text]
    # An all-gather takes arrays of one shape, so texts are padded to the longest.
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
    """Raises ValueError in every process unless all find the same files in the folders.

    JSON files are compared by their contents, and all others by their sizes, since weights are large.
    """
    if jax.distributed.is_initialized():
        check_same({str(folder): _folder(folder) for folder in folders})


def _folder(folder: Path) -> str:
    """Returns a digest of a folder or file; hidden files of a folder do not count."""
    files = [folder] if folder.is_file() else sorted(file for file in folder.rglob("[!.]*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.suffix == ".json" else str(file.stat().st_size).encode()
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + content + b"\0")
    return f"a folder of {len(files)} files with the digest {digest.hexdigest()[:8]}" if files else "no folder of files"


def _short(text: str) -> str:
    """Returns the text, or its beginning and a digest."""
    if len(text) <= SHOWN:
        return text
    return f"{text[:SHOWN]}... ({len(text)} characters with the digest {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _origin(args: argparse.Namespace) -> dict[str, str]:
    """Returns everything that must be equal in all processes: packages, code and arguments."""
    given = {f"the argument {name}": repr(value) for name, value in vars(args).items()}
    # These two differ: one says which process this is, and a host may know the coordinator by another name.
    for name in ("coordinator", "process_id"):
        given.pop(f"the argument {name}")
    packages = {f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    digest = hashlib.sha256()
    for file in sorted(Path(str(importlib.resources.files("specjax"))).rglob("*.py")):
        digest.update(file.read_bytes())
    code = {"the version of Python": platform.python_version(), "the code of specjax": digest.hexdigest()[:8]}
    return given | packages | code


def _mesh_of_all(sizes: dict[str, Any] | None) -> Mesh:
    """Returns a mesh of the devices of all processes."""
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
    """Keeps standard output for what Python prints in the first process.

    JAX's transport between CPUs, gloo, prints to it in every process, from C++. That goes to standard error here.
    """
    place = os.dup(1) if is_first() else os.devnull
    with open(place, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as out:
        sys.stdout.flush()
        os.dup2(2, 1)
        with contextlib.redirect_stdout(out):
            yield
        os.dup2(out.fileno(), 1)


def _come_together(args: argparse.Namespace) -> bool:
    """Joins the other processes, and returns whether there are others."""
    # Without any option, this is the only process. With some options of an address, the missing ones are an error.
    place = {"--coordinator": args.coordinator, "--num-processes": args.num_processes, "--process-id": args.process_id}
    missing = [name for name, value in place.items() if value is None]
    if len(missing) == len(place) and not args.distributed:
        return False
    if missing and len(missing) < len(place):
        raise ValueError(f"{missing[0]} is missing; give all of {', '.join(place)}, or just --distributed")
    if not missing:
        _check_place(args.coordinator, args.num_processes, args.process_id)
        # If a process does not come, JAX aborts this one with a message that names neither that process nor the
        # address. So both are printed first.
        who, at = f"process {args.process_id} of {args.num_processes}", args.coordinator
        print(f"{who} waits for the others at {at}, at most {START_S} s", file=sys.stderr, flush=True)
    jax.config.update("jax_enable_preemption_service", False)  # the service would ignore SIGTERM
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
    """Raises ValueError for an address or number that makes JAX abort without a clear message."""
    if not 0 <= process < count:
        raise ValueError(f"--process-id is {process} and --num-processes {count}; number the processes from 0")
    host, _, port = coordinator.rpartition(":")
    try:
        if process == 0:
            socket.create_server(("", int(port))).close()  # JAX would abort if the port is taken
        else:
            socket.getaddrinfo(host.strip("[]"), port)
    except OSError as error:
        raise ValueError(f"--coordinator is {coordinator}: {error.strerror}; give another HOST:PORT") from None


def _fail(error: BaseException) -> NoReturn:
    """Prints an error, unless a parser has printed it, and ends this process without waiting for the others."""
    # Errors that a user can cause have status 2, as in argparse. Only unexpected ones need a traceback.
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
    # The others meet at process 0, and cannot print once it is gone.
    if is_first():
        time.sleep(LEAVE_S)
    os._exit(status)  # sys.exit would wait for all processes, and one may be gone
