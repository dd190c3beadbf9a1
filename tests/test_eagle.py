"""EAGLE heads: published layouts against a NumPy twin, drafts round by round, heads that must always be right."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_eagle
from draft_heads import open_eagle, write_eagle
from flax import struct
from heads_observing import NoPrefill, NoRewrite, assert_chunks_are_as_one_pass, assert_rounds_alone_are_as_one_pass
from jitted import jit
from test_compiled import compilations
from test_drafters import step

import specjax
from specjax.cache import update
from specjax.drafters.eagle import EagleHead
from specjax.drafters.feature import FeatureDrafter
from specjax.hf.config import decoder_config
from specjax.hf.eagle import eagle_fields, speculators_config
from specjax.hf.safetensors import TensorSpec, open_tensors, write_tensors
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import LanguageModel, Output, whole_feed

# The published layouts, on random weights.

VOCAB, DRAFTED, WIDTH, LAYERS = 40, 11, 16, 8
TARGET_WIDTH = 24  # of a target that is wider than its head
LAYER = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,  # shorter than the texts here: it means nothing
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
USUAL = {"draft_vocab_size": DRAFTED, "norm_before_residual": False}
EAGLE_1 = {"architectures": ["LlamaForCausalLM"], **LAYER}
SPECFORGE = {
    **{"architectures": ["LlamaForCausalLMEagle3"], **LAYER, "draft_vocab_size": DRAFTED, "pad_token_id": 0},
    **{"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 8, "target_model_type": "gemma3_text"},
    # Left over from targets with experts, and from multimodal ones.
    **{"decoder_sparse_step": 1, "num_experts": 128, "num_experts_per_tok": 8, "mlp_only_layers": []},
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [1, 1, 0], "rope_type": "default"},
}


def in_speculators(kind="eagle3", layer=None, **head):
    """Returns a config of speculators' layout."""
    usual = USUAL if kind == "eagle3" else {"transformer_layer_architecture": "LlamaDecoderLayer", "layernorms": False}
    verifier = {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
    return {
        "architectures": ["Eagle3Speculator"],
        "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
        "speculators_model_type": kind,
        "speculators_version": "0.2.0",
        **{"base_model_ep_plan": None, "has_no_defaults_at_init": False, "keys_to_ignore_at_inference": []},
        "speculators_config": {"algorithm": kind, "verifier": verifier},
        "transformer_layer_config": LAYER | (layer or {}),
        **usual | head,
    }


@dataclasses.dataclass
class Case:
    """A published head: its config, how its tensors are named, what the twin is told of it, the states it reads."""

    config: dict
    twin: dict = dataclasses.field(default_factory=dict)
    first: str = "layers.0."
    prefix: str = ""
    states: tuple = (2, 4, 5)  # inputs of layers 2, 8 // 2 and 8 - 3
    leave_out: tuple = ()
    options: str = ""  # after the folder, as for ``load_drafter``

    def __post_init__(self):
        self.twin = {**LAYER, "version": 3, "draft_vocab_size": DRAFTED, **self.twin}


ONE = {"version": 1, "bias": True}
CASES = {
    "EAGLE-1, SafeAILab": Case(EAGLE_1, ONE, states=(-1,)),
    "EAGLE-1 without bias": Case(EAGLE_1 | {"bias": False}, ONE | {"bias": False}, states=(-1,)),
    "EAGLE-1 with two layers": Case(EAGLE_1 | {"num_hidden_layers": 2}, ONE | {"num_hidden_layers": 2}, states=(-1,)),
    "EAGLE-1, speculators": Case(
        in_speculators("eagle", fusion_bias=True), ONE, first="transformer.", states=(-1,), leave_out=("embed_tokens",)
    ),
    "EAGLE-3, SafeAILab": Case(EAGLE_1 | {"draft_vocab_size": DRAFTED}, first="midlayer."),
    "EAGLE-3, SpecForge": Case(
        SPECFORGE | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 6], "use_aux_hidden_state": True}},
        first="midlayer.",
        states=(2, 3, 7),
    ),
    "EAGLE-3, SpecForge, 3.1": Case(
        SPECFORGE | {"fc_norm": True, "norm_output": True}, {"fc_norm": True, "norm_output": True}, first="midlayer."
    ),
    "EAGLE-3, vLLM": Case(
        SPECFORGE
        | {"architectures": ["Eagle3LlamaForCausalLM"], "eagle_aux_hidden_state_layer_ids": [1, 2, 6], "bias": False},
        prefix="model.",
        states=(1, 2, 6),
    ),
    "EAGLE-3, ModelOpt": Case(
        SPECFORGE
        | {"eagle_config": {"use_aux_hidden_state": True, "use_last_layernorm": True, "use_mtp_layernorm": False}},
        leave_out=("t2d",),
    ),
    "EAGLE-3, speculators": Case(in_speculators(target_hidden_size=None, eagle_aux_hidden_state_layer_ids=None)),
    "norm_before_residual": Case(in_speculators(norm_before_residual=True), {"norm_before_residual": True}),
    "norm_before_fc": Case(in_speculators(norm_before_fc=True), {"norm_before_fc": True}),
    "fc_norm": Case(in_speculators(fc_norm=True), {"fc_norm": True}),
    "norm_output": Case(in_speculators(norm_output=True), {"norm_output": True}),
    "two states, listed backwards": Case(
        in_speculators(eagle_aux_hidden_state_layer_ids=[7, 0]), {"num_states": 2}, states=(0, 7)
    ),
    "target_hidden_size": Case(
        in_speculators(target_hidden_size=TARGET_WIDTH, fc_norm=True),
        {"target_hidden_size": TARGET_WIDTH, "fc_norm": True},
    ),
    "head_dim": Case(in_speculators(layer={"head_dim": 6}), {"head_dim": 6}),
    "attention_bias": Case(in_speculators(layer={"attention_bias": True}), {"attention_bias": True}),
    "several layers": Case(in_speculators(layer={"num_hidden_layers": 3}), {"num_hidden_layers": 3}),
    "rope_theta": Case(in_speculators(layer={"rope_theta": 50.0}), {"rope_theta": 50.0}),
    "Qwen3's query and key norms": Case(
        in_speculators(layer={"model_type": "qwen3", "head_dim": 4}), {"model_type": "qwen3", "head_dim": 4}
    ),
    "the whole vocabulary": Case(
        in_speculators(draft_vocab_size=VOCAB), {"draft_vocab_size": VOCAB}, leave_out=("d2t", "t2d")
    ),
    "the whole vocabulary, with buffers": Case(in_speculators(draft_vocab_size=VOCAB), {"draft_vocab_size": VOCAB}),
}

