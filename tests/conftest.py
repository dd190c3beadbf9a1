"""Strictness for the whole suite, and compilations kept between runs."""

import gc
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory maps, of which a process may have 65530: XLA aborts when they run out."""
    yield
    jax.clear_caches()
    gc.collect()
