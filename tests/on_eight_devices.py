"""Checks that need eight devices, whose number JAX fixes as it starts.

``test_sharding.py`` runs this file as a program, which prints the traceback of each check by its name, empty if it
passes, as JSON.
"""

import dataclasses
import functools
import json
import math
import re
import sys
import tempfile
import time
import traceback
from collections import Counter

import conftest  # noqa: F401  (the suite's strictness, and its compilations)
import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_row import ByRow
from draft_heads import write_eagle, write_medusa, write_mtp
from every_rule import EveryRule
from jax.sharding import AxisType, PartitionSpec
from test_compiled import compilations, computations, copies, outer_loops, reachable
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import specjax
from specjax import (
    BlockDrafter,
    Cascade,
    EarlyExitDrafter,
    FeatureDrafter,
    MedusaDrafter,
    ModelDrafter,
    MTPDrafter,
    NGramDrafter,
    Sampling,
    verify,
)
from specjax.checkpoint.eagle import eagle_head
from specjax.drafters.assistant import AssistantDrafter, AssistantHead
from specjax.drafters.dflash import DFlashHead
from specjax.drafters.eagle import EagleHead
from specjax.drafters.medusa import init_medusa_params
from specjax.drafters.mtp import MTPConfig, init_mtp_params
from specjax.drafters.trees import drawn_tree
from specjax.engine import programs
from specjax.engine.request import lay_out
from specjax.hf.config import decoder_config
from specjax.sharding import RULES, make_mesh, shard, shardings
from specjax.testing import table_model
from specjax.transformer import moe
from specjax.transformer.config import (
    EXTERNAL,
    DecoderConfig,
    DeltaConfig,
    ExpertsConfig,
    LatentConfig,
    LayerConfig,
    MambaConfig,
    PerLayerConfig,
    plain_rope,
)
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

ROWS, DRAFTS, NEW, SLOTS, VOCAB, WIDTH, MLP, HEAD, KV_HEADS = 24, 2, 16, 128, 64, 32, 48, 8, 2
DENSE = DecoderConfig(VOCAB, WIDTH, MLP, 1, num_attention_heads=8, num_key_value_heads=KV_HEADS, head_dim=HEAD)
MIXTURE = dataclasses.replace(
    DENSE,
    layers=(LayerConfig(plain_rope(HEAD), experts=True),),
    experts=ExpertsConfig(num_experts=8, per_token=2, intermediate_size=16, shared_size=16),
)
DEEPSEEK = dataclasses.replace(  # experts, and latents in place of keys and values
    MIXTURE,
    layers=(LayerConfig(plain_rope(4), experts=True),),
    latent=LatentConfig(query_rank=16, key_value_rank=16, plain_width=8, rotary_width=4, value_width=8),
)
HYBRID = dataclasses.replace(  # a layer of each further kind: recurrent, with a window, with experts, with shared keys
    DENSE,
    num_hidden_layers=4,
    layers=(
        LayerConfig(None, recurrent=True),
        LayerConfig(plain_rope(HEAD), window=6),
        LayerConfig(plain_rope(HEAD), experts=True),
        LayerConfig(plain_rope(HEAD), window=6, shares=1),
    ),
    attention_sinks=True,
    output_gate=True,
    experts=ExpertsConfig(*(8, 2, 16), router_bias=True, bias=True, clamp=(1.7, 7.0), shared_size=16, shared_gate=True),
    recurrence=DeltaConfig(key_heads=2, heads=4, key_width=5, value_width=4, taps=3),
    per_layer=PerLayerConfig(VOCAB, 6),
    layer_scale=True,
)
MAMBA = dataclasses.replace(  # one group, as in Granite 4: queries and keys stay whole where heads are split
    DENSE, layers=(LayerConfig(None, recurrent=True),), recurrence=MambaConfig(8, 4, groups=1, state_width=5)
)
PROMPT = np.random.default_rng(0).integers(0, VOCAB, (ROWS, 7), np.int32)
PROMPT[:, 0] = np.arange(ROWS)  # which says what drafts for a row, see ``ByRow``


def loud(params):
    """Larger matrices, since what is drawn with a deviation of 0.02 says nothing about the next token.

    Entries of vectors (norms, biases, sinks) differ, so that a device with another device's part is seen.
    """

    def louder(x):
        vary = 0.3 * jnp.sin(jnp.arange(x.shape[-1], dtype=jnp.float32))
        return x * jnp.asarray(20, x.dtype) if x.ndim > 1 else x + vary.astype(x.dtype)

    return jax.tree.map(louder, params)


