"""Strictness for the whole suite, and as little compilation as its tests can do with."""

import gc
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# Compilation is most of the suite's time, and LLVM's costly passes are a third of that. XLA's own passes all run: the
# optimised HLO stays the same.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_addoption(parser):
    parser.addoption("--optimized", action="store_true", help="compile all tests' programs as users' are")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compiles what a test marked ``optimized`` runs, its fixtures too, as users' programs are."""
    quick = not (item.config.getoption("--optimized") or item.get_closest_marker("optimized"))
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory maps, of which a process may have 65530: XLA aborts when they run out."""
    yield
    jax.clear_caches()
    gc.collect()
