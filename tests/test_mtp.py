"""Multi-token prediction: published layouts against a NumPy twin and transformers; heads that must always be right."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_mtp
from draft_heads import open_mtp, write_mtp
from flax import struct
from heads_observing import NoPrefill, NoRewrite, assert_chunks_are_as_one_pass, assert_rounds_alone_are_as_one_pass
from jitted import jit
from reference_model import rms_norm

import specjax
from specjax.drafters.feature import FeatureDrafter
from specjax.drafters.mtp import MTPConfig, MTPDrafter, MTPHead, abstract_mtp_params, init_mtp_params
from specjax.hf.config import read_keys
from specjax.hf.families import sources
from specjax.hf.mtp import mtp_layout
from specjax.hf.safetensors import TensorSpec, open_tensors, write_tensors
from specjax.hf.weights import tensors_of
from specjax.transformer.config import DecoderConfig, LayerConfig, Rope
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

# The published layouts.

VOCAB, WIDTH, LAYERS = 37, 24, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 36,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
MOE = {"num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True}
CONFIGS = {
    "deepseek_v3": dict(
        model_type="deepseek_v3",
        num_nextn_predict_layers=2,
        **SIZES | {"num_key_value_heads": 4},
        **MOE,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.7,
        kv_lora_rank=12,
        q_lora_rank=14,
        qk_rope_head_dim=6,
        qk_nope_head_dim=10,
        v_head_dim=9,
    ),
    "glm4_moe": dict(
        model_type="glm4_moe",
        num_nextn_predict_layers=1,
        **SIZES,
        **MOE,
        head_dim=8,
        partial_rotary_factor=0.5,
        attention_bias=True,
        use_qk_norm=True,
        n_routed_experts=8,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.3,
    ),
    "qwen3_next": dict(
        model_type="qwen3_next",
        **SIZES,
        **MOE,
        head_dim=8,
        partial_rotary_factor=0.25,
        full_attention_interval=2,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        num_experts=8,
        shared_expert_intermediate_size=10,
    ),
    "mimo": dict(
        model_type="mimo",
        architectures=["MiMoForCausalLM"],
        num_nextn_predict_layers=1,
        **SIZES,
        attention_bias=True,
        use_sliding_window=False,
        max_window_layers=28,
        sliding_window=32,
    ),
}


def mlp(prefix, inner):
    sides = {"gate_proj": (inner, WIDTH), "up_proj": (inner, WIDTH), "down_proj": (WIDTH, inner)}
    return {f"{prefix}{name}.weight": shape for name, shape in sides.items()}


def grouped(query_width, biases=True, norms=True):
    shapes = {"q_proj": (query_width, WIDTH), "o_proj": (WIDTH, 32), "k_proj": (16, WIDTH), "v_proj": (16, WIDTH)}
    tensors = {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {f"self_attn.{name}_proj.bias": shapes[f"{name}_proj"][:1] for name in "qkv" if biases}
    return tensors | {f"self_attn.{name}_norm.weight": (8,) for name in "qk" if norms}


def published(kind):
    """Shapes of the published tensors, by name."""
    layer_norms = {"input_layernorm.weight": (WIDTH,), "post_attention_layernorm.weight": (WIDTH,)}
    moe = {"mlp.gate.weight": (8, WIDTH)}
    for e in range(8):
        moe |= mlp(f"mlp.experts.{e}.", 12)
    corrected = {"mlp.gate.e_score_correction_bias": (8,)}
    latent = {
        "self_attn.q_a_proj.weight": (14, WIDTH),
        "self_attn.q_a_layernorm.weight": (14,),
        "self_attn.q_b_proj.weight": (4 * 16, 14),
        "self_attn.kv_a_proj_with_mqa.weight": (12 + 6, WIDTH),
        "self_attn.kv_a_layernorm.weight": (12,),
        "self_attn.kv_b_proj.weight": (4 * (10 + 9), 12),
        "self_attn.o_proj.weight": (WIDTH, 4 * 9),
    }
    small = {
        "self_attn.q_proj.weight": (24, WIDTH),
        "self_attn.q_proj.bias": (24,),
        "self_attn.o_proj.weight": (WIDTH, 24),
        **{
            f"self_attn.{name}_proj.{part}": (12, WIDTH)[: 1 + (part == "weight")]
            for name in "kv"
            for part in ("weight", "bias")
        },
    }
    layers = {
        "deepseek_v3": latent | moe | corrected | mlp("mlp.shared_experts.", 12),
        "glm4_moe": grouped(32) | moe | corrected | mlp("mlp.shared_experts.", 24),
        "qwen3_next": grouped(64, biases=False)
        | moe
        | mlp("mlp.shared_expert.", 10)
        | {"mlp.shared_expert_gate.weight": (1, WIDTH)},
        "mimo": small | mlp("mlp.", 36),
    }
    shapes = {}
    for k in range(CONFIGS[kind].get("num_nextn_predict_layers", 1)):
        numbers = {"n": LAYERS + k, "k": k}
        layer, parts, *norms = reference_mtp.NAMES[kind]
        shapes |= {layer.format(**numbers) + name: shape for name, shape in (layers[kind] | layer_norms).items()}
        for name in norms:
            wide = name in ("eh_proj", "fc", "input_proj")
            shapes[f"{parts.format(**numbers)}{name}.weight"] = (WIDTH, 2 * WIDTH) if wide else (WIDTH,)
    return shapes


def random_tensors(kind, seed=0):
    """Weights under which every part matters: norms far from their neutral value."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in published(kind).items():
        noise = rng.normal(size=shape)
        if "e_score_correction_bias" in name:
            value = 0.2 * noise
        elif len(shape) == 2:
            value = noise / shape[1] ** 0.5
        else:
            value = 0.3 * noise + (not name.endswith("bias") and kind != "qwen3_next")
        tensors[name] = value.astype(np.float32)
    return tensors