@functools.cache
def decoder(config, seed=0):
    return decoder_model(config, loud(init_params(config, jax.random.key(seed))))


def drafter(kind, config, drafts=DRAFTS):
    key = jax.random.key(2)
    if kind == "model":  # the dense target, a little disturbed: of that it is often right
        noise = init_params(DENSE, jax.random.key(1))
        params = jax.tree.map(lambda x, y: x + (y if x.ndim > 1 else 0 * y), decoder(DENSE).params, noise)
        return ModelDrafter(decoder_model(DENSE, params), drafts)
    if kind == "mamba":
        return ModelDrafter(decoder(MAMBA, 1), drafts)
    if kind == "assistant":
        shared = tuple(dataclasses.replace(layer, shares=EXTERNAL) for layer in config.each_layer[1:3])
        shared = tuple(dataclasses.replace(layer, experts=False) for layer in shared)
        head = AssistantHead(dataclasses.replace(DENSE, num_hidden_layers=2, layers=shared), WIDTH)
        return AssistantDrafter(loud(head.init_params(key)), head, drafts)
    if kind == "ngram":
        return NGramDrafter(drafts, min_n=1)
    if kind == "early exit":
        return EarlyExitDrafter(1, drafts)
    if kind == "cascade":
        return Cascade(drafter("ngram", config, drafts), drafter("medusa", config, drafts))
    if kind == "medusa":
        return MedusaDrafter(init_medusa_params(decoder(config).params["lm_head"]["kernel"], drafts), drafts)
    if kind == "eagle":
        head = EagleHead(DENSE, (0, 1))
        return FeatureDrafter(loud(head.init_params(key)), head, drafts)
    modules = MTPConfig(DENSE)
    return MTPDrafter(loud(init_mtp_params(modules, key)), modules, 1)


def generate(target, draft, rule):
    return specjax.generate(
        target, PROMPT, drafter=draft, fixed=True, verify=rule, sampling=SAMPLING, max_new_tokens=NEW, slots=SLOTS
    )


@functools.cache
def plainly(config):
    """Plain decoding on one device: greedily what any rule and drafter emit, and with noise what ``coupled`` does."""
    return np.asarray(generate(decoder(config), None, verify.block).tokens)


