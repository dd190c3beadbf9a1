"""Training text: a tokenizer for it, its tokens, and windows drawn from them."""

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level byte-pair encoding (Sennrich et al. 2016), id 0 being the end of a text.

    It has at most ``vocab_size`` tokens, fewer where the texts have fewer pairs, and never fewer than 257: one for each
    byte beside the end.
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
    """Returns int32 ``[n]``, the tokens of all texts, each behind an end-of-text token, or what else the tokenizer puts
    there.

    Args:
      tokenizer: of any kind; ``train_tokenizer``'s have the token ``END_OF_TEXT``.
      texts: at least one.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    first = [] if end is None else [end]  # other tokenizers put a token of their own before a text
    pieces = [np.asarray([*first, *encoding.ids], np.int32) for encoding in tokenizer.encode_batch(list(texts))]
    return np.concatenate(pieces)


class Windows:
    """Batches of token windows; the batch of a step is a function of (seed, step), so training can resume anywhere.

    Each epoch visits every window once, in an order and from an offset of its own.

    Args:
      tokens: integers ``[n]``.
      length: tokens in a window.
      rows: windows in a batch.
      seed: of orders and offsets, at least 0.

    Raises:
      ValueError: the tokens hold no whole batch.
    """

    def __init__(self, tokens: np.ndarray, length: int, rows: int, seed: int):
        self.tokens, self.length, self.rows, self.seed = tokens, length, rows, seed
        self.batches_per_epoch = (len(tokens) - length) // length // rows
        if self.batches_per_epoch < 1:
            raise ValueError(
                f"{len(tokens)} tokens hold no batch of {rows} windows of {length}; give more text or smaller batches"
            )

    def batch(self, step: int) -> np.ndarray:
        """Returns ``[rows, length]``, the batch of a step from 0 on, in the dtype of the tokens."""
        epoch, index = divmod(step, self.batches_per_epoch)
        rng = np.random.default_rng((self.seed, epoch))
        offset = rng.integers(self.length)
        order = rng.permutation(self.batches_per_epoch * self.rows)
        starts = offset + self.length * order[index * self.rows : (index + 1) * self.rows]
        return np.stack([self.tokens[start : start + self.length] for start in starts])