def write_folder(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(
        folder, [TensorSpec(n, x.dtype, x.shape, functools.partial(np.asarray, x)) for n, x in tensors.items()]
    )
    return folder


TARGET = DecoderConfig(VOCAB, WIDTH, 36, LAYERS, 4, max_position_embeddings=64)


def make_target(seed=0, config=TARGET):
    params = jax.tree.map(lambda x: x * 20 if x.ndim == 2 else x, init_params(config, jax.random.key(seed)))
    return decoder_model(config, params)


LENGTH = 13


def row(seed=1):
    """A row's tokens and states of the width of the target's; the twin and both libraries get the same."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB, size=LENGTH), rng.normal(size=(LENGTH, WIDTH)).astype(np.float32)


def embeddings(target):
    return np.asarray(target.params["embed_tokens"]["weight"])


def twin_logits(config, tensors, target, tokens, states, zero_first=False):
    """Logits of each module, teacher-forced: of module k (from 0) at the slots 0 .. t - k - 2."""
    found, head = [], np.asarray(target.params["lm_head"]["kernel"], np.float64)
    for k in range(config.get("num_nextn_predict_layers", 1)):
        slots = len(tokens) - k - 1
        embedded = embeddings(target)[tokens[k + 1 :]].astype(np.float64)
        if zero_first:
            embedded[0] = 0
        states = reference_mtp.module(config, tensors, k, embedded, states[:slots])
        found.append(states @ head)
    return found


@jit(static_argnums=0)
def run_head(head, params, target, feed, states_btd, cache):
    states_btd, cache = head.run(params, target, feed, states_btd, cache)
    return jax.vmap(functools.partial(head.logits, params, target), 1, 1)(states_btd), states_btd, cache


def head_logits(drafter, target, tokens, states, blocks):
    """Logits of the head of a FeatureDrafter at the slots 0 .. t - 2, fed in blocks at offsets of their own."""
    cache, found, start = drafter.head.init_cache(drafter.params, 1, LENGTH), [], 0
    while start < len(tokens) - 1:
        width = min(next(blocks), len(tokens) - 1 - start)
        fed = jnp.asarray(tokens[None, start + 1 : start + 1 + width], jnp.int32)
        given = jnp.asarray(states[None, start : start + width])
        feed = whole_feed(fed, jnp.asarray([start], jnp.int32))
        logits, _, cache = run_head(drafter.head, drafter.params, target, feed, given, cache)
        found.append(np.asarray(logits[0]))
        start += width
    return np.concatenate(found)


def repeated(width):
    while True:
        yield width


@pytest.fixture(scope="module", params=CONFIGS)
def layout(request, tmp_path_factory):
    tensors = random_tensors(request.param)
    return request.param, tensors, write_folder(tmp_path_factory.mktemp("head"), CONFIGS[request.param], tensors)


@pytest.mark.parametrize("zero_first", [False, True])
def test_logits_equal_the_twin(layout, zero_first):
    """Teacher-forced, over the whole row and in blocks of 3."""
    kind, tensors, folder = layout
    target, (tokens, states) = make_target(), row()
    drafter = open_mtp(folder, target, 1, "float32", chained=True, zero_first=zero_first)
    expected = twin_logits(CONFIGS[kind], tensors, target, tokens, states, zero_first)[0]
    assert 0.1 < np.std(expected) < 30
    for width in (LENGTH, 3):
        got = head_logits(drafter, target, tokens, states, repeated(width))
        worst = np.abs(got - expected).max()
        print(f"{kind}, blocks of {width}: largest difference {worst}")
        assert worst <= 1e-4


def test_states_before_the_last_norm_give_the_same_logits(tmp_path):
    """The option ``chain_states=unnormed`` changes only what the next draft reads."""
    kind, tensors = "glm4_moe", random_tensors("glm4_moe")
    folder, target, (tokens, states) = write_folder(tmp_path, CONFIGS[kind], tensors), make_target(), row()
    feed, given = whole_feed(jnp.asarray(tokens[None, 1:], jnp.int32)), jnp.asarray(states[None, : LENGTH - 1])
    runs = []
    for option in ("", "@chain_states=unnormed"):
        drafter = open_mtp(f"{folder}@chained{option}", target, 1, "float32")
        cache = drafter.head.init_cache(drafter.params, 1, LENGTH)
        runs.append(run_head(drafter.head, drafter.params, target, feed, given, cache)[:2])
    (logits, normed), (again, unnormed) = runs
    np.testing.assert_allclose(logits, again, atol=1e-5)
    assert np.abs(normed - unnormed).max() > 0.1
    weight = tensors[f"model.layers.{LAYERS}.shared_head.norm.weight"]
    np.testing.assert_allclose(rms_norm(np.asarray(unnormed[0], np.float64), weight, 1e-6), normed[0], atol=1e-4)


def modules_logits(drafter, target, tokens, states):
    """Logits of each module of an MTPDrafter, teacher-forced."""
    found, states_btd = [], jnp.asarray(states[None])
    for k in range(drafter.num_draft):
        head = MTPHead(dataclasses.replace(drafter.config, decoder=one_layer(drafter.config.decoder, k)))
        fed = jnp.asarray(tokens[None, k + 1 :], jnp.int32)
        states_btd = states_btd[:, : fed.shape[1]]
        params = {0: drafter.params[k]}
        logits, states_btd, _ = run_head(head, params, target, whole_feed(fed), states_btd, None)
        found.append(np.asarray(logits[0]))
    return found


def one_layer(decoder, k):
    return dataclasses.replace(decoder, num_hidden_layers=1, layers=decoder.layers[k : k + 1])


def test_second_module_equals_the_twin(tmp_path):
    tensors = random_tensors("deepseek_v3", 3)
    target, (tokens, states) = make_target(), row()
    folder = write_folder(tmp_path / "head", CONFIGS["deepseek_v3"], tensors)
    drafter = open_mtp(folder, target, 2, "float32")
    assert isinstance(drafter, MTPDrafter)
    expected = twin_logits(CONFIGS["deepseek_v3"], tensors, target, tokens, states)
    for got, wanted in zip(modules_logits(drafter, target, tokens, states), expected, strict=True):
        assert np.abs(got - wanted).max() <= 1e-4


def test_equals_transformers(layout):
    """``MtpModel``, which reads the folder by names of its own; of MiMo, which it does not know, by hand."""
    kind, tensors, folder = layout
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling, "MtpModel"):
        pytest.skip("this transformers has no MtpModel")
    name = {"deepseek_v3": "DeepseekV3", "glm4_moe": "Glm4Moe", "qwen3_next": "Qwen3Next", "mimo": "Qwen2"}[kind]
    raw = {key: value for key, value in CONFIGS[kind].items() if key not in ("model_type", "architectures")}
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    config = getattr(transformers, f"{name}Config")(**raw, attn_implementation="eager")
    if kind in ("mimo", "qwen3_next"):
        config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
        config.mtp_hidden_states_first = kind == "mimo"
    config.name_or_path, config.dtype = str(folder), torch.float32
    main = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    target, (tokens, states) = make_target(), row()
    main.get_input_embeddings().weight.data = torch.tensor(embeddings(target))
    main.lm_head.weight.data = torch.tensor(np.asarray(target.params["lm_head"]["kernel"]).T.copy())
    if kind == "mimo":
        theirs = modeling.MtpModel(main, 1)
        ours = {
            "token_layernorm": "enorm",
            "hidden_layernorm": "hnorm",
            "input_proj": "eh_proj",
            "final_layernorm": "post_norm",
        }
        named = {}
        for key, value in tensors.items():
            part = key.removeprefix("model.mtp_layers.0.")
            first = part.split(".")[0]
            named["layers.0." + (part.replace(first, ours[first]) if first in ours else "mtp_block." + part)] = value
        shared = theirs.load_state_dict({key: torch.tensor(value) for key, value in named.items()}, strict=False)
        assert not shared.unexpected_keys and set(shared.missing_keys) == {"embed_tokens.weight", "shared_head.weight"}
    else:
        if kind != "qwen3_next":  # it knows the numbers of published models' layers only
            main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[2-9]\."]
        theirs = modeling.MtpModel.from_pretrained(main)
    theirs = theirs.eval()
    chosen = open_mtp(folder, target, 1, "float32", chained=True)
    found = [head_logits(chosen, target, tokens, states, repeated(LENGTH))]
    if config.num_mtp_layers == 2:
        found = modules_logits(open_mtp(folder, target, 2, "float32"), target, tokens, states)
    hidden = torch.tensor(states[None])
    for k, got in enumerate(found):
        with torch.no_grad():
            fed = torch.tensor(tokens[None, k + 1 :])
            at = torch.arange(fed.shape[1])[None]
            cache = transformers.cache_utils.MtpCache(config=config.get_mtp_config())
            hidden = theirs.forward_layer(k, hidden[:, : fed.shape[1]], at, cache, input_ids=fed)
            expected = theirs._project_to_logits(hidden)[0].numpy()
        print(f"{kind}, module {k}: largest difference {np.abs(got - expected).max()}")
        assert np.abs(got - expected).max() <= 1e-4


# Heads that must always be right.
#
# The target's next token depends on the last one, on one further back, and on a secret that only its state tells, D + 1
# tokens back. One attention head of a module looks up the secret, the other the token. A state that a module made
# holds another secret than the target's state of that slot. So a module is right everywhere if, and only if, every
# slot that it reads was written at its place, from the token of its place and the target's own state.

BASE, DISTANCE, BACK = 6, 6, 2  # tokens in the vocabulary; D; how far back the token is
ONE_HOTS = ("last", "secret", "looked_up", "token_back")
PARTS = {name: slice(i * BASE, (i + 1) * BASE) for i, name in enumerate(ONE_HOTS)}
ONE, D_MODEL, HEAD_WIDTH = 4 * BASE, 4 * BASE + 1, 8  # the last entry is always 1
FREQUENCIES = (2.1, 1.3, 0.9, 0.57)
NEVER = 10**6


def target_embed(params, tokens_bt):
    return jax.nn.one_hot(tokens_bt, D_MODEL)


def target_unembed(params, x_btd):
    return x_btd @ params["head"]


def target_init_cache(rows, slots):
    return jnp.zeros((rows, slots), jnp.int32)


def target_forward(params, feed, cache, capture=()):
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    cache, position_bt = write(cache, feed.tokens_bt, feed.start_b), feed.position_bt

    def token(back):
        return jnp.take_along_axis(cache, jnp.maximum(position_bt - back, 0), axis=1)

    def secret(back):
        return (3 * token(back) + 5 * token(back + 1) + position_bt - back) % BASE

    logits = params["last"][token(0)] + params["token_back"][token(BACK)] + params["looked_up"][secret(DISTANCE + 1)]
    surprise_bt1 = ((position_bt + 1) % params["period"] == 0)[:, :, None]
    logits = jnp.where(surprise_bt1, jnp.roll(logits, 1, axis=-1), logits)
    one_hots = [jax.nn.one_hot(x, BASE) for x in (token(3), secret(0), token(4), token(5))]
    state = jnp.concatenate([*one_hots, jnp.ones((*position_bt.shape, 1))], axis=-1)
    return specjax.Output(logits, (state,) * len(capture), cache)


def knowable_target(period=NEVER):
    """A target whose tokens at multiples of ``period`` nobody can foresee."""
    rng = np.random.default_rng(5)
    tables = {
        name: rng.normal(size=(BASE, BASE)).astype(np.float32) * 2 for name in ("last", "looked_up", "token_back")
    }
    head = np.zeros((D_MODEL, BASE), np.float32)
    for name, table in tables.items():
        head[PARTS[name]] = table / np.sqrt(D_MODEL / 5)  # of five entries of one size after an RMS norm
    params = jax.tree.map(jnp.asarray, {**tables, "head": head, "period": np.int32(period)})
    return specjax.LanguageModel(
        params, target_forward, target_init_cache, BASE, embed=target_embed, unembed=target_unembed
    )


def perfect_modules(count):
    """Config and parameters of modules that compute the target's law; a chain uses the first."""
    layer = LayerConfig(rope=Rope(FREQUENCIES))
    decoder = DecoderConfig(BASE, D_MODEL, 4, count, 2, head_dim=HEAD_WIDTH, layers=(layer,) * count)
    config = MTPConfig(decoder)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_mtp_params(config))
    for k in range(count):
        module = params[k]
        for norm in (module, module["layer"]):
            for name, part in norm.items():
                if name.endswith("norm"):
                    part["weight"] += 1
        attention, joined = module["layer"]["self_attn"], module["eh_proj"]["kernel"]
        joined[PARTS["last"], PARTS["last"]] = np.eye(BASE) / np.sqrt(D_MODEL)
        joined[PARTS["last"], ONE] = 1 / np.sqrt(D_MODEL)
        hidden = slice(D_MODEL + PARTS["secret"].start, D_MODEL + PARTS["secret"].stop)
        joined[hidden, PARTS["secret"]] = np.eye(BASE) * np.sqrt(5 / D_MODEL)
        unit = np.sqrt(3 / D_MODEL)  # of three entries of one size after the layer's norm
        for n, (part, to, distance) in enumerate([("secret", "looked_up", DISTANCE - k), ("last", "token_back", BACK)]):
            at = n * HEAD_WIDTH
            angles = np.multiply(FREQUENCIES, distance)
            attention["q_proj"]["kernel"][ONE, at : at + HEAD_WIDTH] = (
                1000 * unit * np.append(np.cos(angles), -np.sin(angles))
            )
            attention["k_proj"]["kernel"][ONE, at : at + HEAD_WIDTH // 2] = unit
            attention["v_proj"]["kernel"][PARTS[part], at : at + BASE] = np.eye(BASE) * unit
            attention["o_proj"]["kernel"][at : at + BASE, PARTS[to]] = np.eye(BASE)
    return config, jax.tree.map(jnp.asarray, params)


def chain(g, drafter=FeatureDrafter, head=MTPHead):
    config, params = perfect_modules(1)
    return drafter(params, head(config), g)


def modules(g, drafter=MTPDrafter):
    config, params = perfect_modules(g)
    return drafter(params, config, g)


PROMPTS = [np.random.default_rng(length).integers(0, BASE, size=length) for length in (9, 12, 17)]
NEW = 30


def generate(target, drafter, prompts=PROMPTS, temperature=0.0, **options):
    prompt_bt, length_b = specjax.pad_prompts(prompts)
    sampling = specjax.Sampling(temperature=temperature, seed=np.arange(len(prompts)))
    options = {"max_new_tokens": NEW, "slots": 64} | options
    return specjax.generate(target, prompt_bt, length_b, drafter=drafter, fixed=True, sampling=sampling, **options)


def expected_counts(g, period):
    """Drafted and accepted tokens of each row at each place, if drafts are wrong at multiples of the period alone."""
    drafted, accepted = np.zeros((2, len(PROMPTS), g), int)
    for i, prompt in enumerate(PROMPTS):
        length, limit = len(prompt), len(prompt) + NEW
        while length < limit:
            drafts = min(g, limit - length - 1)
            kept = next((j for j in range(drafts) if (length + j) % period == 0), drafts)
            drafted[i, :drafts] += 1
            accepted[i, :kept] += 1
            length += kept + 1
    return drafted, accepted


def counts(out):
    return np.asarray(out.stats.drafted_at), np.asarray(out.stats.accepted_at)


@pytest.mark.parametrize("g", [1, 2, 5])
@pytest.mark.parametrize("make", [chain, modules])
def test_a_perfect_head_is_accepted_everywhere(make, g):
    """Also after tokens that nobody can foresee, and with texts that are those of plain decoding."""
    drafter = make(g)
    for period in (NEVER, 7, 4):
        target = knowable_target(period)
        out = generate(target, drafter)
        for got, wanted in zip(counts(out), expected_counts(g, period), strict=True):
            np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(out.tokens, generate(target, None).tokens)
    drafted, accepted = counts(generate(knowable_target(), drafter, temperature=1.0))
    assert (drafted > 0).all()
    np.testing.assert_array_equal(accepted, drafted)


class EarlierStates(MTPHead):
    def fuse(self, params, features):
        return jnp.roll(features[0], 1, axis=1)


class EarlierTokens(MTPHead):
    def run(self, params, target, feed, states_btd, cache):
        feed = dataclasses.replace(feed, tokens_bt=jnp.roll(feed.tokens_bt, 1, axis=1))
        return super().run(params, target, feed, states_btd, cache)


class SlotTooFar(MTPHead):
    """Writes and reads chained slots one too far."""

    def run(self, params, target, feed, states_btd, cache):
        feed = dataclasses.replace(feed, start_b=feed.start_b + int(feed.tokens_bt.shape[1] == 1))
        return super().run(params, target, feed, states_btd, cache)


@struct.dataclass
class NoModulesPrefill(MTPDrafter):
    def observe(self, state, context, event):
        after = super().observe(state, context, event)
        return after if event.drafted else dataclasses.replace(after, cache=state.cache)


@struct.dataclass
class NoModulesRewrite(MTPDrafter):
    """Begins the window at the first new slot: what the modules wrote from drafts that were rejected stays."""

    def observe(self, state, context, event):
        state = super().observe(state, context, event)
        if not event.drafted:
            return state
        start_b = jnp.where(event.kept_b > 0, event.feed.start_b, state.start_b)
        moved = jax.vmap(lambda row, by: jnp.roll(row, -by, axis=0))(state.states_btd, start_b - state.start_b)
        return dataclasses.replace(state, states_btd=moved, start_b=start_b)


@struct.dataclass
class EarlierModulesStates(MTPDrafter):
    def observe(self, state, context, event):
        if event.drafted:
            event = dataclasses.replace(event, features=(jnp.roll(event.features[0], 1, axis=1),))
        return super().observe(state, context, event)


FAULTY = {
    "the prompt is not prefilled": lambda: chain(3, NoPrefill),
    "slots of accepted drafts are not written again": lambda: chain(3, NoRewrite),
    "states of the slot before": lambda: chain(3, head=EarlierStates),
    "tokens of the slot before": lambda: chain(3, head=EarlierTokens),
    "the chain goes on one slot too far": lambda: chain(3, head=SlotTooFar),
    "modules: the prompt is not prefilled": lambda: modules(3, NoModulesPrefill),
    "modules: slots of rejected drafts are not written again": lambda: modules(3, NoModulesRewrite),
    "modules: states of the slot before": lambda: modules(3, EarlierModulesStates),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_faulty_wiring_is_seen(fault):
    """Each fault leaves the text as it is, and lowers acceptance."""
    drafter, lost = FAULTY[fault](), 0
    for period in (NEVER, 4):
        target = knowable_target(period)
        out = generate(target, drafter)
        np.testing.assert_array_equal(out.tokens, generate(target, None).tokens)
        drafted, accepted = expected_counts(drafter.num_draft, period)
        lost += int(np.sum(accepted)) * np.sum(counts(out)[0]) - int(np.sum(counts(out)[1])) * np.sum(drafted)
    assert lost > 0


# What heads read of a text, in any order of chunks and rounds.


def lively(drafter):
    """Returns the drafter with parameters under which every part matters: a perfect head foresees what it reads."""
    rng = np.random.default_rng(3)

    def drawn(x):
        return jnp.asarray(rng.normal(size=x.shape) / x.shape[0] ** 0.5 if x.ndim == 2 else x, x.dtype)

    return dataclasses.replace(drafter, params=jax.tree.map(drawn, drafter.params))


@pytest.mark.parametrize(("make", "g"), [(chain, 3), (modules, 1), (modules, 3)])
def test_a_prompt_in_chunks_is_as_in_one_pass(make, g):
    assert_chunks_are_as_one_pass(knowable_target(), lively(make(g)))


@pytest.mark.parametrize(("make", "g"), [(chain, 3), (modules, 1), (modules, 3)])
def test_rounds_without_drafts_are_read_as_a_prompt_is(make, g):
    assert_rounds_alone_are_as_one_pass(knowable_target(), lively(make(g)))


@struct.dataclass
class AlwaysDrafted(MTPDrafter):
    """Takes every event for the end of a round at which it proposed, and so leaves the feeding to ``propose``."""

    def observe(self, state, context, event):
        return super().observe(state, context, dataclasses.replace(event, drafted=True))


def test_rounds_that_are_not_read_are_seen():
    with pytest.raises(AssertionError):
        assert_rounds_alone_are_as_one_pass(knowable_target(), lively(modules(3, AlwaysDrafted)))


@pytest.mark.parametrize("make", [chain, modules])
def test_caches_that_just_fit(make):
    """A short text in as few slots as a call may ask for: the modules' windows are wider than what there is."""
    target, drafter, prompts = knowable_target(), make(5), [[3], [1, 4]]
    out = generate(target, drafter, prompts, max_new_tokens=2, slots=2 + 2 + 5 + 1)
    plain = generate(target, None, prompts, max_new_tokens=2, slots=2 + 2 + 5 + 1)
    np.testing.assert_array_equal(out.tokens, plain.tokens)


# Folders.


def nested_parts(params):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def assert_same(first, second):
    first, second = nested_parts(first), nested_parts(second)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def llama_config(**changes):
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {"model_type": "llama", **{key: SIZES[key] for key in keys}, "max_position_embeddings": 64, **changes}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_written_folder_holds_the_published_tensors(kind, tmp_path):
    tensors = random_tensors(kind)
    drafter = open_mtp(write_folder(tmp_path / "given", CONFIGS[kind], tensors), make_target(), 1, "float32")
    if kind == "deepseek_v3":
        drafter = open_mtp(tmp_path / "given", make_target(), 2, "float32")
    write_mtp(tmp_path / "written", CONFIGS[kind], drafter.params)
    written = open_tensors(tmp_path / "written")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name].read(), tensor)
    assert_same(open_mtp(tmp_path / "written", make_target(), drafter.num_draft, "float32").params, drafter.params)