# Half of the rows greedy, the others with filters; of 8 tokens, so that texts repeat themselves and n-grams are right.
SAMPLING = Sampling(
    temperature=np.repeat(np.float32([0, 1]), ROWS // 2),
    top_k=5,
    top_p=np.float32(0.9),
    logit_bias=np.where(np.arange(VOCAB) < 8, 0, -np.inf),
)


# Tokens.


def same_tokens(config, kinds, sizes, rules=RULES):
    """All rules and some drafters over a mesh, against plain decoding on one device."""
    mesh, parts = make_mesh(*sizes), tuple(drafter(kind, config, 1) for kind in kinds)
    target, draft = shard(decoder(config), mesh), shard(ByRow(parts), mesh, rules)
    with jax.set_mesh(mesh):
        out = generate(target, draft, EveryRule())
    turn_b, wanted_bs = PROMPT[:, 0] % len(kinds), plainly(config)
    for turn, kind in enumerate(kinds):
        np.testing.assert_array_equal(out.tokens[turn_b == turn], wanted_bs[turn_b == turn], kind)
        drafted, accepted = (int(x[turn_b == turn].sum()) for x in (out.stats.drafted, out.stats.accepted))
        print(f"{kind}: {accepted} of {drafted} drafts accepted")
        assert accepted > 0, kind


CASES = [  # the target, drafters, mesh, the drafters' rules
    (DENSE, ("model", "ngram", "mtp"), (1, 8), RULES),
    (DENSE, ("model", "ngram", "mtp"), (4, 2), {}),
    (DENSE, ("model", "ngram", "mtp"), (8, 1), RULES),
    (DEEPSEEK, ("model", "ngram", "mtp"), (2, 2, 2), RULES),
    (DEEPSEEK, ("eagle", "medusa", "early exit", "cascade"), (2, 4), RULES),
    (HYBRID, ("mamba", "assistant"), (2, 2, 2), RULES),
]


def blocks_and_trees_run_on_a_mesh():
    """Rows and heads split: the text is that of plain decoding on one device with the same noise."""
    mesh, target = make_mesh(2, 4), decoder(DENSE)
    head = DFlashHead(DENSE, (0,), DRAFTS, 9, from_anchor=True, markov="gated", markov_rank=4)
    block, tree = (
        BlockDrafter(loud(head.init_params(jax.random.key(2))), head, DRAFTS),
        drawn_tree(5, DRAFTS, "distinct"),
    )
    drafters = {
        "block": block,
        "tree of a block": dataclasses.replace(block, num_draft=5, tree_depth=DRAFTS),
        "drawn tree": dataclasses.replace(drafter("model", DENSE), num_draft=5, tree=tree, siblings="distinct"),
    }
    for name, draft in drafters.items():
        with jax.set_mesh(mesh):
            out = generate(shard(target, mesh), shard(draft, mesh), verify.coupled)
        np.testing.assert_array_equal(out.tokens, plainly(DENSE), name)
        assert out.stats.accepted.sum() > 0, name


def stream_keeps_caches_split_and_gives_the_same_tokens():
    mesh = make_mesh(4, 2)
    target, settings = shard(decoder(DENSE), mesh), {"max_new_tokens": NEW, "slots": SLOTS, "sampling": SAMPLING}
    with jax.set_mesh(mesh):
        state = specjax.prefill(target, PROMPT, **settings)
        for keys_or_values in jax.tree.leaves(state.cache):
            assert keys_or_values.sharding.shard_shape(keys_or_values.shape) == (ROWS // 4, KV_HEADS // 2, SLOTS, HEAD)
        assert state.length_b.sharding.spec == state.done_b.sharding.spec == PartitionSpec("data")
        *_, last = specjax.stream(target, PROMPT, rounds=5, verify=verify.coupled, **settings)
        state = jax.jit(specjax.step)(target, state)
    np.testing.assert_array_equal(last.tokens, plainly(DENSE))
    np.testing.assert_array_equal(state.tokens_bs[:, :8], plainly(DENSE)[:, :8])


def data_parallel(wrap):
    """``wrap`` splits rows over devices; the function it gets knows no mesh."""

    def ask(params, prompt_bt, temperature_b, seed_b):
        settings = dataclasses.replace(SAMPLING, temperature=temperature_b, seed=seed_b)
        model = decoder_model(DENSE, params)
        return specjax.generate(model, prompt_bt, sampling=settings, max_new_tokens=NEW).tokens

    seed_b = np.arange(ROWS, dtype=np.uint32)
    tokens_bs = np.asarray(wrap(ask)(decoder(DENSE).params, PROMPT, SAMPLING.temperature, seed_b)).reshape(ROWS, -1)
    end = PROMPT.shape[1] + NEW
    np.testing.assert_array_equal(tokens_bs[:, :end], plainly(DENSE)[:, :end])


def a_callers_shard_map_runs_generate():
    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = {"in_specs": (whole, rows, rows, rows), "out_specs": rows, "check_vma": False}
    data_parallel(lambda ask: jax.jit(jax.shard_map(ask, mesh=make_mesh(8), **specs)))


def a_callers_pmap_runs_generate():
    def wrap(ask):
        mapped = jax.pmap(ask, in_axes=(None, 0, 0, 0))
        return lambda params, *rows: mapped(params, *(x.reshape(8, ROWS // 8, *x.shape[1:]) for x in rows))

    data_parallel(wrap)


def bfloat16_experts_run():
    """XLA's CPU compiler aborts at some sums of bfloat16 over a part of a mesh's axes."""
    mesh = make_mesh(2, 2, 2)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder(MIXTURE).params)
    model = decoder_model(MIXTURE, params)

    def logits(model):
        return model.run(whole_feed(jnp.asarray(PROMPT)), model.init_cache(ROWS, 16))[0]

    alone = jax.jit(logits)(model)
    with jax.set_mesh(mesh):
        spread = jax.jit(logits)(shard(model, mesh))
    differs = np.abs(np.asarray(alone) - np.asarray(spread)).max(-1)  # where rounding sends a token elsewhere, much
    assert np.median(differs) < 0.02 * np.abs(alone).max()


def experts_held_elsewhere_add_nothing():
    """The way of devices other than CPUs, which the programs here do not take."""
    rng, m, d, f = np.random.default_rng(0), 5, 16, 24
    shapes = ((8, d, f), (8, d, f), (8, f, d))
    stacks = moe.Stacks(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))
    x_md = jnp.asarray(rng.normal(size=(m, d)), jnp.float32)
    chosen_mc = jnp.asarray([[0, 7], [3, 2], [2, 3], [7, 1], [0, 1]], jnp.int32)  # none of the experts 4, 5, 6
    weights_mc = jnp.asarray(rng.uniform(size=(m, 2)), jnp.float32)
    run = functools.partial(moe.sorted_by_expert, moe.Form("silu"))
    with jax.set_mesh(make_mesh(expert=4)):
        y_md = jax.jit(moe._in_parts(run))(x_md, chosen_mc, weights_mc, stacks)
    np.testing.assert_allclose(y_md, run(x_md, chosen_mc, weights_mc, stacks), rtol=1e-4, atol=1e-4)


# What the loop communicates.

COLLECTIVE = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?"


def collectives(lines):
    """Returns kind, shapes and groups of devices of each collective among lines of HLO."""
    found = []
    for line in lines:
        match = re.search(rf"= (.*?) {COLLECTIVE}\(", line)
        if match:
            shapes = [
                tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w\[([\d,]*)\]", match[1])
            ]
            groups = re.search(r"(?:replica_groups|source_target_pairs)=(.*?)(?:, \w+=|$)", line)[1]
            found.append((match[2], shapes, groups))
    return found


def gathered_logits_are_found():
    mesh = make_mesh(2, 4)
    split = jax.sharding.NamedSharding(mesh, PartitionSpec("data", "tensor"))
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
    logits = jax.ShapeDtypeStruct((ROWS, VOCAB), jnp.float32, sharding=split)
    hlo = jax.jit(lambda x: x, out_shardings=rows).lower(logits).compile().as_text()
    ((kind, shapes, _),) = collectives(hlo.splitlines())
    assert kind == "all-gather" and shapes == [(ROWS // 2, VOCAB)]


def a_round_keeps_to_its_budget_of_collectives():
    """The budget of one round on a mesh with a data and a tensor axis; docs/distributed.md explains it."""
    data, tensor = 2, 4
    mesh = make_mesh(data, tensor)
    target, draft = shard(decoder(DENSE), mesh), shard(drafter("model", DENSE), mesh)
    with jax.set_mesh(mesh):
        prompt_bs, request, static = lay_out(target, draft, PROMPT, None, Sampling(), NEW, (), SLOTS)
        static |= {"classes": programs.classes_key(target, draft), "verify": verify.block}
        hlo = programs.generate_program.lower(target, prompt_bs, request, draft, **static).compile().as_text()
    (body,) = (body for body in outer_loops(hlo) if collectives(body))  # XLA may make small loops of its own
    found, rows, layers = collectives(body), ROWS // data, DENSE.num_hidden_layers

    assert {kind for kind, _, _ in found} == {"all-reduce"}
    assert {groups for _, _, groups in found} == {"[2,4]<=[8]"}  # devices that share rows: none along the data axis
    lines, entry = computations(hlo)
    for loop in (line for line in lines[entry] if " while(" in line):
        condition = reachable(lines, re.search(r"condition=%?([\w.-]+)", loop)[1])
        assert collectives(line for name in condition for line in lines[name]) == []
    assert copies(body, SLOTS) == []

    # Models: hidden states after the embedding, attention and MLP of each layer, in each pass.
    states = Counter(shape for _, shapes, _ in found for shape in shapes if shape[-1:] == (WIDTH,))
    passes = [2, *[1] * (DRAFTS - 1), DRAFTS + 1]  # the drafter's and the target's, tokens each
    assert states == Counter({(rows, t, WIDTH): passes.count(t) * (2 * layers + 1) for t in passes})
    # Sampling: 10 reductions over the vocabulary for each of the round's warps (2 of them 30 times, where there are
    # filters), 4 for each draw (2 of them run) and 3 for verification; a number for each row and position.
    numbers = [shapes for _, shapes, _ in found if all(shape[-1:] != (WIDTH,) for shape in shapes)]
    draws = DRAFTS + 1
    print(f"{len(found)} collectives, {len(numbers)} of them of numbers")
    assert len(numbers) <= 10 * draws + 4 * draws + 3
    assert all(math.prod(shape) <= rows * (DRAFTS + 1) for shapes in numbers for shape in shapes)


# Where parameters go.


def split_axes(tree):
    return {jax.tree_util.keystr(path): tuple(leaf.spec) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def parameters_go_where_the_table_says():
    mesh = make_mesh(2, 2, 2)
    config = dataclasses.replace(MIXTURE, attention_bias=True, output_bias=True, query_key_norm="heads")
    specs = split_axes(shardings(decoder(config), mesh).params)
    layer = "['layers'][0]"
    wanted = {
        "['embed_tokens']['weight']": ("tensor", None),
        "['lm_head']['kernel']": (None, "tensor"),
        "['norm']['weight']": (None,),
        f"{layer}['self_attn']['q_proj']['kernel']": (None, "tensor"),
        f"{layer}['self_attn']['k_proj']['bias']": ("tensor",),
        f"{layer}['self_attn']['q_norm']['weight']": (None,),
        f"{layer}['self_attn']['o_proj']['kernel']": ("tensor", None),
        f"{layer}['self_attn']['o_proj']['bias']": (None,),
        f"{layer}['mlp']['gate']['kernel']": (None, None),
        f"{layer}['mlp']['experts']['up_proj']": ("expert", None, "tensor"),
        f"{layer}['mlp']['experts']['down_proj']": ("expert", "tensor", None),
        f"{layer}['mlp']['shared_experts']['down_proj']['kernel']": ("tensor", None),
    }
    assert {name: specs[name] for name in wanted} == wanted
    replicated = split_axes(shardings(decoder(config), mesh, {}).params)
    assert len(replicated) == len(specs) and not any(axis for spec in replicated.values() for axis in spec)


def only_small_matrices_are_whole():
    """Of each kind of layer, against the list in docs/distributed.md."""
    small = {"mlp.gate.kernel", "mlp.shared_expert_gate.kernel"}  # routers
    small |= {"self_attn.q_a_proj.kernel", "self_attn.kv_a_proj.kernel"}  # to latents
    small |= {"per_layer.input_gate.kernel", "per_layer.projection.kernel"}
    of_one_group = {f"recurrence.{name}" for name in ("q_proj.kernel", "k_proj.kernel", "q_conv.taps", "k_conv.taps")}
    for config, wanted in ((HYBRID, small), (DEEPSEEK, small), (MAMBA, of_one_group)):
        specs = split_axes(shardings(decoder(config), make_mesh(1, 2, 2)).params)
        whole = [name for name, spec in specs.items() if len(spec) > 1 and not any(spec)]
        assert {".".join(re.findall(r"[a-z]\w+", name)[-3:]).removeprefix("layers.") for name in whole} <= wanted
        assert len(specs) > 2 * len(whole)


def states_are_split_with_their_heads():
    """In a Mamba-2 of one group by value heads; queries and keys are of all heads, and so are their last inputs."""
    rows, mesh = ROWS // 2, make_mesh(2, 2, 2)
    wanted = {HYBRID: [(rows, 1, 5, 2, 4), (rows, 2, 5), (rows, 2, 5), (rows, 2, 8)]}
    wanted[MAMBA] = [(rows, 1, 5, 4, 4), (rows, 3, 5), (rows, 3, 5), (rows, 3, 16)]
    for config, shapes in wanted.items():
        with jax.set_mesh(mesh):
            state = specjax.prefill(shard(decoder(config), mesh), PROMPT, max_new_tokens=NEW, slots=SLOTS)
        kept = jax.tree.leaves(state.cache.layers[0])
        assert [x.sharding.shard_shape(x.shape) for x in kept] == shapes


def few_key_and_value_heads_stay_whole():
    specs = split_axes(shardings(decoder(DENSE), make_mesh(1, 4)).params)
    attention = "['layers'][0]['self_attn']"
    assert specs[f"{attention}['k_proj']['kernel']"] == specs[f"{attention}['v_proj']['kernel']"] == (None, None)
    assert specs[f"{attention}['q_proj']['kernel']"] == (None, "tensor")


def each_device_holds_its_part():
    model = shard(decoder(DENSE), make_mesh(1, 8))
    weight = model.params["embed_tokens"]["weight"]
    assert [part.data.shape for part in weight.addressable_shards] == [(VOCAB // 8, WIDTH)] * 8


def latents_are_whole_and_their_heads_are_split():
    specs = split_axes(shardings(decoder(DEEPSEEK), make_mesh(1, 8)).params)
    attention = "['layers'][0]['self_attn']"
    assert specs[f"{attention}['k_up']"] == specs[f"{attention}['v_up']"] == ("tensor", None, None)
    assert specs[f"{attention}['q_b_proj']['kernel']"] == (None, "tensor")
    assert specs[f"{attention}['kv_a_proj']['kernel']"] == specs[f"{attention}['q_a_proj']['kernel']"] == (None, None)


def heads_of_all_kinds_are_split():
    mesh, key = make_mesh(1, 8), jax.random.key(0)
    medusa = MedusaDrafter(init_medusa_params(decoder(DENSE).params["lm_head"]["kernel"], DRAFTS), DRAFTS)
    specs = split_axes(shardings(medusa, mesh))
    assert specs[".params[0]['lm_head']['kernel']"] == (None, "tensor")
    assert specs[".params[1]['blocks'][0]['kernel']"] == (None, None)
    for size, axis in ((None, "tensor"), (16, None)):
        head = EagleHead(DENSE, (0, 1, 2), draft_vocab_size=size)
        specs = split_axes(shardings(FeatureDrafter(head.init_params(key), head, DRAFTS), mesh))
        assert specs[".params['lm_head']['kernel']"] == (None, axis)
        assert specs[".params['layers'][0]['self_attn']['q_proj']['kernel']"] == (None, "tensor")
    specs = split_axes(shardings(drafter("mtp", DENSE), mesh))
    assert specs[".params[0]['layer']['mlp']['down_proj']['kernel']"] == ("tensor", None)
    assert specs[".params[0]['eh_proj']['kernel']"] == (None, None)
    cascade = specjax.Cascade(NGramDrafter(DRAFTS), drafter("model", DENSE))
    assert split_axes(shardings(cascade, mesh))[".second.model.params['lm_head']['kernel']"] == (None, "tensor")


def what_is_remembered_stays_whole():
    """Rows over the mesh are remembered on each device; neither this nor the next call compiles anything."""
    target, prompts = table_model(np.random.default_rng(0).normal(size=(VOCAB,) * 2)), [[i, 1, 2] for i in range(8)]
    options = {"max_new_tokens": 20, "fixed": True, "sampling": Sampling(0.0)}
    wanted = specjax.generate(target, prompts, **options)
    mesh = make_mesh(8)
    target = shard(target, mesh, rules={})
    draft = shard(specjax.SuffixDrafter.empty(VOCAB, 512, DRAFTS), mesh)
    with jax.set_mesh(mesh):
        first = specjax.generate(target, prompts, drafter=draft, **options)
        draft = specjax.remember(draft, first)
        with compilations() as names:
            second = specjax.generate(target, prompts, drafter=draft, **options)
            draft = specjax.remember(draft, second)
    assert names == [] and all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(draft))
    for out in (first, second):
        np.testing.assert_array_equal(out.tokens, wanted.tokens)
    assert np.sum(second.stats.rounds) < np.sum(first.stats.rounds)


def adapted_models_run_on_a_mesh():
    """Rows over devices, all weights on each; and weights that the caller splits."""
    prompts, settings = [[i % 5, 2, 3, i] for i in range(8)], {"max_new_tokens": 8, "fixed": True}
    settings |= {"sampling": Sampling(0.0), "drafter": EarlyExitDrafter(1, 2)}
    for way, mesh in (("mapped", make_mesh(8)), ("scratch", make_mesh(4, 2))):
        target = specjax.adapt(
            foreign.Decoder(), foreign.empty, way=way, call=foreign.states_of, early_exit=foreign.early_exit
        )
        wanted = specjax.generate(target, prompts, **settings)
        columns = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "tensor"))
        on_mesh = shard(target, mesh, rules={})
        split = lambda x, columns=columns: x if x.shape[-1] % 2 else jax.device_put(x, columns)
        on_mesh = on_mesh.replace(params=jax.tree.map(split, on_mesh.params))
        with jax.set_mesh(mesh):
            out = specjax.generate(on_mesh, prompts, **settings)
        np.testing.assert_array_equal(out.tokens, wanted.tokens)
        assert len(out.tokens.sharding.device_set) == 8


def letters(step=1):
    """Returns a tokenizer of one byte per token, in this order or backwards."""
    tokenizer = Tokenizer(
        BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB][::step])}, [])
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def rollouts_are_split_by_prompts():
    """Each part of the mesh writes the completions of its own prompts, in its own rounds."""
    target, prompts = table_model(np.random.default_rng(0).normal(size=(VOCAB,) * 2)), [[i, 1, 2] for i in range(8)]
    options = {"samples": 4, "max_new_tokens": 12, "stop_tokens": tuple(range(8)), "fixed": True}
    options |= {"drafter": NGramDrafter(DRAFTS, 1, 2), "sampling": Sampling(seed=3)}
    wanted = specjax.rollout(target, prompts, **options)
    mesh = make_mesh(4)
    target = shard(target, mesh, rules={})
    with jax.set_mesh(mesh):
        out = specjax.rollout(target, prompts, rows=16, **options)
        with pytest.raises(ValueError, match=r"3 prompts and 4 rows do not divide over the 4 parts"):
            specjax.rollout(target, prompts[:3], rows=4, **options)
        adapted = specjax.rollout(target, prompts, rows=16, **options | {"fixed": False, "costs": np.float32([1, 1.1])})
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_allclose(out.logprobs, wanted.logprobs, atol=1e-5)
    rounds = np.asarray(out.rounds).reshape(4, 4)
    assert (rounds == rounds[:, :1]).all() and len(set(rounds[:, 0].tolist())) > 1
    assert adapted.stats.emitted.shape == (32,) and (adapted.stats.emitted > 0).all()


def folders_load_onto_the_mesh():
    """Both kinds of folder, a mixture of experts among them: the parts are those of the whole."""
    mesh, raw = (
        make_mesh(2, 2, 2),
        {
            "model_type": "mixtral",
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "num_key_value_heads": KV_HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = f"{folder}/ours", f"{folder}/theirs"
        specjax.save(ours, raw, init_params(decoder_config(raw), jax.random.key(0)), letters(), {})
        specjax.export_hf(ours, theirs)
        alone = specjax.load(ours)
        places = shardings(alone, mesh).params
        for path in (ours, theirs):
            params = specjax.load(path, mesh=mesh).params
            jax.tree.map(np.testing.assert_array_equal, params, alone.params)
            assert jax.tree.all(
                jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), params, places)
            )


def drafters_load_onto_the_mesh():
    """Of all kinds of folder, the parts are those of the whole, for a target in parts; what does not fit is refused."""
    mesh, key = make_mesh(2, 4), jax.random.key(0)
    raw = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": KV_HEADS,
    }
    eagle = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 16}
    eagle |= raw | {"eagle_aux_hidden_state_layer_ids": [0, 1]}

    def opener(kind, **options):
        def open_drafter(path, target, num_draft, rules=RULES, **on):
            return specjax.load_drafter(f"{kind}:{path}", target, num_draft, rules=rules, **on, **options)

        return open_drafter

    kinds = {kind: opener(kind) for kind in ("model", "mtp", "eagle", "medusa")}
    kinds["another vocabulary"] = opener("model", tokenizer=letters(-1))
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: f"{folder}/{'model' if kind == 'another vocabulary' else kind}" for kind in kinds}
        params = init_params(decoder_config(raw), key)
        specjax.save(paths["model"], raw, params, letters(), {})
        alone, apart = specjax.load(paths["model"]), specjax.load(paths["model"], mesh=mesh)
        modules = MTPConfig(decoder_config(raw))
        shared = {"embed_tokens": params["embed_tokens"], "lm_head": params["lm_head"]}  # which the target lends
        write_mtp(paths["mtp"], raw, {0: init_mtp_params(modules, key)[0] | shared})
        write_eagle(paths["eagle"], eagle, eagle_head(eagle, alone).init_params(key), alone)
        write_medusa(paths["medusa"], init_medusa_params(params["lm_head"]["kernel"], 1))

        for kind, open_drafter in kinds.items():
            whole = open_drafter(paths[kind], alone, 1)
            for rules in (RULES, {}):
                parts, wanted = (
                    open_drafter(paths[kind], apart, 1, mesh=mesh, rules=rules),
                    shardings(whole, mesh, rules),
                )
                leaves = zip(*map(jax.tree.leaves, (parts, whole, wanted)), strict=True)
                for part, array, place in leaves:
                    np.testing.assert_array_equal(part, array, kind)
                    assert part.dtype == array.dtype and part.sharding.is_equivalent_to(place, part.ndim), kind
        for kind, open_drafter in {**kinds, "target": lambda path, _, __, **on: specjax.load(path, **on)}.items():
            opened = functools.partial(open_drafter, paths.get(kind, paths["model"]), alone, 1)
            with pytest.raises(ValueError, match=r"do not divide over the 3 devices of the mesh axis 'tensor'; make"):
                opened(mesh=make_mesh(tensor=3))
            with pytest.raises(ValueError, match="an axis 'model', which no rule uses"):
                opened(mesh=jax.make_mesh((8,), ("model",), (AxisType.Auto,)))
            with pytest.raises(ValueError, match="the axis 'tenser'; the mesh has data, tensor, expert"):
                opened(mesh=mesh, rules={"heads": "tenser"})
            with pytest.raises(TypeError, match=r"give a jax\.sharding\.Mesh"):
                opened(mesh={"tensor": 4})


