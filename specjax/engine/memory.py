"""What drafters remember between calls."""

from typing import Any, TypeVar

import numpy as np
from jax.typing import ArrayLike

from specjax.engine.arguments import Prompts, as_prompts, bucket, check_tokens, is_known
from specjax.sharding import gathered
from specjax.types import Generation

D = TypeVar("D")

_SMALLEST_TEXT = 128


def remember(drafter: D, tokens: Prompts | Generation, lengths: ArrayLike | None = None) -> D:
    """Returns the drafter with further texts in its memory, for later calls: a corpus, or what was generated.

    The memory's shape stays, so neither this function nor ``generate`` compiles anything new for texts in the same
    buckets. Texts that do not fit push the oldest ones out; of a text that is longer than the memory, its end stays.
    Also usable under ``jit``, where a token outside of the vocabulary ends a text and begins another.

    Args:
      drafter: a ``SuffixDrafter``, or a ``Cascade`` with one; any drafter with a method ``remember(tokens_bt,
        length_b)``. The argument itself stays as it is.
      tokens: a sequence of texts, each a sequence of token ids; or integers ``[rows, width]``, right-padded; or a
        ``Generation``, of which prompts and emitted tokens are remembered. The last text is the newest.
      lengths: integers ``[rows]``, 0 .. width, for padded texts; None means that no text is padded.

    Raises:
      TypeError: the drafter has no memory, or ``tokens`` or ``lengths`` are no integers.
      ValueError: a token is outside of the vocabulary, or shapes do not fit.
    """
    # 1. What is given.
    having: Any = drafter
    if not hasattr(drafter, "remember"):
        raise TypeError(
            f"the drafter is a {type(drafter).__name__}, which remembers nothing; give a SuffixDrafter, or a Cascade "
            "with one"
        )
    if isinstance(tokens, Generation):
        if lengths is not None:
            raise ValueError("lengths is given beside a Generation, which has its own; leave it out")
        tokens, lengths = tokens.tokens, tokens.lengths
    tokens_bt, length_b = as_prompts(tokens, lengths, 0)
    # 2. Outside of `jit`, shapes are in buckets, and all processes remember the rows of all.
    if is_known((tokens_bt, length_b)):
        tokens_bt, length_b = gathered((tokens_bt, length_b))
        if having.vocab_size is not None:
            check_tokens(tokens_bt, length_b, having.vocab_size, "text")
        rows, width = tokens_bt.shape
        more = (bucket(rows, 1) - rows, bucket(width, _SMALLEST_TEXT) - width)
        tokens_bt = np.pad(tokens_bt, ((0, more[0]), (0, more[1]))).astype(np.int32)
        length_b = np.pad(length_b, (0, more[0])).astype(np.int32)
    return having.remember(tokens_bt, length_b)