# Folders without an output head, and with a meaning of ``norm_output`` that SpecForge had.
HEADLESS = {
    "logits of states that are not normed": Case(
        SPECFORGE | {"norm_output": False}, {"norm_logits": False}, options="@norm_output=logits"
    ),
    "the target's output head": Case(
        SPECFORGE | {"draft_vocab_size": VOCAB}, {"draft_vocab_size": VOCAB}, leave_out=("lm_head", "d2t", "t2d")
    ),
    "some tokens of the target's": Case(SPECFORGE, leave_out=("lm_head",)),
    "normed states for the target's": Case(
        SPECFORGE | {"norm_output": True}, {"norm_output": True}, leave_out=("lm_head",)
    ),
}


def published(case, seed=0):
    """Returns random tensors with the names and shapes of a layout, as NumPy arrays."""
    rng, twin = np.random.default_rng(seed), case.twin
    heads, kv_heads, inner = twin["num_attention_heads"], twin["num_key_value_heads"], twin["intermediate_size"]
    head_dim, drafted = twin.get("head_dim", WIDTH // heads), twin["draft_vocab_size"]
    states, target_width = twin.get("num_states", 3), twin.get("target_hidden_size", WIDTH)
    shapes = {}
    for i in range(twin["num_hidden_layers"]):
        layer = case.first if i == 0 else f"layers.{i}."
        inputs = 2 * WIDTH if i == 0 and twin["version"] == 3 else WIDTH
        sizes = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        for name, size in sizes.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (size, inputs)
            if twin.get("attention_bias"):
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (WIDTH, heads * head_dim)
        if twin.get("attention_bias"):
            shapes[f"{layer}self_attn.o_proj.bias"] = (WIDTH,)
        if twin["model_type"] == "qwen3":
            shapes |= {f"{layer}self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, WIDTH) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, inner)
        norms = ["post_attention_layernorm"]
        norms += ["input_layernorm"] if i or twin["version"] == 3 else []
        norms += ["hidden_norm"] if i == 0 and twin["version"] == 3 else []
        shapes |= {f"{layer}{name}.weight": (WIDTH,) for name in norms}
    if twin["version"] == 1:
        fc = "fusion_fc" if case.first == "transformer." else "fc"
        shapes |= {f"{fc}.weight": (WIDTH, 2 * WIDTH)} | ({f"{fc}.bias": (WIDTH,)} if twin["bias"] else {})
        shapes["embed_tokens.weight"] = (VOCAB, WIDTH)
    else:
        shapes |= {"fc.weight": (WIDTH, states * target_width), "norm.weight": (WIDTH,)}
        shapes["lm_head.weight"] = (drafted, WIDTH)
        shapes |= {f"fc_norm.{i}.weight": (target_width,) for i in range(states) if twin.get("fc_norm")}
        shapes |= {"input_norm.weight": (states * target_width,)} if twin.get("norm_before_fc") else {}
        shapes |= {"embed_tokens.weight": (VOCAB, WIDTH)} if target_width != WIDTH else {}
    tensors = {}
    for name, shape in shapes.items():
        scale, middle = (0.2, 1.0) if "norm" in name else (0.3, 0.0)
        tensors[case.prefix + name] = (middle + scale * rng.normal(size=shape)).astype(np.float32)
    if twin["version"] == 3:
        target_of_u = np.arange(VOCAB) if drafted == VOCAB else np.sort(rng.permutation(VOCAB)[:drafted])
        tensors["d2t"] = target_of_u - np.arange(drafted)
        tensors["t2d"] = np.isin(np.arange(VOCAB), target_of_u)
    return {name: array for name, array in tensors.items() if not name.startswith(case.leave_out or ("?",))}


def specs_of(tensors):
    return [TensorSpec(name, array.dtype, array.shape, lambda array=array: array) for name, array in tensors.items()]


def write_folder(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, specs_of(tensors))
    return folder


def random_target(width=WIDTH, vocab=VOCAB, layers=LAYERS, **options):
    config = DecoderConfig(vocab, width, 20, layers, 4, 2, max_position_embeddings=1024, **options)
    params = init_params(config, jax.random.key(7))
    return decoder_model(config, jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params))


TARGET = random_target()
WIDE_TARGET = random_target(TARGET_WIDTH)


def target_of(case):
    return WIDE_TARGET if "target_hidden_size" in case.twin else TARGET


def tables_of(target, tensors):
    """Returns the embedding that a head uses, and the target's head ``[v, d]``."""
    table = np.asarray(tensors.get("embed_tokens.weight", target.params["embed_tokens"]["weight"]))
    return table, np.asarray(target.params["lm_head"]["kernel"]).T


@pytest.mark.parametrize("case", (CASES | HEADLESS).values(), ids=CASES | HEADLESS)
def test_teacher_forced_logits_equal_the_twin(case, tmp_path):
    """True states at every slot, and then, at the last, one step from the head's own."""
    tensors, target = published(case), target_of(case)
    folder = write_folder(tmp_path / "head", case.config, tensors)
    drafter = open_eagle(f"{folder}{case.options}", target, 3, "float32")
    head, params = drafter.head, drafter.params
    assert head.capture == case.states
    rng, length = np.random.default_rng(1), 13
    tokens = rng.integers(VOCAB, size=(2, length))
    width = case.twin.get("target_hidden_size", WIDTH)
    features = [rng.normal(size=(2, length - 1, width)).astype(np.float32) for _ in case.states]

    @jit
    def forced(params, target, features, tokens_bt):
        cache, last_b = head.init_cache(params, 2, length), jnp.full((2,), length - 1, jnp.int32)
        feed, again = whole_feed(tokens_bt[:, 1:]), whole_feed(tokens_bt[:, :1], last_b)
        states_btd, cache = head.run(params, target, feed, head.fuse(params, features), cache)
        flat = head.logits(params, target, states_btd.reshape(-1, WIDTH))
        again_btd, _ = head.run(params, target, again, states_btd[:, -1:], cache)
        return flat.reshape(2, length - 1, VOCAB), head.logits(params, target, again_btd[:, 0])

    logits, again = forced(params, target, tuple(map(jnp.asarray, features)), jnp.asarray(tokens, jnp.int32))
    table, target_head = tables_of(target, tensors)
    for row in range(2):
        states = reference_eagle.fuse(case.twin, tensors, [x[row].astype(np.float64) for x in features])
        run = reference_eagle.run(case.twin, tensors, table[tokens[row, 1:]].astype(np.float64), states)
        np.testing.assert_allclose(
            logits[row], reference_eagle.logits(case.twin, tensors, run, target_head), atol=1e-4, rtol=1e-4
        )
        chain = reference_eagle.chain(
            case.twin, tensors, table, target_head, [x[row] for x in features], tokens[row], tokens[row, :1]
        )
        np.testing.assert_allclose(again[row], chain[1], atol=1e-4, rtol=1e-4)
    assert np.isfinite(logits).sum() == 2 * (length - 1) * (
        case.twin["draft_vocab_size"] if case.twin["version"] == 3 else VOCAB
    )


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
def test_the_twin_minds_each_flag(flag):
    """Or its agreement would say nothing of them."""
    twin, tensors = CASES[flag].twin, published(CASES[flag])
    rng = np.random.default_rng(3)
    features = [3 * rng.normal(size=(4, WIDTH)) for _ in range(3)]
    chain = (rng.normal(size=(VOCAB, WIDTH)), None, features, [1, 2, 3, 4, 5], [6])
    on, off = (
        reference_eagle.chain(twin | {flag: flagged}, tensors, *chain)[1, tensors["t2d"]] for flagged in (True, False)
    )
    assert np.abs(on - off).max() > 0.1


# Round by round: what is drafted from, with rows of many lengths and drafts rejected.

PROMPTS = [[3], [5, 1], [7, 9, 2, 30, 4], [*range(1, 14)]]


def prefilled(target, drafter, prompts=PROMPTS, **settings):
    prompt_bt, length_b = specjax.pad_prompts(prompts)
    return specjax.prefill(
        target,
        prompt_bt,
        length_b,
        drafter=drafter,
        fixed=True,
        max_new_tokens=24,
        sampling=specjax.Sampling(**settings),
    )


@jit
def true_states(target, tokens_bs):
    """Returns every hidden state of the target over whole rows, the one after the final norm last."""
    indices = (*range(target.num_layers + 1), -1)
    cache = target.init_cache(*tokens_bs.shape)
    return target.forward(target.params, whole_feed(tokens_bs), cache, indices).features


@pytest.mark.parametrize(
    ("name", "drafts"),
    [
        ("EAGLE-1, SafeAILab", 3),
        ("EAGLE-3, SpecForge", 1),
        ("EAGLE-3, SpecForge", 3),
        ("norm_output", 3),
        ("several layers", 3),
        ("target_hidden_size", 3),
    ],
)
def test_each_round_drafts_from_the_targets_true_states(name, drafts, tmp_path):
    """The distribution of every draft of five rounds is the twin's, which starts each round anew from the row's tokens
    and the target's states over them: nothing that a chain left in the cache may count."""
    case = CASES[name]
    tensors, target = published(case), target_of(case)
    drafter = open_eagle(write_folder(tmp_path / "head", case.config, tensors), target, drafts, "float32")
    table, target_head = tables_of(target, tensors)
    state, accepted = prefilled(target, drafter, seed=4), set()
    for _ in range(5):
        features = [np.asarray(x, np.float64) for x in true_states(target, state.tokens_bs)]
        after, proposal = step(target, state, drafter)
        for row, length in enumerate(np.asarray(state.length_b)):
            assert proposal.length_b[row] == (drafts if length > 1 else 0)
            if length > 1:
                tokens = np.asarray(state.tokens_bs)[row, :length]
                chosen = [features[i][row] for i in case.states]
                drafted = np.asarray(proposal.tokens_bg)[row]
                logits = reference_eagle.chain(case.twin, tensors, table, target_head, chosen, tokens, drafted[:-1])
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                np.testing.assert_allclose(
                    proposal.probs_bgv[row], weights / weights.sum(-1, keepdims=True), atol=1e-4, rtol=0
                )
        accepted |= set(np.asarray(after.stats.accepted - state.stats.accepted).tolist())
        state = after
    assert {0, 1} <= accepted, "some drafts should be accepted and some not"


def test_a_window_may_stay_along_the_chain(tmp_path):
    """Then a chain is that of a row of which only the first draft's window is left, by a head without windows."""
    case, window, drafts = CASES["Qwen3's query and key norms"], 4, 3
    sliding = {"layer_types": ["sliding_attention"], "sliding_window": window, "use_sliding_window": True}
    layer = {"model_type": "qwen3", "head_dim": 4, **sliding}
    folder = write_folder(tmp_path / "head", in_speculators(layer=layer), published(case))
    drafter = open_eagle(f"{folder}@window=stays", TARGET, drafts, "float32")
    table, target_head = tables_of(TARGET, published(case))
    state = prefilled(TARGET, drafter, [PROMPTS[3]], seed=4)
    features = [np.asarray(x, np.float64)[0] for x in true_states(TARGET, state.tokens_bs)]
    _, proposal = step(TARGET, state, drafter)
    length, drafted = int(state.length_b[0]), np.asarray(proposal.tokens_bg)[0]
    kept = slice(length - 1 - window, length)  # slot i holds token i + 1 and state i
    chosen = [features[i][kept] for i in case.states]
    tokens = np.asarray(state.tokens_bs)[0, kept]
    logits = reference_eagle.chain(
        case.twin, published(case), table, target_head, chosen, tokens, drafted[: drafts - 1]
    )
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(proposal.probs_bgv[0], wanted, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="window_stays is true and the chain is a loop on the device"):
        drafter.head.at_draft(jnp.asarray(1))
    plain = open_eagle(folder, TARGET, drafts).head
    assert plain.at_draft(2) is plain and not plain.window_stays


# A head that must always be right: the target is the head's own recurrence, fed one token at a time and always from
# true states, with a cache of its own. Nothing of what a drafter does with slots, windows and chains is in it.


def perfect_pair(version, seed=0, drafted=None, width=WIDTH):
    """Returns a head with its parameters, and a target whose states and logits it predicts without error.

    The target's state s at a position is the head's state one slot earlier, of that slot's token and the true s before
    it. Hidden state i is s turned by a matrix of its own, so that ``fc`` can undo just those that the head asks for.
    """
    rng = np.random.default_rng(seed)
    config = DecoderConfig(VOCAB, WIDTH, 20, 1, 4, 2)
    draws = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    if version == 1:
        head = EagleHead(config, (-1,), version=1, fc_bias=True)
    else:
        size = None if drafted is None else len(drafted)
        head = EagleHead(config, (2, 4, 5), 3, width, size, own_embedding=width != WIDTH, norm_before_residual=True)
    params = head.init_params(jax.random.key(seed))
    params = jax.tree.map(lambda x: draws(*x.shape) * 0.3 if x.ndim == 2 else x, params)
    # The newest token, and what other slots hold, must matter.
    attention = params["layers"][0]["self_attn"]
    attention["o_proj"]["kernel"] *= 12 if version == 1 else 4
    attention["q_proj"]["kernel"] *= 0.1 if version == 1 else 2
    turns = jnp.stack([jnp.linalg.qr(draws(width, WIDTH))[0].T for _ in range(LAYERS + 1)])
    if version == 1:
        params["fc"]["kernel"] = params["fc"]["kernel"].at[WIDTH:].multiply(0.1)
    else:
        shares = dict(zip(head.capture, (0.5, 0.3, 0.2), strict=True))
        params["fc"]["kernel"] = jnp.concatenate([share * turns[i].T for i, share in shares.items()])
        if drafted is not None:
            params["draft_of_v"] = jnp.full((VOCAB,), -1, jnp.int32).at[jnp.asarray(drafted)].set(jnp.arange(size))
    table, first, unembedding = draws(VOCAB, width), draws(VOCAB, WIDTH), draws(WIDTH, VOCAB) / 2
    lent = LanguageModel(
        params=(table, unembedding),
        forward=None,
        init_cache=None,
        vocab_size=VOCAB,
        embed=lambda params, tokens_bt: params[0][tokens_bt],
        unembed=lambda params, x_btd: x_btd @ params[1],
    )

    def forward(params, feed, cache, capture=()):
        def one(carry, token_b):
            own, kept_b1sd, position_b = carry
            slot_b = jnp.maximum(position_b - 1, 0)
            before_b1d = jnp.take_along_axis(kept_b1sd[:, 0], slot_b[:, None, None], axis=1)
            state_b1d, own = head.run(params[0], lent, whole_feed(token_b[:, None], slot_b), before_b1d, own)
            state_b1d = jnp.where((position_b == 0)[:, None, None], params[1][token_b][:, None], state_b1d)
            (kept_b1sd,) = update((kept_b1sd,), (state_b1d[:, None],), position_b)
            return (own, kept_b1sd, position_b + 1), (state_b1d[:, 0], head.logits(params[0], lent, state_b1d[:, 0]))

        (*cache, _), (states_tbd, logits_tbv) = jax.lax.scan(one, (*cache, feed.start_b), feed.tokens_bt.T)
        states_btd = states_tbd.swapaxes(0, 1)
        features = tuple(states_btd if i == -1 else states_btd @ params[2][i] for i in capture)
        return Output(logits_tbv.swapaxes(0, 1), features, tuple(cache))

    def init_cache(rows, slots):
        return head.init_cache(params, rows, slots), jnp.zeros((rows, 1, slots, WIDTH))

    target = dataclasses.replace(
        lent,
        params=(params, first, turns, table, unembedding),
        forward=forward,
        init_cache=init_cache,
        num_layers=LAYERS,
        embed=lambda params, tokens_bt: params[3][tokens_bt],
        unembed=lambda params, x_btd: x_btd @ params[4],
    )
    return target, head, params


def acceptance(target, drafter, temperature):
    """Returns the share of drafts that are accepted at each place, over rows of many lengths."""
    prompt_bt, length_b = specjax.pad_prompts([PROMPTS[0], PROMPTS[1], LONG[:14], LONG[5:27], LONG])
    sampling = specjax.Sampling(temperature=temperature, seed=3)
    out = specjax.generate(
        target, prompt_bt, length_b, drafter=drafter, fixed=True, sampling=sampling, max_new_tokens=26
    )
    drafted = np.asarray(out.stats.drafted_at)
    assert (drafted > 0).all()
    return np.asarray(out.stats.accepted_at).sum(0) / drafted.sum(0)


LONG = np.random.default_rng(5).integers(VOCAB, size=30).tolist()
PERFECT = {
    "EAGLE-1": perfect_pair(1),
    "EAGLE-3": perfect_pair(3),
    "EAGLE-3, reduced vocabulary": perfect_pair(3, drafted=(1, 4, 5, 9, 12, 20, 33)),
    "EAGLE-3, wider target": perfect_pair(3, width=TARGET_WIDTH),
}


@pytest.mark.parametrize(
    ("name", "drafts"),
    [(name, drafts) for name in ("EAGLE-1", "EAGLE-3") for drafts in (1, 2, 5)]
    + [("EAGLE-3, reduced vocabulary", 3), ("EAGLE-3, wider target", 3)],
)
def test_a_perfect_head_is_always_accepted(name, drafts):
    target, head, params = PERFECT[name]
    drafter = FeatureDrafter(params, head, drafts)
    for temperature in (0.0, 1.0):
        assert acceptance(target, drafter, temperature).tolist() == [1.0] * drafts


@struct.dataclass
class NotShifted(FeatureDrafter):
    """Slot i takes token i, as an ordinary decoder's would."""

    def observe(self, state, context, event):
        early_bs = jnp.pad(context.tokens_bs, ((0, 0), (1, 0)))[:, :-1]
        return super().observe(state, dataclasses.replace(context, tokens_bs=early_bs), event)


@struct.dataclass
class StatesOneSlotLate(FeatureDrafter):
    """Slot i takes the state at position i - 1."""

    def observe(self, state, context, event):
        if event.drafted:
            late = tuple(jnp.roll(states_btd, 1, axis=1) for states_btd in event.features)
            event = dataclasses.replace(event, features=late)
        return super().observe(state, context, event)


FAULTS = {"not shifted": NotShifted, "states late": StatesOneSlotLate, "no prefill": NoPrefill, "no rewrite": NoRewrite}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", ["EAGLE-1", "EAGLE-3"])
def test_a_fault_in_the_wiring_is_seen(name, fault):
    target, head, params = PERFECT[name]
    found = acceptance(target, fault(params, head, 3), temperature=1.0)
    print(found)
    assert found.min() < 0.95


def test_states_of_the_wrong_layers_are_seen():
    """Those of the other convention, one layer off, and the right ones in another order."""
    target, head, params = PERFECT["EAGLE-3"]
    for capture in ((1, 3, 4), (3, 5, 6), (5, 4, 2)):
        found = acceptance(target, FeatureDrafter(params, dataclasses.replace(head, capture=capture), 3), 1.0)
        print(capture, found)
        assert found.min() < 0.95


# What the head reads of a text.


@pytest.fixture(params=["EAGLE-1, SafeAILab", "several layers"])
def small(request, tmp_path):
    """A target of two layers and a head that reads it."""
    target, case = random_target(layers=2), CASES[request.param]
    config = case.config if case.twin["version"] == 1 else case.config | {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    return target, open_eagle(write_folder(tmp_path / "head", config, published(case)), target, 3, "float32")


def test_a_prompt_in_chunks_is_as_in_one_pass(small):
    assert_chunks_are_as_one_pass(*small)


def test_rounds_without_drafts_are_read_as_a_prompt_is(small):
    assert_rounds_alone_are_as_one_pass(*small)


# The text does not depend on the head.


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    case = CASES["EAGLE-3, SpecForge"]
    return open_eagle(write_folder(tmp_path_factory.mktemp("head"), case.config, published(case)), TARGET, 3, "float32")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_may_ban_all_that_the_head_drafts(drafter, temperature):
    """Coupled draws give one seed one text, with any drafter or none."""
    bias = np.where(np.asarray(drafter.params["draft_of_v"]) >= 0, -np.inf, 0).astype(np.float32)
    settings = {"temperature": temperature, "logit_bias": bias, "top_k": 5}
    prompt_bt, length_b = specjax.pad_prompts(PROMPTS)
    request = {"sampling": specjax.Sampling(**settings), "max_new_tokens": 24, "verify": specjax.verify.coupled}
    out = specjax.generate(TARGET, prompt_bt, length_b, drafter=drafter, fixed=True, **request)
    np.testing.assert_array_equal(out.tokens, specjax.generate(TARGET, prompt_bt, length_b, **request).tokens)
    assert out.stats.accepted.sum() == 0
    assert temperature == 0 or out.stats.drafted.sum() == 0


# Which states, and which tokens.


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, [2, 4, 5]),
        ({"eagle_aux_hidden_state_layer_ids": [1, 4, 8]}, [1, 4, 8]),
        ({"eagle_aux_hidden_state_layer_ids": [8, 1, 4]}, [1, 4, 8]),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 7]}}, [1, 4, 8]),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": None}}, [2, 4, 5]),
        (
            {
                "eagle_aux_hidden_state_layer_ids": [1, 4, 8],
                "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 7]},
            },
            [1, 4, 8],
        ),
    ],
)
def test_both_conventions_become_hidden_state_indices(given, read):
    config = speculators_config(SPECFORGE | given, LAYERS)
    assert config["eagle_aux_hidden_state_layer_ids"] == read
    assert eagle_fields(config)["capture"] == tuple(read)


