"""GGUF files against the Hugging Face folders that they were made of, and against transformers' own reading."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import BLOCKS, gguf, load_folder, quantised, write
from jitted import jit
from parity import make_model
from parity_cases import GEMMA3_ROPE, LLAMA3, LONGROPE, MOE, TIED, VOCAB, WIDE, WINDOW, YARN, rope

import specjax
from specjax.hf.gguf import open_gguf
from specjax.hf.weights import open_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_gguf_checkpoint = pytest.importorskip("transformers.modeling_gguf_pytorch_utils").load_gguf_checkpoint

TOLERANCE = 1e-4
LENGTH = 34
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True}
GEMMA = {"head_dim": 256, **WINDOW, **TIED, "query_pre_attn_scalar": 256}
LONG = {**LONGROPE, "original_max_position_embeddings": 64, "pad_token_id": 0}
SIX_TO_ONE = {**GEMMA, "num_hidden_layers": 7}
# In the models of 27 billion parameters, known by their 46 layers, the scale of attention is that of narrower heads.
LARGE = {**GEMMA, **WIDE, "num_hidden_layers": 46, "query_pre_attn_scalar": 6}
# For each case: transformers' class, its settings, and what transformers leaves out as it reads the GGUF file.
CASES = {
    "llama": ("Llama", {}, ""),
    "llama-tied-wide": ("Llama", {**TIED, **WIDE}, ""),
    "llama-biases": ("Llama", {"attention_bias": True}, "biases"),
    "llama-3": ("Llama", LLAMA3, "rope_freqs.weight"),
    "llama-linear": ("Llama", rope("linear", factor=4.0), "rope.scaling"),
    "llama-yarn": ("Llama", YARN, "rope.scaling"),
    "mixtral": ("Mixtral", MOE, "experts of an architecture that is called llama"),
    "qwen2": ("Qwen2", {}, ""),
    "qwen3": ("Qwen3", {"head_dim": 128}, ""),  # another width would be left out
    "qwen3-moe": ("Qwen3Moe", {**QWEN_MOE, **WIDE}, "expert_feed_forward_length"),
    "gemma2": ("Gemma2", GEMMA, ""),
    "gemma2-large": ("Gemma2", LARGE, "the scale of attention"),
    "gemma3": ("Gemma3Text", SIX_TO_ONE, ""),
    "gemma3-linear": ("Gemma3Text", {**SIX_TO_ONE, "rope_parameters": GEMMA3_ROPE}, "rope.scaling"),
    "phi3": ("Phi3", {"pad_token_id": 0}, ""),
    "phi3-window": ("Phi3", {**WINDOW, "pad_token_id": 0}, "attention.sliding_window"),
    "phi3-long": ("Phi3", LONG, "rope_factors_long.weight"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A folder, and the GGUF file that was made of it."""
    kind, settings, left_out = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make_model(kind, settings).save_pretrained(folder)
    config, tensors = load_folder(folder)
    (folder / "gguf").mkdir()
    write(folder / "gguf" / "tiny.gguf", config, tensors)
    return folder, folder / "gguf" / "tiny.gguf", left_out


def read(params):
    return jax.tree.map(lambda x: x.read(jnp.float32), params, is_leaf=lambda x: hasattr(x, "read"))


def test_a_file_is_the_folder_that_it_was_made_of(case):
    """Config and parameters are equal, bit by bit. Rotary frequencies were rounded to float32 in the file, and so were
    Gemma's norms, with 1 added.
    """
    folder, file, _ = case
    ours, theirs = open_weights(file), open_weights(folder)
    rounding = 1.2e-7 if ours.config.norm == "rms_one_plus" else 0
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=rounding)
    jax.tree.map(same, read(ours.params), read(theirs.params))
    one, other = (vars(weights.config) | {"layers": None} for weights in (ours, theirs))
    assert one == other
    for one, other in zip(ours.config.each_layer, theirs.config.each_layer, strict=True):
        assert dataclasses.replace(one, rope=None) == dataclasses.replace(other, rope=None)
        np.testing.assert_allclose(one.rope.frequencies, other.rope.frequencies, rtol=1e-6)
        assert one.rope.scale == pytest.approx(other.rope.scale)


@jit
def forward(model, tokens_bt):
    rows, length = tokens_bt.shape
    feed = specjax.Feed(tokens_bt, jnp.zeros(rows, jnp.int32), jnp.full(rows, length, jnp.int32))
    return model.forward(model.params, feed, model.init_cache(rows, length)).logits_btv


def logits(model, tokens):
    return np.asarray(forward(model, jnp.asarray([tokens], jnp.int32))[0])


def their_reading(file):
    """The model as transformers reads it: the steps of ``from_pretrained(gguf_file=)``, which would need accelerate."""
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def their_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0].float().numpy()


def test_logits_are_those_of_transformers_reading(case):
    """Where transformers leaves something out, its logits are the wrong ones: the test above has the right model."""
    _, file, left_out = case
    tokens = np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist()
    if left_out:
        pytest.skip(f"transformers leaves out: {left_out}")
    difference = np.abs(logits(specjax.load(file, "float32"), tokens) - their_logits(their_reading(file), tokens)).max()
    print(f"largest difference {difference:.1e}")
    assert difference <= TOLERANCE
