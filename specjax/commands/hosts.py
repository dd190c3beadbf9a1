"""What the scripts need to run over a mesh of devices, of one host or of several.

Over several, every process runs the same script with the same arguments. The first prints and writes files; each
watches the others, and one that fails ends them all.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import platform
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax
from jax._src import distributed  # the store that processes share has no public name; Orbax goes this way, too
from jax.sharding import Mesh

import specjax

AXES = ("data", "tensor", "expert")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "tokenizers")
START_S = 300  # within which all processes must come
LOST_S = 20  # a process that gives no sign for so long is lost
HEARTBEAT_S = 50  # the same for JAX, which finds out at half of it at the earliest: when the watch is cut off
BEAT_S = 1
END_S = 86400  # another may take its time over files or input; the watch sees to it that it lives
SHOWN = 80  # characters of a value in a message
# Errors of JAX's runtime that may be another process's end, seen from here.
MAY_BE_ANOTHERS = re.compile(r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")

_exchanges = 0  # how many there were, by which their keys are told apart


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

    Enter it before anything asks JAX for devices. Several processes have a mesh of all their devices, by default along
    ``data``, and then

    - all were started with the same arguments, code and packages, which is checked first;
    - standard output is the first process's alone; what native libraries print there goes to standard error;
    - leaving waits for all processes;
    - no exception comes out. The process in which it was raised prints it, with its traceback unless it is a
      ValueError, TypeError, OSError or FloatingPointError, and ends, with status 2 for these and 1 for others;
      SystemExit keeps its status and is taken for printed. The others print whose it was and what it says, and end
      with 1. They also do when one is interrupted, killed, or gives no sign for ``LOST_S`` seconds.

    Raises:
      ValueError: of one process, that there are too few devices; of several, that they cannot come together: the
        options contradict each other, or name a place that is not there.
    """
    if not _come_together(args):
        if args.mesh is None:
            yield None
            return
        mesh = specjax.make_mesh(**args.mesh)
        with jax.set_mesh(mesh):
            yield mesh
        return
    watch = _Watch()
    try:
        check_same(_origin(args))
        watch.names = exchange(socket.gethostname())
        mesh = _mesh_of_all(args.mesh)
        with jax.set_mesh(mesh), _first_prints():
            yield mesh
        watch.wait_for_all()
    except BaseException as error:
        watch.fail(error)


def is_first() -> bool:
    """Returns whether this process prints, shows bars and writes files: the first of several, and any that is alone."""
    return distributed.global_state.process_id == 0


def note(text: str) -> None:
    """Writes to standard error, of the first process alone."""
    if is_first():
        print(text, end="", file=sys.stderr, flush=True)


def label() -> str:
    """Returns what goes ahead of an error: which of several processes has it."""
    state = distributed.global_state
    return "" if state.client is None else f"{_name(state.process_id, socket.gethostname())}: "


