"""Draft heads that the package speculators made, against the package's own forward passes.

The tests of a version that is not installed are skipped, so continuous integration runs none. Version 0.9.0 has MTP
modules, and heads of DFlash, DFlash2, DSpark and P-EAGLE. It asks for an older transformers than specjax's extra
``parity``, but runs with this one:

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


BLOCKS = {
    "DFlash": ("dflash", {"block_size": 4}),
    "DFlash from the anchor": ("dflash", {"block_size": 3, "sample_from_anchor": True}),
    "DFlash with causal windows": ("dflash", {"block_size": 4, "sliding": True}),
    "DFlash with windows": ("dflash", {"block_size": 4, "sliding": True, "sliding_window_non_causal": True}),
    "DFlash2": ("dflash2", {"block_size": 4, "sliding": True, "conv_group_size": 4, "selector_top_k": 5}),
    "DFlash2, three taps, causal": (
        "dflash2",
        {
            "block_size": 4,
            "sliding": True,
            "sliding_window_non_causal": False,
            "conv_kernel_size": 3,
            "conv_group_size": 8,
        },
    ),
    "DSpark, vanilla": ("dspark", {"block_size": 4, "markov_head_type": "vanilla"}),
    "DSpark, gated": ("dspark", {"block_size": 3, "markov_head_type": "gated", "confidence_head_with_markov": False}),
    "DSpark, rnn, a smaller vocabulary": ("dspark", {"block_size": 4, "markov_head_type": "rnn", "drafted": 11}),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_equals_its_own_forward(case, tmp_path, monkeypatch):
    """Anchors at all places of a text but the last few, where the package takes none."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda given: given))
    kind, options = BLOCKS[case]
    verifier = saved(tmp_path / "target", transformers.LlamaConfig(**SIZES))
    head = block_head(kind, verifier, tmp_path, **options)
    block = options["block_size"]
    with torch.no_grad():
        features = [verifier.model(torch.tensor(TOKENS), output_hidden_states=True).hidden_states[i] for i in (1, 2)]
        states, logits, trusted = own_blocks(head, torch.tensor(TOKENS), features, block)
    # The same anchors, one in each row.
    opened = specjax.open(tmp_path / "target", "float32")
    drafter = specjax.load_drafter(f"block:{tmp_path / 'head'}@window=stays", opened, 2, "float32")
    own, params, rows = drafter.head, drafter.params, 12 - block
    assert own.capture == (1, 2)
    length_b, tokens_bs = np.arange(1, rows + 1, dtype=np.int32), np.repeat(TOKENS, rows, axis=0).astype(np.int32)
    event = specjax.Event(whole_feed(tokens_bs), tuple(np.repeat(x.numpy(), rows, axis=0) for x in features), length_b)
    context = specjax.Context(opened.model, None, tokens_bs, length_b, np.full(rows, 9, np.int32))
    cache = own.observe(params, own.init(params, opened.model, rows, 12), context, event)
    found, _ = own.block(params, cache, context, own.most_drafts)
    first, carry = block - own.most_drafts, own.start(params, rows)
    np.testing.assert_allclose(found.states_bgd, states[:, first:], atol=1e-4, rtol=1e-4)
    drafted = slice(None) if head.t2d is None else np.flatnonzero(head.t2d)
    for i in range(own.most_drafts):
        state_bd, before_b = found.states_bgd[:, i], tokens_bs[np.arange(rows), np.arange(rows) + i]
        if own.confidence:
            np.testing.assert_allclose(own.confidence_of(params, state_bd, before_b), trusted[:, i], atol=1e-4)
        corrected, carry = own.step(params, carry, found.logits_bgu[:, i], state_bd, before_b)
        np.testing.assert_allclose(np.asarray(corrected)[:, drafted], logits[:, first + i], atol=1e-4, rtol=1e-4)


def block_head(kind, verifier, folder, sliding=False, drafted=37, **options):
    """Writes a head of blocks of random weights into ``folder / "head"``, and returns it."""
    module = pytest.importorskip(f"speculators.models.{kind}")
    windows = {"sliding_window": 3, "use_sliding_window": True} if sliding else {}
    kinds = ["full_attention", "sliding_attention" if sliding else "full_attention"]
    layer = transformers.Qwen3Config(**SIZES | {"num_hidden_layers": 2, "layer_types": kinds, **windows})
    layer._attn_implementation = "eager"
    name = {"dflash": "DFlash", "dflash2": "DFlash2", "dspark": "DSpark"}[kind]
    config = getattr(module, f"{name}SpeculatorConfig")(
        transformer_layer_config=layer,
        speculators_config=about("LlamaForCausalLM", kind, folder / "target"),
        draft_vocab_size=drafted,
        aux_hidden_state_layer_ids=[1, 2],
        mask_token_id=36,
        **options | {"dspark": {"markov_rank": 5}, "dflash2": {"selector_rank": 5}}.get(kind, {}),
    )
    head = drawn(getattr(module, f"{name}DraftModel")(config).eval())
    if drafted != 37:
        token_u = 3 * torch.arange(drafted) + 1
        head.load_vocab_mappings(torch.isin(torch.arange(37), token_u), token_u - torch.arange(drafted))
    head.save_pretrained(folder / "head")
    head.embed_tokens.weight.data = verifier.model.embed_tokens.weight.data
    if drafted == 37:
        head.lm_head.weight.data = verifier.lm_head.weight.data
    return head


