"""Strictness for the whole suite, and as little compilation as its tests can do with."""

import gc
import os
from pathlib import Path

import jax
import pytest

import specjax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
CACHE = str(Path(__file__).parent.parent / ".jax_cache")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_addoption(parser):
    parser.addoption("--optimized", action="store_true", help="compile as users do; slow, so best with a file or two")


def pytest_configure(config):
    """Compilation is most of the suite's time: half of it goes without LLVM's costly passes and XLA's new emitters, and
    some more by handing LLVM each program in one piece.

    XLA's other passes all run. The environment is for the processes that tests start.

    Tracing is most of the rest. It makes millions of objects that live long, which Python's collector would go through
    again and again; and each operation's stack of callers, which no test reads.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if not config.getoption("--optimized"):
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if jax.__version_info__ < (0, 11):  # later ones may not know a flag, which would be fatal
            flags = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
            given = os.environ.get("XLA_FLAGS", "").split()
            os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*given, *flags]))


# The files that take longest. They come first, so that no worker is left with one of them at the end.
LONGEST = ("platforms", "session", "quantized", "sharded_training", "hosts", "laws", "conformance", "eagle", "logprobs")
LONGEST += ("sharding", "adapt", "mtp", "train_script", "cascade", "conversion", "checking", "turns", "parity_dense")


def pytest_collection_modifyitems(config, items):
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if not config.getoption("--optimized"):
        for item in items:
            if item.path.stem == "test_compiled":
                item.add_marker(pytest.mark.skip(reason="reads what the compiler makes of a program: give --optimized"))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory maps, of which a process may have 65530: XLA aborts when they run out."""
    yield
    specjax.keep_programs(None)  # a command that ran in this process has named a folder
    jax.clear_caches()
    gc.collect()
