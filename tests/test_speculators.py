"""Draft heads that the package speculators made, against the package's own forward passes.

The tests of a version that is not installed are skipped, so continuous integration runs none. Version 0.9.0 has MTP
modules. It asks for an older transformers than specjax's extra ``parity``, but runs with this one:

    pip install --no-deps --target /tmp/speculators speculators==0.9.0 hs-connectors==0.9.0 openai sniffio datasets \\
        dill multiprocess pandas pyarrow xxhash loguru pydantic-settings
    PYTHONPATH=/tmp/speculators python -m pytest tests/test_speculators.py

Version 0.2.0 has EAGLE-1 heads, and needs transformers 4: an environment of its own, with both and specjax.
"""

import numpy as np
import pytest

import specjax
from specjax.types import whole_feed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TOKENS = np.random.default_rng(0).integers(37, size=(1, 12))


def saved(folder, config):
    """Writes a model of random weights, none of them neutral, and returns it."""
    torch.manual_seed(0)
    model = drawn(transformers.AutoModelForCausalLM.from_config(config).eval())
    model.save_pretrained(folder)
    return model


def drawn(module):
    """Gives a module weights under which every part matters."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale, middle = (0.2, 1.0) if "norm" in name else (0.3, 0.0)
            parameter.copy_(middle + scale * torch.randn(parameter.shape))
    return module


def about(kind, algorithm, folder):
    """Returns what every config of speculators says of the target and of drafting."""
    config, greedy = pytest.importorskip("speculators.config"), pytest.importorskip("speculators.proposals.greedy")
    return config.SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[greedy.GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=config.VerifierConfig(name_or_path=str(folder), architectures=[kind]),
    )


@pytest.mark.parametrize(
    ("bias", "theta"), [(False, 10000.0), (True, 500.0)], ids=["EAGLE", "HASS, with another base than its target"]
)
def test_an_eagle_1_head_equals_its_own_forward(bias, theta, tmp_path):
    """Speculators rotates with the target's frequencies, which the option ``rope=target`` asks for."""
    eagle = pytest.importorskip("speculators.models.eagle")
    if not hasattr(eagle, "EagleSpeculatorConfig"):
        pytest.skip("this version of speculators has no EAGLE-1")
    verifier = saved(tmp_path / "target", transformers.LlamaConfig(**SIZES))
    layer = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}, rope_theta=theta, attn_implementation="eager")
    config = eagle.EagleSpeculatorConfig(
        transformer_layer_config=layer,
        speculators_config=about("LlamaForCausalLM", "eagle", tmp_path / "target"),
        fusion_bias=bias,
    )
    head = drawn(eagle.EagleSpeculator(config, verifier=None, verifier_attachment_mode="detached").eval())
    head.save_pretrained(tmp_path / "head")
    head.attach_verifier(verifier, mode="train_only")
    with torch.no_grad():
        states = verifier.model(torch.tensor(TOKENS)).last_hidden_state[:, :-1]
        wanted = head(torch.tensor(TOKENS[:, 1:]), states, attention_mask=torch.ones(1, 11)).logits
    opened = specjax.open(tmp_path / "target", "float32")
    spec = f"eagle:{tmp_path / 'head'}" + ("" if theta == 10000.0 else "@rope=target")
    # With some versions of transformers, the package's forward pass loses the axis of rows.
    np.testing.assert_allclose(forced(spec, opened, states)[0], wanted.reshape(11, -1), atol=1e-4, rtol=1e-4)


def forced(spec, opened, states):
    """Returns a chained head's logits after each of the target's states, with the true tokens."""
    drafter = specjax.load_drafter(spec, opened, 3, "float32")
    head, params, target = drafter.head, drafter.params, opened.model
    features = head.fuse(params, (np.asarray(states),))
    rows, slots, width = features.shape
    feed = whole_feed(np.asarray(TOKENS[:, 1:], np.int32))
    made, _ = head.run(params, target, feed, features, head.init_cache(params, rows, slots))
    return head.logits(params, target, made.reshape(-1, width)).reshape(rows, slots, -1)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_next"])
def test_mtp_modules_equal_their_own_forward(kind, tmp_path, monkeypatch):
    mtp = pytest.importorskip("speculators.models.mtp")
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda given: given))
    verifier = saved(tmp_path / "target", transformers.LlamaConfig(**SIZES))
    if kind == "qwen3":
        layer = transformers.Qwen3Config(**SIZES, attn_implementation="eager")
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        kinds = ["linear_attention", "full_attention"] * 2
        layer = transformers.Qwen3NextConfig(
            **SIZES, **experts, shared_expert_intermediate_size=10, layer_types=kinds, attn_implementation="eager"
        )
    speculators = about("LlamaForCausalLM", "mtp", tmp_path / "target")
    config = mtp.MTPSpeculatorConfig(transformer_layer_config=layer, speculators_config=speculators)
    head = drawn(mtp.MTPDraftModel(config).eval())
    head.save_pretrained(tmp_path / "head")
    head.embed_tokens.weight.data = verifier.model.embed_tokens.weight.data
    head.lm_head.weight.data = verifier.lm_head.weight.data
    with torch.no_grad():
        states = verifier.model(torch.tensor(TOKENS)).last_hidden_state
        wanted = head(torch.tensor(TOKENS), states)[0][0]
    opened = specjax.open(tmp_path / "target", "float32")
    given = forced(f"mtp:{tmp_path / 'head'}", opened, states[:, :-1])
    np.testing.assert_allclose(given[:, : wanted.shape[1]], wanted, atol=1e-4, rtol=1e-4)