# Speculators' layout, of which 0.9.0 makes Qwen3-Next's modules.


def in_speculators(tensors, config=CONFIGS["qwen3_next"], **head):
    """Returns config and tensors of Qwen3-Next's module as speculators' converter writes them."""
    names = {
        "mtp.fc": "mtp_layers.0.input_proj",
        "mtp.norm": "mtp_layers.0.final_layernorm",
        "mtp.pre_fc_norm_hidden": "mtp_layers.0.hidden_layernorm",
        "mtp.pre_fc_norm_embedding": "mtp_layers.0.token_layernorm",
    }
    found, experts = {"verifier_lm_head.weight": np.zeros((VOCAB, WIDTH), np.float32)}, "mtp.layers.0.mlp.experts"
    for name, array in tensors.items():
        if not name.startswith(experts):
            stem = name.removesuffix(".weight")
            found[names.get(stem, stem.replace("mtp.layers.0", "mtp_layers.0")) + ".weight"] = array
    gate, up, down = (
        np.stack([tensors[f"{experts}.{e}.{name}_proj.weight"] for e in range(8)]) for name in ("gate", "up", "down")
    )
    found["mtp_layers.0.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
    found["mtp_layers.0.mlp.experts.down_proj"] = down
    about = {"algorithm": "mtp", "verifier": {"name_or_path": None, "architectures": ["Qwen3NextForCausalLM"]}}
    head = {"speculators_model_type": "mtp", "num_nextn_predict_layers": 1, "transformer_layer_config": config} | head
    return head | {"speculators_config": about, "speculators_version": "0.9.0", "tie_word_embeddings": False}, found


def test_speculators_folder_holds_qwen3_nexts_module(tmp_path, caplog):
    tensors = random_tensors("qwen3_next")
    native = open_mtp(write_folder(tmp_path / "native", CONFIGS["qwen3_next"], tensors), make_target(), 3, "float32")
    config, found = in_speculators(tensors)
    drafter = open_mtp(write_folder(tmp_path / "theirs", config, found), make_target(), 3, "float32")
    assert drafter.head == native.head and not caplog.records
    assert_same(drafter.params, native.params)
    write_mtp(tmp_path / "written", config, drafter.params)
    written = open_tensors(tmp_path / "written")
    assert written.keys() == found.keys() - {"verifier_lm_head.weight"}
    assert all((written[name].read() == found[name]).all() for name in written)


def test_experts_may_be_in_one_tensor(tmp_path):
    """So Qwen 3.5's published folders hold them."""
    tensors = random_tensors("qwen3_next")
    config, apart = CONFIGS["qwen3_next"], {name: tensors[name] for name in tensors if ".experts." not in name}
    stacks = {
        name.replace("_layers", ".layers"): x for name, x in in_speculators(tensors)[1].items() if ".experts." in name
    }
    native = open_mtp(write_folder(tmp_path / "native", config, tensors), make_target(), 3, "float32")
    drafter = open_mtp(write_folder(tmp_path / "stacks", config, apart | stacks), make_target(), 3, "float32")
    assert_same(drafter.params, native.params)


EXPERTS = "mtp_layers.0.mlp.experts."
BAD_SPECULATORS = {
    "another kind": ({"speculators_model_type": "eagle3"}, {}, "speculators_model_type is 'eagle3'"),
    "no layer": ({"transformer_layer_config": None}, {}, "transformer_layer_config None"),
    "a layer that is a list": ({"transformer_layer_config": [1]}, {}, r"transformer_layer_config \[1\]"),
    "two modules": ({"num_nextn_predict_layers": 2}, {}, "there are 2 MTP modules.*at most 1"),
    "a count that is text": ({"num_nextn_predict_layers": "1"}, {}, "num_nextn_predict_layers must be an integer"),
    "an unknown flag": ({"twist": True}, {}, r"\{'twist': True\} are unknown"),
    "a family without a reader": ({"transformer_layer_config": {"model_type": "bert"}}, {}, "model_type 'bert'"),
    "a family that is no name": (
        {"transformer_layer_config": {"model_type": {}}},
        {},
        "model_type {} is not supported",
    ),
    "experts one by one": ({}, {EXPERTS + "gate_up_proj": None}, "missing, such as '.*experts.gate_up_proj'"),
    "experts of two axes": ({}, {EXPERTS + "down_proj": np.zeros((8, 4), np.float32)}, r"is \(8, 4\)"),
    "half the rows": ({}, {EXPERTS + "gate_up_proj": np.zeros((8, 12, WIDTH), np.float32)}, r"is \(8, 12, 24\)"),
    "integers": ({}, {"mtp_layers.0.input_proj.weight": np.zeros((WIDTH, 2 * WIDTH), np.int32)}, "has dtype int32"),
    "one more": ({}, {"mtp_layers.1.input_proj.weight": np.zeros((2, 2), np.float32)}, "unknown, such as"),
}


@pytest.mark.parametrize(("change", "tensors", "message"), BAD_SPECULATORS.values(), ids=BAD_SPECULATORS)
def test_bad_folders_of_speculators_are_refused(change, tensors, message, tmp_path):
    config, found = in_speculators(random_tensors("qwen3_next"), **change)
    found = {name: array for name, array in (found | tensors).items() if array is not None}
    with pytest.raises(ValueError, match=message) as error:
        open_mtp(write_folder(tmp_path, config, found), make_target(), 3, "float32")
    assert str(tmp_path) in str(error.value)


def test_a_folder_is_replaced_and_read_in_another_dtype(tmp_path):
    config = MTPConfig(one_layer(TARGET, 0))
    for seed in (0, 1):
        params = init_mtp_params(config, jax.random.key(seed))
        write_mtp(tmp_path / "head", llama_config(), params)
    assert_same(open_mtp(tmp_path / "head", make_target(), 3, "float32").params, params)
    half = open_mtp(tmp_path / "head", make_target(), 3, "bfloat16").params
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    generation = generate(make_target(), FeatureDrafter(half, MTPHead(config), 3), [[1, 2, 3]], max_new_tokens=4)
    assert int(generation.lengths[0]) == 7


def whole_folder(folder, changes=lambda tensors: None, kind="deepseek_v3"):
    """A model with its modules; DeepSeek-V3's and GLM's have the embedding and the head of the model once more."""
    config = CONFIGS[kind]
    decoder = specjax.hf.decoder_config(config)
    target_params = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, init_params(decoder, jax.random.key(1)))
    family = read_keys(config)[1]["model_type"]
    tensors = {spec.name: spec.read() for spec in tensors_of(sources(family, decoder), target_params)}
    for k in range(config.get("num_nextn_predict_layers", 0) if kind in ("deepseek_v3", "glm4_moe") else 0):
        tensors[f"model.layers.{LAYERS + k}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"model.layers.{LAYERS + k}.shared_head.head.weight"] = tensors["lm_head.weight"]
    tensors |= random_tensors(kind)
    changes(tensors)
    return write_folder(folder, config, tensors)


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_folder_holds_the_target_and_its_modules(kind, tmp_path):
    """The modules lend from the target, see its own states, and change nothing of its text."""
    folder = whole_folder(tmp_path / "model", kind=kind)
    target = specjax.load(folder, "float32")
    drafter = open_mtp(folder, target, 2, "float32", chained=True)
    assert not drafter.head.config.own_embedding and not drafter.head.config.own_head
    alone = write_folder(tmp_path / "alone", CONFIGS[kind], random_tensors(kind))
    assert_same(drafter.params, open_mtp(alone, target, 2, "float32", chained=True).params)
    tokens, _ = row()
    fed = jnp.asarray(tokens[None], jnp.int32)
    (states,) = target.forward(target.params, whole_feed(fed), target.init_cache(1, LENGTH), (-1,)).features
    expected = twin_logits(CONFIGS[kind], random_tensors(kind), target, tokens, np.asarray(states[0]))[0]
    got = head_logits(drafter, target, tokens, np.asarray(states[0]), repeated(LENGTH))
    assert np.std(expected) > 0.1 and np.abs(got - expected).max() <= 1e-4
    out = generate(target, drafter, [[1, 2, 3], [4]], max_new_tokens=8)
    np.testing.assert_array_equal(out.tokens, generate(target, None, [[1, 2, 3], [4]], max_new_tokens=8).tokens)


OF_QWEN_3_5 = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}