def test_a_head_says_which_states_it_reads(drafter):
    assert drafter.head.describe() == (
        "EAGLE-3 head, 1 layer of width 16: reads the target's hidden states 2, 3, 7 (0 the embedding output, i the "
        "output of layer i), drafts 11 of 40 tokens"
    )
    assert PERFECT["EAGLE-1"][1].describe() == (
        "EAGLE-1 head, 1 layer of width 16: reads the target's state after the final norm"
    )


def test_the_draft_vocabulary_is_read_as_offsets(drafter):
    d2t = published(CASES["EAGLE-3, SpecForge"])["d2t"]
    draft_of_v = np.asarray(drafter.params["draft_of_v"])
    for u, offset in enumerate(d2t):
        assert draft_of_v[u + offset] == u
    assert (draft_of_v == -1).sum() == VOCAB - DRAFTED
    _, proposal = step(TARGET, prefilled(TARGET, drafter, seed=2), drafter)
    drafted = np.asarray(proposal.tokens_bg)[np.asarray(proposal.length_b) > 0]
    assert drafted.size and (draft_of_v[drafted] >= 0).all()


def test_the_targets_own_embedding_is_not_kept(tmp_path):
    case = CASES["EAGLE-1, SafeAILab"]
    tensors = published(case)
    tensors["embed_tokens.weight"] = np.asarray(TARGET.params["embed_tokens"]["weight"])
    drafter = open_eagle(write_folder(tmp_path, case.config, tensors), TARGET, 3, "float32")
    assert not drafter.head.own_embedding
    assert "embed_tokens" not in drafter.params