def exchange(text: str) -> list[str]:
    """Returns what every process gives, by process. All must call it and ``check_same`` alike, in the same order."""
    global _exchanges
    state = distributed.global_state
    if state.client is None:
        return [text]
    _exchanges += 1
    keys = [f"specjax/exchange/{_exchanges}/{process}" for process in range(state.num_processes)]
    state.client.key_value_set(keys[state.process_id], text)
    return [state.client.blocking_key_value_get(key, END_S * 1000) for key in keys]


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
    if distributed.global_state.client is not None:
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
    """Returns what must be the same everywhere: arguments but for those that say who is who, packages and code."""
    given = {f"the argument {name}": repr(value) for name, value in vars(args).items()}
    for name in ("coordinator", "process_id"):
        given.pop(f"the argument {name}")
    packages = {f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    digest = hashlib.sha256()
    for folder in (Path(str(importlib.resources.files("specjax"))), Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    code = {"the version of Python": platform.python_version(), "the code of specjax": digest.hexdigest()[:8]}
    return given | packages | code


def _mesh_of_all(sizes: dict[str, int] | None) -> Mesh:
    count = jax.device_count()
    mesh = specjax.make_mesh(**({"data": count} if sizes is None else sizes))
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


# Coming together and ending.


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
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            initialization_timeout=START_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
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
            socket.create_server(("", int(port))).close()  # JAX dies of a port that is taken
        else:
            socket.getaddrinfo(host.strip("[]"), port)
    except OSError as error:
        raise ValueError(f"--coordinator is {coordinator}: {error.strerror}; give another HOST:PORT") from None


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """Says in one line what the page means that JAX prints as it aborts a process.

    It does so at once in all of them when process 0 is gone, where they meet, and when some do not come in time.
    """
    state = distributed.global_state
    host, _, port = state.coordinator_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        answers = True
    except OSError:
        answers = False
    if _exchanges and answers:
        reason = "JAX ended it for the reason above, such as the loss of another process"
    elif _exchanges:
        reason = "it ends, since process 0 is gone"
    elif answers:
        reason = (
            f"not all {state.num_processes} processes came to {state.coordinator_address} within {START_S} s; start "
            "them with the same --coordinator and --num-processes, and each with its own --process-id"
        )
    else:
        reason = f"nobody answers at {state.coordinator_address}; start process 0 there, or correct --coordinator"
    _say(label() + reason)
    os._exit(1)


def _name(process: int, host: str) -> str:
    return f"process {process} of {distributed.global_state.num_processes} ({host})"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os.write(2, f"error: {text}\n".encode(errors="backslashreplace"))


class _Watch:
    """Gives signs of this process to the others, and ends it when one of them has failed or gives none.

    Attributes:
      names: the processes' hosts.
    """

    def __init__(self):
        state = distributed.global_state
        self._client, self._me, self.names = state.client, state.process_id, ["?"] * state.num_processes
        self._over, self._ending = threading.Event(), threading.Lock()
        self._interrupted, wakeup = socket.socketpair()  # a thread can wait for it; the main one may be inside XLA
        wakeup.setblocking(False)
        self._wakeup = wakeup  # kept open
        signal.set_wakeup_fd(wakeup.fileno())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a closed pipe is an error to be told, like any other
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        signs, beat = [("", time.monotonic())] * len(self.names), 0
        while not self._over.is_set():
            if select.select([self._interrupted], [], [], BEAT_S)[0]:
                number = signal.Signals(self._interrupted.recv(1)[0])
                self._end(self._me, f"{label()}ended by {number.name}", 128 + number)
            beat += 1
            try:
                self._client.key_value_set(f"specjax/watch/sign/{self._me}", str(beat), allow_overwrite=True)
                said = dict(self._client.key_value_dir_get("specjax/watch/"))
            except Exception:  # of several kinds, when process 0 is gone: then JAX is about to abort this one
                continue
            now = time.monotonic()
            for process, (before, since) in enumerate(signs):
                text = said.get(f"specjax/watch/failed/{process}")
                if text is not None:
                    self._end(process, text, 1)
                sign = said.get(f"specjax/watch/sign/{process}", "")
                if sign != before:
                    signs[process] = sign, now
                elif now - since > LOST_S:
                    name = _name(process, self.names[process])
                    self._end(process, f"{name}: no sign of it for {LOST_S} s; it was killed or cut off", 1)

    def _end(self, process: int, text: str, status: int, said: bool = False) -> NoReturn:
        """Tells the others that ``process`` has failed, and ends this one."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread is about to end the process
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"specjax/watch/failed/{process}", text, allow_overwrite=True)
        if not said:
            _say(text)
        if self._me == 0:
            time.sleep(5 * BEAT_S)  # what the others have yet to read lies here
        os._exit(status)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes for an exception of this one."""
        said, status, cause = False, 1, error
        if isinstance(error, SystemExit):  # of a parser that has said what is wrong
            said, cause = True, error.__context__ or error
            status = error.code if isinstance(error.code, int) else 1
        reason = " ".join(str(cause).split()) or type(cause).__name__
        if MAY_BE_ANOTHERS.search(reason):
            time.sleep(LOST_S + 5 * BEAT_S)  # if it is, the watch ends this process and says whose
        if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)):
            status = 2
        elif not said:
            traceback.print_exception(error)
        self._end(self._me, label() + reason, status, said)

    def wait_for_all(self) -> None:
        """Returns when all have come here; what may fail is over then."""
        self._client.wait_at_barrier("specjax/end", END_S * 1000)
        self._over.set()
        self._thread.join()
        signal.set_wakeup_fd(-1)
        jax.distributed.shutdown()