# Bad input.


def bad_meshes_and_rules_are_refused():
    model, mesh = decoder(DENSE), make_mesh(2, 4)

    def refused(message, *args, error=ValueError):
        with pytest.raises(error, match=message):
            shard(*args)

    odd = decoder(dataclasses.replace(DENSE, vocab_size=63, num_attention_heads=6))
    whole = {**RULES, "vocab": None}
    refused(r"_proj.*6 heads.*the 4 devices.*'tensor'.*divisor of 6.*rules=", odd, mesh, whole)
    refused(r"63 vocab.*the 4 devices", odd, mesh)
    assert shard(odd, mesh, {"mlp": "tensor"}).vocab_size == 63
    refused("an axis 'model', which no rule uses", model, jax.make_mesh((8,), ("model",), (AxisType.Auto,)))
    shard(model, jax.make_mesh((8,), ("model",), (AxisType.Auto,)), {"mlp": "model"})
    refused("type Explicit.*make_mesh", model, jax.make_mesh((2, 4), ("data", "tensor")))
    refused("logical axis 'head'.*heads", model, mesh, {"head": "tensor"})
    refused("the axis 'tenser'; the mesh has data, tensor, expert", model, mesh, {"heads": "tenser"})
    refused("twice over the mesh axis 'tensor'", decoder(MIXTURE), mesh, {"experts": "tensor", "mlp": "tensor"})
    refused("give a jax.sharding.Mesh", model, {"data": 8}, error=TypeError)
    refused("give a mapping", model, mesh, "tensor", error=TypeError)
    refused("give a LanguageModel or a drafter", model.params, mesh, error=TypeError)
    table = table_model(np.zeros((5, 5)))
    refused("declares no axes.*rules={}", table, mesh)
    assert shard(table, mesh, {}).params.sharding.is_fully_replicated
    with pytest.raises(ValueError, match="needs 16 devices and there are 8"):
        make_mesh(4, 4)
    with pytest.raises(ValueError, match="axis tensor is 0; give an integer of at least 1"):
        make_mesh(tensor=0)