@pytest.mark.parametrize(("outer", "kind"), OF_QWEN_3_5.items(), ids=OF_QWEN_3_5)
def test_modules_of_a_multimodal_model_are_those_of_its_text_part(outer, kind):
    rotary = {"rope_theta": 50.0, "rope_type": "default", "partial_rotary_factor": 0.25}
    text = {**CONFIGS["qwen3_next"], "model_type": kind, "mtp_num_hidden_layers": 1, "rope_parameters": rotary}
    for key in ("rope_theta", "partial_rotary_factor", "decoder_sparse_step", "norm_topk_prob"):
        text.pop(key)
    text |= {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)}
    layout = mtp_layout({"model_type": outer, "text_config": text})
    assert layout == mtp_layout(text)
    assert layout.table["{i}.eh_proj.kernel"][0] == "mtp.fc.weight"
    assert layout.decoder.num_hidden_layers == 1 and layout.decoder.recurrence is None


def test_an_embedding_or_head_that_differs_is_the_modules_own(tmp_path):
    """In one module, by one entry; the logits are those of the twin with it."""

    def change(tensors):
        for name, at in ((f"{LAYERS + 1}.embed_tokens", (3, 2)), (f"{LAYERS}.shared_head.head", (5, 4))):
            changed = tensors[f"model.layers.{name}.weight"].copy()
            changed[at] += 4
            tensors[f"model.layers.{name}.weight"] = changed

    folder = whole_folder(tmp_path / "model", change)
    target = specjax.load(folder, "float32")
    drafter = open_mtp(folder, target, 2, "float32")
    assert drafter.config.own_embedding and drafter.config.own_head
    head, embedding = (np.asarray(x) for x in (target.params["lm_head"]["kernel"], embeddings(target)))
    np.testing.assert_array_equal(np.argwhere(drafter.params[0]["lm_head"]["kernel"] != head), [[4, 5]])
    np.testing.assert_array_equal(drafter.params[1]["lm_head"]["kernel"], head)
    np.testing.assert_array_equal(drafter.params[0]["embed_tokens"]["weight"], embedding)
    np.testing.assert_array_equal(np.argwhere(drafter.params[1]["embed_tokens"]["weight"] != embedding), [[3, 2]])
    tokens, states = row()
    tokens[4] = 3
    got = modules_logits(drafter, target, tokens, states)
    changed = dataclasses.replace(target, params=target.params | {"lm_head": drafter.params[0]["lm_head"]})
    expected = twin_logits(CONFIGS["deepseek_v3"], random_tensors("deepseek_v3"), changed, tokens, states)
    assert np.abs(got[0] - expected[0]).max() <= 1e-4