def test_a_head_that_is_not_finite_is_refused(tmp_path):
    case = CASES["EAGLE-1, SafeAILab"]
    tensors = published(case)
    next(iter(tensors.values())).flat[-1] = np.nan
    with pytest.raises(ValueError, match="holds NaN or an infinite number in float32") as caught:
        open_eagle(write_folder(tmp_path, case.config, tensors), TARGET, 3, "float32")
    assert str(tmp_path) in str(caught.value)


def test_the_targets_own_output_head_is_not_kept(tmp_path):
    """Of an EAGLE-3 head that drafts the whole vocabulary; any other output head is the draft head's own."""
    case, head = CASES["the whole vocabulary"], np.asarray(TARGET.params["lm_head"]["kernel"]).T
    folder = write_folder(tmp_path / "same", case.config, published(case) | {"lm_head.weight": head})
    drafter = open_eagle(folder, TARGET, 3, "float32")
    assert "lm_head" not in drafter.params and not drafter.head.own_head
    assert "lm_head" in open_eagle(write_folder(tmp_path / "own", case.config, published(case)), TARGET, 3).params


def test_a_tied_head_unembeds_with_its_own_embedding(tmp_path):
    """``tie_word_embeddings`` counts only without a stored output head: configs copy it from their targets."""
    case, table = HEADLESS["the target's output head"], np.random.default_rng(9).normal(size=(VOCAB, WIDTH))
    tensors = published(case) | {"embed_tokens.weight": table.astype(np.float32)}
    folder = write_folder(tmp_path / "tied", case.config | {"tie_word_embeddings": True}, tensors)
    params = open_eagle(folder, TARGET, 3, "float32").params
    np.testing.assert_array_equal(params["lm_head"]["kernel"].T, params["embed_tokens"]["weight"])
    case = CASES["EAGLE-3, SpecForge"]
    folder = write_folder(tmp_path / "own", case.config | {"tie_word_embeddings": True}, published(case))
    kernel = open_eagle(folder, TARGET, 3, "float32").params["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel.T, published(case)["lm_head.weight"])


def test_a_head_may_have_the_targets_rotary_positions(tmp_path):
    case, config = CASES["EAGLE-1, SafeAILab"], LAYER | {"num_hidden_layers": LAYERS, "rope_theta": 500000.0}
    folder = write_folder(tmp_path, case.config, published(case))
    target = specjax.Opened(tmp_path, TARGET, config=config)
    plain, head = (open_eagle(f"{folder}{option}", target, 3).head for option in ("", "@rope=target"))
    (layer,) = head.decoder.layers
    assert layer.rope == decoder_config(config).each_layer[0].rope != plain.decoder.layers[0].rope
    assert dataclasses.replace(head, decoder=plain.decoder) == plain
    with pytest.raises(ValueError, match=r"rope=target needs the target's config; give the result of specjax\.open"):
        open_eagle(f"{folder}@rope=target", TARGET, 3)
    wide = dataclasses.replace(target, config=config | {"head_dim": 8})
    with pytest.raises(ValueError, match="for attention heads 4 wide; leave the option out"):
        open_eagle(f"{folder}@rope=target", wide, 3)


@pytest.mark.parametrize(
    ("flag", "option", "norms"),
    [
        (None, "", (False, True)),
        (False, "", (False, True)),
        (True, "", (True, True)),
        (None, "@norm_output=logits", (False, True)),
        (False, "@norm_output=logits", (False, False)),
        (True, "@norm_output=logits", (False, True)),
    ],
)
def test_norm_output_has_two_meanings(flag, option, norms, tmp_path):
    """Whether the next draft reads normed states, and, in SpecForge before EAGLE-3.1, whether the logits do."""
    case = CASES["EAGLE-3, SpecForge"]
    config = case.config | ({} if flag is None else {"norm_output": flag})
    head = open_eagle(f"{write_folder(tmp_path, config, published(case))}{option}", TARGET, 3).head
    assert (head.norm_output, head.norm_logits) == norms


@pytest.mark.parametrize("name", ["EAGLE-1, speculators", "EAGLE-3, SpecForge", "EAGLE-3, speculators"])
def test_left_over_keys_are_no_surprise(name, caplog):
    eagle_fields(speculators_config(CASES[name].config, LAYERS))
    assert not caplog.records


def test_an_output_head_in_an_eagle_1_folder_must_be_the_targets(tmp_path):
    case = CASES["EAGLE-1, SafeAILab"]
    head = np.asarray(TARGET.params["lm_head"]["kernel"]).T.copy()
    folder = write_folder(tmp_path / "same", case.config, published(case) | {"lm_head.weight": head})
    assert "lm_head" not in open_eagle(folder, TARGET, 3, "float32").params
    open_eagle(folder, specjax.quantize(TARGET, "int8"), 3, "float32")
    head[-1, 0] += 1
    folder = write_folder(tmp_path / "other", case.config, published(case) | {"lm_head.weight": head})
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from the target's output head"):
        open_eagle(folder, TARGET, 3, "float32")


# Out again.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_back_bit_for_bit(name, dtype, tmp_path):
    case, target = CASES[name], target_of(CASES[name])
    first = open_eagle(write_folder(tmp_path / "in", case.config, published(case)), target, 3, dtype)
    if name == "EAGLE-1 with two layers":
        with pytest.raises(ValueError, match="EAGLE-1 heads have one layer"):
            write_eagle(tmp_path / "out", case.config, first.params, target)
        assert not (tmp_path / "out").exists()
        return
    write_eagle(tmp_path / "out", case.config, first.params, target, target_name="some/target")
    again = open_eagle(tmp_path / "out", target, 3, dtype)
    assert again.head == first.head
    assert jax.tree.structure(again) == jax.tree.structure(first)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kind = "eagle" if case.twin["version"] == 1 else "eagle3"
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == kind
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    if kind == "eagle3":
        assert config["eagle_aux_hidden_state_layer_ids"] == list(case.states)
        held = open_tensors(tmp_path / "out")
        assert ("d2t" in held) == ("t2d" in held) == (case.twin["draft_vocab_size"] < VOCAB)
        for name in ("d2t", "t2d"):
            if name in held:
                whole = published(dataclasses.replace(case, leave_out=()))
                np.testing.assert_array_equal(held[name].read(), whole[name])


def test_wrong_parameters_are_not_written(drafter, tmp_path):
    config = CASES["EAGLE-3, SpecForge"].config
    faults = {
        "lm_head": ({k: v for k, v in drafter.params.items() if k != "lm_head"}, r"'lm_head'.*missing"),
        "draft_of_v": (
            drafter.params | {"draft_of_v": jnp.zeros((VOCAB,), jnp.int32)},
            "each draft id from 0 to 10 once",
        ),
        "no draft_of_v": ({k: v for k, v in drafter.params.items() if k != "draft_of_v"}, r"'draft_of_v'.*missing"),
        "norm": (drafter.params | {"norm": {"weight": jnp.ones(3)}}, r"'norm'.* is \(3,\)"),
    }
    for params, message in faults.values():
        with pytest.raises(ValueError, match=message):
            write_eagle(tmp_path / "out", config, params, TARGET)
    assert list(tmp_path.iterdir()) == []


# Bad input: told before anything compiles, with the name of what is wrong.

SPECULATORS = CASES["EAGLE-3, speculators"]
FORGE = CASES["EAGLE-3, SpecForge"]
BAD_CONFIGS = {
    "an unknown flag": (SPECULATORS, {"norm_sideways": True}, r"config.json.*\{'norm_sideways': True\}"),
    "an unknown flag beside the layer's keys": (FORGE, {"use_aux_norm": True}, r"\{'use_aux_norm': True\}"),
    "an unknown flag in eagle_config": (FORGE, {"eagle_config": {"twist": 1}}, r"eagle_config keys \{'twist': 1\}"),
    "an unknown key of the layer": (
        SPECULATORS,
        {"transformer_layer_config": LAYER | {"qkv_bias": True}},
        r"\{'qkv_bias': True\}",
    ),
    "a flag that is not computed": (
        FORGE,
        {"eagle_config": {"use_mtp_layernorm": True}},
        "'use_mtp_layernorm' is True",
    ),
    "a flag of another type": (SPECULATORS, {"norm_output": "yes"}, "norm_output must be true or false, got 'yes'"),
    "norms of EAGLE-1": (CASES["EAGLE-1, speculators"], {"layernorms": True}, "'layernorms' is True"),
    "two kinds of norm": (
        SPECULATORS,
        {"norm_before_fc": True, "fc_norm": True},
        "norm_before_fc and fc_norm are both",
    ),
    "an ambiguous default": (SPECULATORS, {"norm_before_residual": "remove"}, "norm_before_residual is missing"),
    "a flag said twice": (
        FORGE,
        {"norm_output": True, "eagle_config": {"norm_output": False}},
        "norm_output is True, but False in eagle_config",
    ),
    "both conventions, differing": (
        FORGE,
        {
            "eagle_aux_hidden_state_layer_ids": [1, 2, 6],
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 6]},
        },
        r"inputs of layers \[2, 3, 7\]",
    ),
    "a state after the last layer": (
        SPECULATORS,
        {"eagle_aux_hidden_state_layer_ids": [2, 4, 9]},
        r"hidden states \(2, 4, 9\).*8 layers",
    ),
    "a state before the first": (SPECULATORS, {"eagle_aux_hidden_state_layer_ids": [-1, 4, 5]}, "at least 0, got -1"),
    "a state twice": (
        SPECULATORS,
        {"eagle_aux_hidden_state_layer_ids": [2, 4, 4]},
        r"\(2, 4, 4\); give different ones",
    ),
    "no states": (SPECULATORS, {"eagle_aux_hidden_state_layer_ids": []}, r"\(\); give different ones"),
    "states that are no list": (SPECULATORS, {"eagle_aux_hidden_state_layer_ids": 3}, "is 3; it must be a list"),
    "another number of states": (
        SPECULATORS,
        {"eagle_aux_hidden_state_layer_ids": [2, 4]},
        r"'fc.weight' is \(16, 48\)",
    ),
    "another width": (
        SPECULATORS,
        {"target_hidden_size": TARGET_WIDTH},
        "16 wide and the target's states 24: only an EAGLE-3 head with an embedding",
    ),
    "another vocabulary": (
        SPECULATORS,
        {"transformer_layer_config": LAYER | {"vocab_size": VOCAB + 1}},
        r"'t2d' is bool \(40,\); it must be booleans \(41,\)",
    ),
    "a draft vocabulary that is too large": (SPECULATORS, {"draft_vocab_size": VOCAB + 1}, "'d2t' is int64"),
    "another draft vocabulary": (SPECULATORS, {"draft_vocab_size": DRAFTED + 1}, r"'d2t' is int64 \(11,\)"),
    "another kind of head": (SPECULATORS, {"speculators_model_type": "mtp"}, "'mtp', no EAGLE head"),
    "another family": (FORGE, {"architectures": ["MedusaModel"]}, r"\['MedusaModel'\], no EAGLE head"),
    "a family that is no name": (FORGE, {"architectures": [[1]]}, r"\[\[1\]\], no EAGLE head"),
    "a size that is no number": (FORGE, {"draft_vocab_size": float("nan")}, "draft_vocab_size must be an integer"),
    "another family of layers": (
        SPECULATORS,
        {"transformer_layer_config": LAYER | {"model_type": "gpt_oss"}},
        "model_type 'gpt_oss'",
    ),
    "layers that are no object": (SPECULATORS, {"transformer_layer_config": [1]}, "model_type None"),
    "eagle_config that is no object": (FORGE, {"eagle_config": [1]}, r"eagle_config is \[1\]"),
}


