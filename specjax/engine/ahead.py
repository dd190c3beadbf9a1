"""Compilation before the first request."""

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from specjax import verify as verify_lib
from specjax.engine.loop import generate, stream
from specjax.engine.request import lay_out
from specjax.sampling import Sampling
from specjax.types import Drafter, LanguageModel, VerifyRule


def compile(
    target: LanguageModel,
    *,
    prompt_tokens: int,
    max_new_tokens: ArrayLike,
    rows: int = 1,
    rounds: int | None = None,
    drafter: Drafter | None = None,
    verify: VerifyRule = verify_lib.block,
    sampling: Sampling = Sampling(),
    stop_tokens: ArrayLike | tuple[int, ...] = (),
    slots: int | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    fixed: bool = False,
    costs: ArrayLike | None = None,
) -> None:
    """Compiles what ``generate`` or ``stream`` will run, and measures the costs of rounds, before the first request.

    Later calls compile and measure nothing if they have the same target, drafter and number of rows, arguments of the
    same kinds, and sizes in the same buckets. Buckets are powers of two: of the longest prompt from 16 to 256 tokens,
    of the slots from 128 on, and of the stop tokens from 8 on. Example: ``prompt_tokens=100, max_new_tokens=100``
    serves prompts of 65 to 128 tokens whose slots are 256. Call it under the mesh of the later calls.

    It runs the programs on prompts of zeros for one new token per row, so that nothing is left to do later, and memory
    that does not suffice is an error now. JAX's folder of compiled programs (``jax_compilation_cache_dir``), if there
    is one, keeps the programs for later processes.

    Args:
      target, drafter, verify, sampling, stop_tokens, logprobs, top_logprobs, fixed, costs: as for ``generate``. Of
        ``sampling`` and ``stop_tokens``, only shapes and kinds count.
      prompt_tokens: tokens of the longest prompt, at least 1.
      max_new_tokens: as for ``generate``; the largest counts.
      rows: the number of prompts.
      rounds: None compiles what ``generate`` runs; an integer compiles what ``stream`` runs with it.
      slots: as for ``generate``. None is what ``generate`` allocates for these tokens; give it there, too, if prompts
        of several lengths should share the program.

    Raises:
      ValueError, TypeError: as for ``generate``, or a size is no integer of at least 1.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("rows", rows)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; give an integer of at least 1")
    options: dict[str, Any] = {"logprobs": logprobs, "top_logprobs": top_logprobs, "fixed": fixed, "costs": costs}
    prompts = np.zeros((rows, prompt_tokens), np.int32)
    prompt_bs, *_ = lay_out(target, drafter, prompts, None, sampling, max_new_tokens, stop_tokens, slots, **options)
    options |= {"drafter": drafter, "verify": verify, "sampling": sampling, "stop_tokens": stop_tokens}
    options |= {"max_new_tokens": 1, "slots": prompt_bs.shape[1]}
    if rounds is None:
        jax.block_until_ready(generate(target, prompts, **options))
    else:
        for _ in stream(target, prompts, rounds=rounds, **options):
            pass