def test_block_scaled_float8(tmp_path):
    """Kernels in float8 with scales of blocks, as DeepSeek-V3 is published."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensors, plain = random_tensors("deepseek_v3"), random_tensors("deepseek_v3")
    for name in [name for name in tensors if "_proj.weight" in name and "eh_proj" not in name]:
        rows, columns = (-(-size // 8) for size in tensors[name].shape)
        scale = np.random.default_rng(0).uniform(0.5, 2, size=(rows, columns)).astype(np.float32)
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
        spread = np.repeat(np.repeat(scale, 8, 0), 8, 1)[: plain[name].shape[0], : plain[name].shape[1]]
        plain[name] = tensors[name].astype(np.float32) * spread
    quantization = {"quant_method": "fp8", "weight_block_size": [8, 8], "fmt": "e4m3"}
    config = CONFIGS["deepseek_v3"] | {"quantization_config": quantization}
    scaled = open_mtp(write_folder(tmp_path / "scaled", config, tensors), make_target(), 2, "float32")
    spelled_out = open_mtp(write_folder(tmp_path / "plain", CONFIGS["deepseek_v3"], plain), make_target(), 2, "float32")
    assert_same(scaled.params, spelled_out.params)


# Bad input.


def without(name):
    return lambda config, tensors: tensors.pop(name)


def configured(**changes):
    return lambda config, tensors: config.update(changes)


def renamed(config, tensors):
    tensors["model.layers.2.mlp.experts.8.up_proj.weight"] = tensors["model.layers.2.mlp.experts.7.up_proj.weight"]


def reshaped(config, tensors):
    tensors["model.layers.3.eh_proj.weight"] = np.zeros((WIDTH, WIDTH), np.float32)


BAD = {
    "a missing tensor": (without("model.layers.3.enorm.weight"), r"1 tensors are missing.*model.layers.3.enorm.weight"),
    "a missing expert": (without("model.layers.2.mlp.experts.5.up_proj.weight"), r"missing.*experts.5.up_proj"),
    "an expert too many": (renamed, r"unknown.*experts.8.up_proj"),
    "a projection of another shape": (reshaped, r"eh_proj.weight' is \(24, 24\); config.json asks for \(24, 48\)"),
    "another module": (configured(num_nextn_predict_layers=3), r"missing.*model.layers.4"),
    "fewer modules than there are": (configured(num_nextn_predict_layers=1), r"unknown.*model.layers.3"),
    "no modules": (configured(num_nextn_predict_layers=0), r"no MTP modules.*num_nextn_predict_layers"),
    "modules that are no number": (
        configured(num_nextn_predict_layers="2"),
        r"num_nextn_predict_layers must be an int",
    ),
    "two numbers of modules": (configured(num_mtp_layers=1), r"num_mtp_layers.*give one of them"),
    "another width": (configured(hidden_size=32), r"target of hidden_size 32, and this one has 24"),
    "another vocabulary": (configured(vocab_size=38), r"target of vocab_size 38, and this one has 37"),
    "a target of other depth": (configured(num_hidden_layers=3), r"target of num_hidden_layers 3, and this one has 2"),
    "an unknown flag": (configured(mtp_twist=True), r"mtp_twist.*unknown"),
    "an unknown family": (configured(model_type="mystery"), r"model_type 'mystery' is not supported"),
    "a family of other names": (configured(model_type="llama"), r"missing, such as 'model.layers.2.mlp"),
}


@pytest.mark.parametrize("bad", BAD)
def test_folders_that_do_not_fit_are_refused(bad, tmp_path):
    change, message = BAD[bad]
    config, tensors = dict(CONFIGS["deepseek_v3"]), random_tensors("deepseek_v3")
    change(config, tensors)
    folder = write_folder(tmp_path / "head", config, tensors)
    with pytest.raises(ValueError, match=message):
        open_mtp(folder, make_target(), 1, "float32")


def test_families_without_modules_are_refused(tmp_path):
    gpt2 = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 37}
    params = init_mtp_params(MTPConfig(one_layer(TARGET, 0)), jax.random.key(0))
    with pytest.raises(ValueError, match="'gpt2' has no MTP layout"):
        write_mtp(tmp_path / "head", gpt2, params)
    with pytest.raises(ValueError, match=r"2 MTP modules; with model_type 'qwen3_next' at most 1"):
        write_mtp(tmp_path / "head", CONFIGS["qwen3_next"], {0: params[0], 1: params[0]})
    with pytest.raises(ValueError, match="attention_bias' is False; this decoder computes only True"):
        write_mtp(tmp_path / "head", CONFIGS["mimo"] | {"attention_bias": False}, params)
    with pytest.raises(ValueError, match=r"down_proj.*\(36, 24\), and config\.json asks for \(40, 24\)"):
        write_mtp(tmp_path / "head", llama_config(intermediate_size=40), params)
    assert not list(tmp_path.iterdir())


def test_more_drafts_than_modules_are_refused(tmp_path):
    folder = write_folder(tmp_path / "head", CONFIGS["deepseek_v3"], random_tensors("deepseek_v3"))
    with pytest.raises(ValueError, match=r"num_draft is 3.*2 MTP modules.*chained=True"):
        open_mtp(folder, make_target(), 3)
    assert open_mtp(folder, make_target(), 3, chained=True).num_draft == 3
    config, params = perfect_modules(2)
    for wrong in (3, 0):
        with pytest.raises(ValueError, match="num_draft"):
            MTPDrafter(params, config, wrong)
    with pytest.raises(ValueError, match="the config has 2 modules"):
        MTPHead(config)


def test_a_target_that_lends_nothing_is_refused(tmp_path):
    folder = write_folder(tmp_path / "head", CONFIGS["mimo"], random_tensors("mimo"))
    for part in ("embed", "unembed"):
        with pytest.raises(ValueError, match=f"share the target's {part}"):
            open_mtp(folder, dataclasses.replace(make_target(), **{part: None}))
        with pytest.raises(ValueError, match=rf"target has no {part}, .*LanguageModel\({part}="):
            generate(dataclasses.replace(knowable_target(), **{part: None}), chain(1))