@pytest.mark.parametrize(("case", "change", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs_are_named(case, change, message, tmp_path):
    config = {key: value for key, value in (case.config | change).items() if value != "remove"}
    folder = write_folder(tmp_path, config, published(case))
    with compilations() as names, pytest.raises(ValueError, match=message) as error:
        open_eagle(folder, TARGET, 3, "float32")
    assert str(tmp_path) in str(error.value)
    assert names == []


def renamed(old, new):
    return lambda tensors: {new if name == old else name: array for name, array in tensors.items()}


def changed(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


def without(name):
    return lambda tensors: {key: array for key, array in tensors.items() if key != name}


BAD_TENSORS = {
    "missing d2t": (without("d2t"), "'d2t' is missing, which says which 11 of the 40 tokens"),
    "a missing tensor": (
        without("layers.0.hidden_norm.weight"),
        "1 tensors are missing, such as 'layers.0.hidden_norm",
    ),
    "an unknown tensor": (renamed("norm.weight", "norms.weight"), "1 tensors are missing, such as 'norm.weight'"),
    "one more": (lambda t: t | {"lm_head.bias": np.zeros(DRAFTED, np.float32)}, "unknown, such as 'lm_head.bias'"),
    "a norm that no flag asks for": (
        lambda t: t | {"fc_norm.0.weight": np.ones(WIDTH, np.float32)},
        "unknown, such as 'fc_norm.0.weight'",
    ),
    "another shape": (changed("fc.weight", lambda x: x[:, :32]), r"'fc.weight' is \(16, 32\); config.json asks"),
    "another dtype": (changed("norm.weight", lambda x: x.astype(np.int32)), "'norm.weight' has dtype int32"),
    "one name twice": (
        lambda t: t | {"midlayer.hidden_norm.weight": np.ones(WIDTH, np.float32)},
        "'midlayer.hidden_norm.weight' are both 'layers.0.hidden_norm.weight'",
    ),
    "ids in place of offsets": (
        changed("d2t", lambda x: x + np.arange(DRAFTED)),
        "'d2t' leads.*must hold offsets|'d2t' and 't2d' differ.*must hold offsets",
    ),
    "one token twice": (
        changed("d2t", lambda x: np.r_[x[0], x[0] - 1, x[2:]]),
        "'d2t' leads two draft ids to one token",
    ),
    "a token below all": (changed("d2t", lambda x: np.r_[-1, x[1:]]), "draft id 0 to token -1 of the target's 40"),
    "offsets that are no integers": (changed("d2t", lambda x: x.astype(np.float32)), "'d2t' is float32"),
    "t2d of other tokens": (changed("t2d", lambda x: ~x), "'d2t' and 't2d' differ on 40 tokens, such as 0"),
}


@pytest.mark.parametrize(("fault", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors_are_named(fault, message, tmp_path):
    folder = write_folder(tmp_path, SPECULATORS.config, fault(published(SPECULATORS)))
    with pytest.raises(ValueError, match=message) as error:
        open_eagle(folder, TARGET, 3, "float32")
    assert str(tmp_path) in str(error.value)


BAD_TARGETS = {
    "width": (WIDE_TARGET, "states 16 wide and the target's are 24"),
    "vocabulary": (random_target(vocab=VOCAB + 2), "for 40 tokens and the target has 42"),
    "too few layers": (random_target(layers=6), r"its default for 6 layers, \[2, 3, 3\], is not three states"),
    "no layers": (dataclasses.replace(TARGET, num_layers=None), "set LanguageModel.num_layers"),
    "no embedding": (dataclasses.replace(TARGET, embed=None), "the target has no embed, which the drafter needs"),
}


@pytest.mark.parametrize(("target", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_targets_that_do_not_fit_are_refused(target, message, tmp_path):
    folder = write_folder(tmp_path, SPECULATORS.config, published(SPECULATORS))
    with pytest.raises(ValueError, match=message):
        open_eagle(folder, target, 3, "float32")


@pytest.mark.parametrize("name", ["embed", "unembed"])
def test_an_eagle_1_head_made_by_hand_needs_what_the_target_lends(name):
    """Also one with an embedding, which uses the target's head in the dtype that the target embeds in."""
    head = EagleHead(DecoderConfig(VOCAB, WIDTH, 20, 1, 4, 2), (-1,), version=1, own_embedding=True)
    drafter = FeatureDrafter(head.init_params(jax.random.key(0)), head, 2)
    prompt, length = specjax.pad_prompts([[1]])
    with pytest.raises(ValueError, match=rf"the target has no {name}, which the drafter needs; give LanguageModel\("):
        specjax.generate(
            dataclasses.replace(TARGET, **{name: None}), prompt, length, drafter=drafter, fixed=True, max_new_tokens=2
        )


def test_other_bad_input(tmp_path):
    folder = write_folder(tmp_path / "head", SPECULATORS.config, published(SPECULATORS))
    with pytest.raises(ValueError, match="num_draft must be an integer of at least 1, got 0"):
        open_eagle(folder, TARGET, 0)
    with pytest.raises(ValueError, match="dtype is int8"):
        open_eagle(folder, TARGET, 3, "int8")
    with pytest.raises(ValueError, match=r"none names .*, which is not a folder"):
        open_eagle(tmp_path / "none", TARGET)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are never opened"):
        open_eagle(folder, TARGET)


def test_an_ordinary_model_is_no_head(tmp_path):
    """Its config.json could be an EAGLE-1 head's; its tensors are not."""
    tensors = {"model.norm.weight": np.ones(WIDTH, np.float32), "lm_head.weight": np.ones((VOCAB, WIDTH), np.float32)}
    with pytest.raises(ValueError, match=r"tensors are missing, such as 'fc\.bias'"):
        open_eagle(write_folder(tmp_path, EAGLE_1, tensors), TARGET)
