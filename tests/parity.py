"""Tests of a family against transformers, on tiny random checkpoints written by transformers itself.

A test module imports the test functions, and has a fixture ``case``.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jitted import jit
from parity_cases import LIMIT, SMALL, VOCAB

import specjax

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

PROMPT, NEW_TOKENS = 21, 64  # of the first row
LENGTHS = (PROMPT + NEW_TOKENS, 34)  # tokens of the two rows that are compared
TOLERANCE = 1e-4

MODEL_CLASSES = {
    "Gemma3Text": "Gemma3ForCausalLM",
    "Gemma4Text": "Gemma4ForCausalLM",
    "Gemma4UnifiedText": "Gemma4UnifiedForCausalLM",
    "Llama4Text": "Llama4ForCausalLM",
    "GPT2": "GPT2LMHeadModel",
    "Qwen3_5Text": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeText": "Qwen3_5MoeForCausalLM",
}


@dataclasses.dataclass
class Case:
    """A checkpoint, both models, and the rows' tokens."""

    folder: object
    theirs: object
    ours: specjax.LanguageModel
    rows: list
    dynamic: bool

    def expected(self, tokens):
        """Logits [t, v] by transformers.

        With dynamic rope they depend on what is fed together, past the original length: transformers rotates all keys
        of a pass by the frequencies of its end. One token at a time is what any split of ours must equal.
        """
        ids = torch.tensor([tokens])
        with torch.no_grad():
            if not self.dynamic:
                return self.theirs(ids).logits[0].numpy()
            logits, cache = [], None
            for i in range(ids.shape[1]):
                out = self.theirs(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                logits.append(out.logits[0, 0].numpy())
                cache = out.past_key_values
            return np.stack(logits)


def make_model(kind, settings, seed=0):
    """A model under whose weights every part matters: norms far from their neutral value, logits of a few units."""
    sizes = {} if kind == "GPT2" else SMALL
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings}, attn_implementation="eager")
    model = getattr(transformers, MODEL_CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if "e_score_correction_bias" in name:
            tensor.data = 0.2 * noise
        elif "inv_freq" in name or name.endswith("embed_scale"):
            continue
        elif tensor.ndim == 1 and name.endswith("bias"):
            tensor.data = 0.3 * noise
        elif tensor.ndim == 1:
            tensor.data = 0.3 * noise + (0.0 if kind in ("Gemma2", "Gemma3Text") else 1.0)
        elif "embed" in name or "wte" in name or "wpe" in name:
            tensor.data = 0.5 * noise
        else:
            fan_in = tensor.shape[-2] if kind == "GPT2" and "lm_head" not in name else tensor.shape[-1]
            tensor.data = noise / fan_in**0.5
    return model


def make_case(kind, settings, folder):
    """Writes a checkpoint into an empty folder, and opens it. Row 0 goes on with transformers' greedy text."""
    theirs = make_model(kind, settings)
    theirs.save_pretrained(folder)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, VOCAB, size=length).tolist() for length in (PROMPT, LENGTHS[1])]
    dynamic = settings.get("rope_parameters", {}).get("rope_type") == "dynamic"
    rows[0] = greedy_text(theirs, rows[0], dynamic)
    return Case(folder, theirs, specjax.load(folder, "float32"), rows, dynamic)


def greedy_text(model, tokens, dynamic):
    """Returns the prompt's tokens and ``NEW_TOKENS`` of a transformers model; ``dynamic``: each is fed by itself."""
    tokens, fed, cache = list(tokens), 0, None
    with torch.no_grad():
        while len(tokens) < PROMPT + NEW_TOKENS:
            end = fed + 1 if dynamic else len(tokens)
            out = model(torch.tensor([tokens[fed:end]]), past_key_values=cache, use_cache=True)
            fed, cache = end, out.past_key_values
            if fed == len(tokens):
                tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


@jit
def forward(model, feed, cache):
    output = model.forward(model.params, feed, cache)
    return output.logits_btv, model.keep(output.cache, feed, feed.count_b)


def test_logits_whole_token_by_token_and_in_blocks(case):
    """Largest difference over prefill, single tokens and blocks of g + 1 at offsets of each row's own.

    As the first row ends with transformers' greedy text, ours must have the same likeliest tokens there.
    """
    expected = [case.expected(tokens) for tokens in case.rows]
    worst = {}
    for width in (max(LENGTHS), 1, 5):
        cache, got = case.ours.init_cache(2, LIMIT), [[], []]
        for step in range(-(-max(LENGTHS) // width)):
            start = [min(step * width, length) for length in LENGTHS]  # a finished row rests
            count = [min(width, length - at) for at, length in zip(start, LENGTHS, strict=True)]
            block = [(tokens + [0] * width)[at : at + width] for tokens, at in zip(case.rows, start, strict=True)]
            block = [(tokens + [0] * width)[:width] for tokens in block]
            feed = specjax.Feed(*(jnp.asarray(x, jnp.int32) for x in (block, start, count)))
            logits, cache = forward(case.ours, feed, cache)
            for row in range(2):
                got[row].extend(np.asarray(logits[row, : count[row]]))
        assert np.argmax(got[0][PROMPT - 1 : -1], axis=-1).tolist() == case.rows[0][PROMPT:]
        worst[width] = max(np.abs(np.stack(rows) - wanted).max() for rows, wanted in zip(got, expected, strict=True))
    spread = np.std(expected[0])
    print(f"largest difference by width {worst}, logits' deviation {spread:.2f}")
    assert 0.1 < spread < 30
    assert max(worst.values()) <= TOLERANCE


def assert_generates_the_greedy_text(case):
    """``generate`` with n-gram drafts writes transformers' greedy text."""
    generation = specjax.generate(
        case.ours,
        np.asarray([case.rows[0][:PROMPT]], np.int32),
        drafter=specjax.NGramDrafter(num_draft=3, min_n=1),
        fixed=True,
        sampling=specjax.Sampling(temperature=0.0),
        max_new_tokens=NEW_TOKENS,
    )
    assert np.asarray(generation.tokens)[0, : int(generation.lengths[0])].tolist() == case.rows[0]
