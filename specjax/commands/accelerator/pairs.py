"""The pairs whose text is checked: a tiny one of random weights, and the shipped one. Both are float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import specjax
from specjax.commands.places import shipped
from specjax.hf.config import decoder_config

PAIRS = ("tiny", "shipped")
ROWS = 8
SLOTS = 128  # of every row, whatever the drafter, so that all texts have one shape
NEW_TOKENS = 64
NUM_DRAFT = 4
TINY = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
NOISE = 0.1  # of the tiny draft model, in standard deviations of each matrix of the target
HEADS = ("eagle", "mtp", "medusa")
BEGINNINGS = (
    "import os\nimport sys\n\n\ndef main(argv):\n",
    "class Stack:\n    def __init__(self):\n",
    "def fibonacci(n):\n    if n < 2:\n",
    "import re\n\nPATTERN = re.compile(",
    "for name in sorted(names):\n    print(name)\nfor name in",
    "    def close(self):\n        self.",
    "try:\n    import json\nexcept ImportError:\n",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n",
)


class Pair(NamedTuple):
    """A target, its drafters by kind, and prompts: int32 ``[ROWS, t]``, right-padded, and lengths, int32 ``[ROWS]``."""

    target: specjax.LanguageModel
    drafters: dict[str, Any]
    prompts_bt: np.ndarray
    length_b: np.ndarray


def open_pair(name: str, with_drafters: bool = True) -> Pair:
    """Opens a pair of ``PAIRS``.

    Raises:
      ValueError: the checkpoints of the shipped pair are not there.
    """
    return _tiny(with_drafters) if name == "tiny" else _shipped(with_drafters)


def _tiny(with_drafters: bool) -> Pair:
    # NumPy draws the parameters: all devices must have the same, and jax.random.normal may differ in the last bit.
    config, random = decoder_config(TINY), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: specjax.transformer.init_params(config, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)

    def drawn(x: Any) -> np.ndarray:
        # Matrices of a fresh model are so small that its text is one token. These give a text that moves.
        return random.normal(0, 2 * x.shape[0] ** -0.5, x.shape) if len(x.shape) > 1 else np.ones(x.shape)

    arrays = [drawn(x).astype(np.float32) for x in leaves]
    target = specjax.transformer.decoder_model(config, jax.tree.unflatten(tree, list(map(jnp.asarray, arrays))))
    lengths = np.asarray([12, 3, 7, 1, 12, 5, 9, 2], np.int32)
    tokens = random.integers(0, TINY["vocab_size"], (ROWS, 12)).astype(np.int32)
    prompts = np.where(np.arange(12)[None] < lengths[:, None], tokens, 0)
    if not with_drafters:
        return Pair(target, {}, prompts, lengths)
    # The draft model is the target with noise, so some of its drafts are accepted and some are not.
    noisy = [jnp.asarray(x + NOISE * x.std() * random.normal(size=x.shape), jnp.float32) for x in arrays]
    draft = specjax.transformer.decoder_model(config, jax.tree.unflatten(tree, noisy))
    drafters = {"ngram": specjax.NGramDrafter(NUM_DRAFT), "model": specjax.ModelDrafter(draft, NUM_DRAFT)}
    return Pair(target, drafters, prompts, lengths)


def _shipped(with_drafters: bool) -> Pair:
    folder = shipped("py-14m")
    if folder is None:
        raise ValueError("checkpoints/py-14m is not there; run the script of a whole checkout")
    opened = specjax.open(folder, dtype="float32")
    encoded = [opened.need_tokenizer().encode(text).ids for text in BEGINNINGS]
    prompts, lengths = specjax.pad_prompts(encoded)
    if not with_drafters:
        return Pair(opened.model, {}, prompts, lengths)
    specs = {"ngram": "ngram", "model": f"model:{folder}-draft"}
    specs |= {kind: f"{kind}:{folder}-{kind}" for kind in HEADS if shipped(f"py-14m-{kind}")}
    drafters = {
        kind: specjax.load_drafter(spec, opened.model, NUM_DRAFT, dtype="float32") for kind, spec in specs.items()
    }
    return Pair(opened.model, drafters, prompts, lengths)
