"""Where commands keep compiled programs, so that a later process loads them instead of compiling."""

import argparse
import sys
import tempfile
from pathlib import Path

import jax

import specjax
from specjax.checkpoint.fetched import cache_folder

BOUND = 2**30  # bytes of programs in the default folder; the ones that were not used for the longest time go first


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--compilation-cache`` and ``--no-compilation-cache``, for ``set_up``."""
    group = parser.add_argument_group("compiled programs", "kept for later processes; docs/performance.md, Cold start")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--compilation-cache",
        type=Path,
        metavar="DIR",
        help="keep them in DIR (default: $JAX_COMPILATION_CACHE_DIR if set, else ~/.cache/specjax, at most 1 GiB)",
    )
    either.add_argument("--no-compilation-cache", action="store_true", help="neither keep nor load compiled programs")


def set_up(args: argparse.Namespace) -> None:
    """Sets JAX's folder of compiled programs by the options of ``add_options``.

    Call it before anything compiles: JAX looks once. A folder that cannot be written to is not used, with a note if it
    was named. The order of precedence: an option, then a folder that JAX already has, by ``JAX_COMPILATION_CACHE_DIR``
    or its configuration, then the default.
    """
    if args.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    named = args.compilation_cache
    held = jax.config.values["jax_compilation_cache_dir"]
    if named is None and held:
        if "://" not in held:
            specjax.keep_programs(Path(held) / "programs")
        return  # with the limits that JAX was given
    # Of several processes, one might find a program that the others compile. On GPUs they choose kernels together, so
    # the others would wait. A folder that is named is one that all share.
    if named is None and (args.distributed or args.coordinator):
        return
    try:
        folder = (cache_folder() if named is None else named).expanduser().absolute()
        # Programs run in later processes, so other users must not write here.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if named is None:
            _mend(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        if named is not None:
            reason = getattr(error, "strerror", None) or error
            print(
                f"note: --compilation-cache is {named}, which cannot be written to ({reason}); this run keeps no "
                "programs: give a folder that can be written to",
                file=sys.stderr,
            )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs add up, too
    if named is None:
        jax.config.update("jax_compilation_cache_max_size", BOUND)
    specjax.keep_programs(folder / "programs")


def _mend(folder: Path) -> None:
    """Adds times of use that are missing, as after a process that was killed between two writes.

    JAX before 0.11 would write no program any more.
    """
    for program in folder.glob("*-cache"):
        time = program.with_name(program.name.removesuffix("-cache") + "-atime")
        if not time.exists():
            time.write_bytes(bytes(8))