def bad_rows_and_meshes_are_refused_by_generate():
    model = decoder(DENSE)
    with jax.set_mesh(make_mesh(8)), pytest.raises(ValueError, match=r"3 rows.*the 8 parts.*a multiple of 8"):
        specjax.generate(model, PROMPT[:3], max_new_tokens=2)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))), pytest.raises(ValueError, match="type Explicit"):
        specjax.generate(model, PROMPT, max_new_tokens=2)


CHECKS = {
    f"{', '.join(kinds)} over {'x'.join(map(str, sizes))}": functools.partial(same_tokens, config, kinds, sizes, rules)
    for config, kinds, sizes, rules in CASES
} | {
    check.__name__: check
    for check in (
        blocks_and_trees_run_on_a_mesh,
        stream_keeps_caches_split_and_gives_the_same_tokens,
        a_callers_shard_map_runs_generate,
        a_callers_pmap_runs_generate,
        bfloat16_experts_run,
        experts_held_elsewhere_add_nothing,
        gathered_logits_are_found,
        a_round_keeps_to_its_budget_of_collectives,
        parameters_go_where_the_table_says,
        only_small_matrices_are_whole,
        states_are_split_with_their_heads,
        few_key_and_value_heads_stay_whole,
        each_device_holds_its_part,
        latents_are_whole_and_their_heads_are_split,
        heads_of_all_kinds_are_split,
        what_is_remembered_stays_whole,
        rollouts_are_split_by_prompts,
        adapted_models_run_on_a_mesh,
        folders_load_onto_the_mesh,
        drafters_load_onto_the_mesh,
        bad_meshes_and_rules_are_refused,
        bad_rows_and_meshes_are_refused_by_generate,
    )
}


def outcome(name):
    began = time.process_time()
    try:
        CHECKS[name]()
    except Exception:
        return traceback.format_exc()
    finally:
        print(f"{time.process_time() - began:5.1f} s of CPU: {name}")
    return ""


if __name__ == "__main__":
    assert jax.device_count() == 8
    wanted = sys.argv[1:] or CHECKS
    print(json.dumps({name: outcome(name) for name in wanted}))