def own_blocks(head, tokens, features, block):
    """Returns the package's states, logits and confidences for blocks at all anchors of a text that it takes."""
    rows = 12 - block
    states, logits, *_ = head._backbone_forward(
        *(torch.cat(features, dim=-1), tokens, torch.ones(1, 12), features[0], torch.zeros(1, 12, dtype=torch.long)),
        max_anchors=rows,
    )
    states, logits = states.reshape(rows, block, -1), logits.reshape(rows, block, -1)
    if hasattr(head, "candidate_selector"):
        before = torch.stack([tokens[0, [anchor, *range(anchor, anchor + block - 1)]] for anchor in range(rows)])
        ids, scores = head.candidate_selector.select(logits, states, before)
        return states, torch.full_like(logits, -torch.inf).scatter(-1, ids, scores), None
    if not hasattr(head, "markov_head"):
        return states, logits, None
    given = torch.stack([tokens[0, anchor : anchor + block] for anchor in range(rows)])
    read = [states, head.markov_head.prev_embeddings(given)]
    trusted = head.confidence_head(torch.cat(read[: 1 + head.config.confidence_head_with_markov], dim=-1)).sigmoid()
    return states, logits + head.markov_head.block_bias(prev_token_ids=given, hidden_states=states), trusted


def test_a_p_eagle_head_equals_its_own_forward(tmp_path, monkeypatch):
    """Chains of three depths from the places of a text that the package samples, which are most of them."""
    core = pytest.importorskip("speculators.models.peagle.core")
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda given: given))
    verifier = saved(tmp_path / "target", transformers.LlamaConfig(**SIZES))
    layer = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 2})
    layer._attn_implementation = "eager"
    config = core.PEagleSpeculatorConfig(
        transformer_layer_config=layer,
        speculators_config=about("LlamaForCausalLM", "peagle", tmp_path / "target"),
        draft_vocab_size=37,
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        mask_token_id=36,
        norm_before_residual=True,
        fc_norm=True,
    )
    head = drawn(core.PEagleDraftModel(config).eval())
    head.save_pretrained(tmp_path / "head")
    seen = {}
    monkeypatch.setattr(core, "compute_metrics", lambda **named: (seen.update(named), (None, {}))[1])
    with torch.no_grad():
        states = verifier.model(torch.tensor(TOKENS), output_hidden_states=True).hidden_states
        # Slot i takes token i + 1 and the states at position i.
        head(
            hidden_states=torch.cat([states[i] for i in (1, 2, 3)], dim=-1)[:, :-1],
            input_ids=torch.tensor(TOKENS[:, 1:]),
            document_ids=torch.zeros(1, 11, dtype=torch.long),
            verifier_last_hidden_states=states[-1][:, :-1],
            num_depths=3,
            down_sample_ratio=1.0,
            down_sample_ratio_min=1.0,
        )
    # The same chains, one in each row: a row whose last slot with known states is its anchor.
    opened = specjax.open(tmp_path / "target", "float32")
    drafter = specjax.load_drafter(f"block:{tmp_path / 'head'}", opened, 3, "float32")
    own, params, rows = drafter.head, drafter.params, 11
    length_b, tokens_bs = np.arange(2, 13, dtype=np.int32), np.pad(np.repeat(TOKENS, rows, axis=0), ((0, 0), (0, 4)))
    tokens_bs = tokens_bs.astype(np.int32)
    features = tuple(np.repeat(states[i].numpy(), rows, axis=0) for i in (1, 2, 3))
    event = specjax.Event(
        specjax.Feed(tokens_bs[:, :12], np.zeros(rows, np.int32), length_b - 1), features, length_b - 1
    )
    context = specjax.Context(opened.model, None, tokens_bs, length_b, np.full(rows, 9, np.int32))
    cache = own.observe(params, own.init(params, opened.model, rows, 16), context, event)
    found, _ = own.block(params, cache, context, 3)
    depths = set()
    for at, (anchor, depth) in enumerate(zip(seen["anchor_pos"].tolist(), seen["depth"].tolist(), strict=True)):
        if anchor >= 0:
            wanted = seen["logits"][0, at]
            np.testing.assert_allclose(found.logits_bgu[anchor, depth], wanted, atol=1e-4, rtol=1e-4)
            depths.add(depth)
    assert depths == {0, 1, 2}
