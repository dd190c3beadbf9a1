"""Training text: a tokenizer, the text's tokens, and batches of windows of tokens."""

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909). Id 0 is ``END_OF_TEXT``.

    Args:
      texts: the texts whose pairs are counted.
      vocab_size: the most tokens. There are fewer if the texts have too few pairs, but never fewer than 257: one for
        each byte, and the end of a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Returns int32 ``[n]``, the tokens of all texts one after the other.

    Each text starts with the token ``END_OF_TEXT`` if the tokenizer has it, as those of ``train_tokenizer`` have.
    Other tokenizers start a text with a token of their own, or with none.

    Args:
      tokenizer: of any kind.
      texts: at least one.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    first = [] if end is None else [end]
    pieces = [np.asarray([*first, *encoding.ids], np.int32) for encoding in tokenizer.encode_batch(list(texts))]
    return np.concatenate(pieces)


class Windows:
    """Batches of token windows. A batch is a function of (seed, step), so training can resume at any step.

    Each epoch visits every window once. Each epoch has its own order and its own offset of the first window.

    Args:
      tokens: integers ``[n]``.
      length: tokens in a window.
      rows: windows in a batch.
      seed: seed of orders and offsets, at least 0.

    Raises:
      ValueError: the tokens hold no whole batch.
    """

    def __init__(self, tokens: np.ndarray, length: int, rows: int, seed: int):
        self.tokens, self.length, self.rows, self.seed = tokens, length, rows, seed
        # One window fewer than fit, so that an epoch may start at any offset below `length`.
        self.batches_per_epoch = (len(tokens) - length) // length // rows
        if self.batches_per_epoch < 1:
            raise ValueError(
                f"{len(tokens)} tokens hold no batch of {rows} windows of {length}; give more text or smaller batches"
            )

    def batch(self, step: int) -> np.ndarray:
        """Returns ``[rows, length]``, the batch of ``step`` (from 0), in the dtype of the tokens."""
        # The generator is made anew for each step: no state has to be saved with a checkpoint.
        epoch, index = divmod(step, self.batches_per_epoch)
        rng = np.random.default_rng((self.seed, epoch))
        offset = rng.integers(self.length)
        order = rng.permutation(self.batches_per_epoch * self.rows)
        starts = offset + self.length * order[index * self.rows : (index + 1) * self.rows]
        return np.stack([self.tokens[start : start + self.length] for start in starts])
