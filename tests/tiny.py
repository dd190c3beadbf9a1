"""A folder of a tiny model that spells: one token for each printable character, and special tokens for a chat."""

import json
import string

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import specjax
from specjax.hf.config import decoder_config
from specjax.transformer.decoder import init_params

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPACE = "\u0120"  # the byte-level name of a space
LETTERS = string.ascii_lowercase + " "
CONFIG = {
    "model_type": "llama",
    "vocab_size": len(SPECIAL) + len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}


def spelling_tokenizer(letters=LETTERS):
    """Text and tokens stand for each other one to one, so encoding a text again gives its tokens."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters.replace(" ", SPACE)])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tiny(path, seed=3, template=TEMPLATE):
    """Writes a checkpoint folder; weights are large, so that greedy texts depend on all that came before."""
    params = init_params(decoder_config(CONFIG), jax.random.key(seed))
    params["embed_tokens"]["weight"] *= 10.0
    params["layers"] = jax.tree.map(lambda x: 20.0 * x if x.ndim > 1 else x, params["layers"])
    specjax.save(path, CONFIG, params, spelling_tokenizer())
    if template is not None:
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return path
