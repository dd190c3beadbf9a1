"""Times of published shapes with random weights: plain decoding, drafting at given acceptance, quantised weights.

All figures are medians of runs that take turns in one process. A run is one loop of ``rounds`` rounds on the device, as
``specjax.run`` compiles it, without prompt and without compilation, and no row ends within it. Its context grows from
the prompt's length on; figures give both ends.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import specjax
from specjax import planning
from specjax.commands import measure
from specjax.commands.accelerator.facts import copy_bandwidth
from specjax.commands.accelerator.records import Recorder
from specjax.hf.config import decoder_config
from specjax.transformer.decoder import abstract_params

SHAPES = {"1b": "llama-3.2-1b", "8b": "llama-3.1-8b"}
ACCEPTANCE = (0.8, 0.7, 0.6, 0.5)  # of draft i, given that the drafts before it were accepted
RULE = specjax.testing.ForcedAcceptance(specjax.verify.block, ACCEPTANCE)
NUM_DRAFT = len(ACCEPTANCE)
# What makes the target's config the draft's: 4 layers of 512, and the output head is the embedding.
DRAFT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
# What makes either config small, to try this module on a CPU.
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run: tokens of the prompts, slots, rounds of one run, and timings of each median."""

    prompt: int = 128
    slots: int = 512
    rounds: int = 64
    repeats: int = 7


SMALL_ROWS = 2
FULL, LITTLE = Size(), Size(prompt=16, slots=128, rounds=8, repeats=3)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the figures of one shape share.

    Attributes:
      record: where they go.
      size: how much is run.
      config: the target's.
      target: the target with random weights.
      draft: the draft's config.
      drafters: by name.
      bandwidth: of a copy on this device, bytes per second.
    """

    record: Recorder
    size: Size
    config: specjax.transformer.DecoderConfig
    target: specjax.LanguageModel
    draft: specjax.transformer.DecoderConfig
    drafters: dict[str, Any]
    bandwidth: float

    @property
    def dtype(self) -> str:
        return str(self.target.params["embed_tokens"]["weight"].dtype)


def run(record: Recorder, small: bool, shape: str, batches: Iterable[int], quantised: bool) -> None:
    """Writes the figures of a shape, the most wanted first.

    Args:
      record: where they go.
      small: with a small model, to try this module.
      shape: a key of ``SHAPES``.
      batches: numbers of rows.
      quantised: also compare quantised weights with others, with the first batch.
    """
    bench = prepare(record, small, shape)
    batches = dict.fromkeys(min(rows, SMALL_ROWS) for rows in batches) if small else batches
    for i, rows in enumerate(batches):
        for temperature in (0.0, 1.0):
            for name, drafter in bench.drafters.items():
                facts = {"shape": shape, "drafter": name, "batch": rows, "temperature": temperature}
                found = drafting(bench, drafter, rows, temperature)
                record.write("figure", f"{name} batch {rows} temperature {temperature:g}", **facts, **found)
            if not i and not temperature and quantised:
                quantisation(bench, shape, rows)


def prepare(record: Recorder, small: bool, shape: str) -> Bench:
    """Makes the models on the device, and measures its bandwidth."""
    raw = json.loads((planning.CONFIGS / f"{SHAPES[shape]}.json").read_text(encoding="utf-8"))
    raws = raw | (SMALL if small else {}), raw | (SMALL if small else {}) | ({} if small else DRAFT)
    config, draft = map(decoder_config, raws)
    dtype = specjax.default_dtype()
    target, small_model = random_model(config, 0, dtype), random_model(draft, 1, dtype)
    drafters = {
        # On text without meaning, prompt lookup finds no match in most rounds. Its cost is the same with any drafts.
        "ngram": specjax.testing.AlwaysDrafting(specjax.NGramDrafter(NUM_DRAFT)),
        "model": specjax.ModelDrafter(small_model, NUM_DRAFT),
    }
    return Bench(record, LITTLE if small else FULL, config, target, draft, drafters, copy_bandwidth(small))


def random_model(config: specjax.transformer.DecoderConfig, seed: int, dtype: jnp.dtype | str) -> specjax.LanguageModel:
    """Returns a model whose matrices are drawn on the device, one after the other."""
    # One jitted function for each shape, in place of one for all layers: it compiles at once, and never holds the
    # random bits of two matrices.
    shapes = abstract_params(config, jnp.dtype(dtype))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        _matrix(key, x.shape, x.dtype) if x.ndim > 1 else jnp.ones(x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    params = jax.block_until_ready(jax.tree.unflatten(tree, drawn))
    return specjax.transformer.decoder_model(config, params)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _matrix(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[0] ** -0.5, dtype)


def drafting(bench: Bench, drafter: Any, rows: int, temperature: float) -> dict[str, Any]:
    """Times rounds with a drafter, at ``ACCEPTANCE``, against plain steps, and returns the figures."""
    size = bench.size
    runs: dict[str, Callable[..., specjax.State]] = {
        "plain": functools.partial(specjax.run, bench.target, rounds=size.rounds),
        "round": functools.partial(specjax.run, bench.target, drafter=drafter, verify=RULE, rounds=size.rounds),
    }
    starts: dict[str, Callable[[], specjax.State]] = {
        "plain": functools.partial(ready, bench, bench.target, None, rows, temperature),
        "round": functools.partial(ready, bench, bench.target, drafter, rows, temperature),
    }
    states, emitted_b = compile_all(starts, runs)
    seconds = measure.medians(runs, size.repeats, states)
    plain, each = (seconds[name] / size.rounds for name in runs)
    # The mean of the given law, since the emitted tokens of one run differ from it by some hundredths.
    emitted = RULE.emitted_per_round
    # The least time by bytes, at the mean context and at the bandwidth of a copy.
    context = {name: size.prompt + float(emitted_b[name].mean()) / 2 for name in runs}
    plain_ideal = ideal_seconds(bench, bench.dtype, rows, 0, context["plain"])
    return {
        "dtype": bench.dtype,
        "context": [size.prompt, size.prompt + int(emitted_b["round"].max())],
        "num_draft": NUM_DRAFT,
        "acceptance": ACCEPTANCE,
        "plain_ms": plain * 1e3,
        "plain_ideal_ms": plain_ideal * 1e3,
        "share_of_bandwidth": plain_ideal / plain,
        "bandwidth": bench.bandwidth,
        "round_ms": each * 1e3,
        "round_ideal_ms": ideal_seconds(bench, bench.dtype, rows, NUM_DRAFT, context["round"], drafter) * 1e3,
        "round_over_plain": each / plain,
        "emitted_per_round": emitted,
        "emitted_per_round_here": float(emitted_b["round"].mean()) / size.rounds,
        "plain_tokens_per_second": rows / plain,
        "tokens_per_second": rows * emitted / each,
        "speed_up": emitted * plain / each,
    }


def quantisation(bench: Bench, shape: str, rows: int) -> None:
    """Writes plain decoding with int8 weights against plain decoding without, or a note that there are no such."""
    quantize = getattr(specjax, "quantize", None)
    facts = {"shape": shape, "drafter": "none", "batch": rows, "temperature": 0.0}
    if quantize is None:
        bench.record.write("note", f"int8 batch {rows}", **facts, text="specjax.quantize is not built")
        return
    size, targets = bench.size, {bench.dtype: bench.target, "int8": quantize(bench.target, "int8")}
    runs: dict[str, Callable[..., specjax.State]] = {
        name: functools.partial(specjax.run, target, rounds=size.rounds) for name, target in targets.items()
    }
    starts: dict[str, Callable[[], specjax.State]] = {
        name: functools.partial(ready, bench, target, None, rows, 0.0) for name, target in targets.items()
    }
    states, _ = compile_all(starts, runs)
    seconds = measure.medians(runs, size.repeats, states)
    ideal = ideal_seconds(bench, "int8", rows, 0, size.prompt + size.rounds / 2)
    bench.record.write(
        "figure",
        f"int8 batch {rows}",
        **facts,
        dtype="int8",
        against=bench.dtype,
        context=[size.prompt, size.prompt + size.rounds],
        plain_ms=seconds["int8"] / size.rounds * 1e3,
        plain_ideal_ms=ideal * 1e3,
        share_of_bandwidth=ideal * size.rounds / seconds["int8"],
        against_ms=seconds[bench.dtype] / size.rounds * 1e3,
        speed_up=seconds[bench.dtype] / seconds["int8"],
    )


def ready(bench: Bench, target: specjax.LanguageModel, drafter: Any, rows: int, temperature: float) -> specjax.State:
    """Returns the state after random prompts, with which no row ends in one run."""
    size = bench.size
    prompts = np.random.default_rng(0).integers(0, target.vocab_size, (rows, size.prompt)).astype(np.int32)
    return specjax.prefill(
        target,
        prompts,
        drafter=drafter,
        sampling=specjax.Sampling(temperature=temperature),
        max_new_tokens=(size.rounds + 1) * (NUM_DRAFT + 1),
        slots=size.slots,
        fixed=True,
    )


def compile_all(
    starts: dict[str, Callable[[], specjax.State]], runs: dict[str, Callable[..., specjax.State]]
) -> tuple[dict[str, specjax.State], dict[str, np.ndarray]]:
    """Makes each state and runs it once, all at the same time, since compiling is what takes time.

    Returns:
      The states before their runs, and the tokens that each row emitted in one run.
    """

    def once(name: str) -> tuple[specjax.State, np.ndarray]:
        state = starts[name]()
        end = runs[name](jax.tree.map(jnp.copy, state))  # the run donates its state
        return state, np.asarray(end.stats.emitted)

    with ThreadPoolExecutor() as pool:
        found = dict(zip(runs, pool.map(once, runs), strict=True))
    return {name: state for name, (state, _) in found.items()}, {name: count for name, (_, count) in found.items()}


def ideal_seconds(bench: Bench, weights: str, rows: int, num_draft: int, context: float, drafter: Any = None) -> float:
    """Returns the least time of a round by bytes: weights once, and used keys and values, at the copy's bandwidth."""
    hardware = planning.Hardware(bench.bandwidth, {"bfloat16": math.inf})
    draft: Any = planning.Model(bench.draft, bench.dtype, bench.dtype)
    setting = planning.Setting(
        target=planning.Model(bench.config, weights, bench.dtype),
        mesh=planning.Mesh(),
        batch=rows,
        context=int(context),
        kept=planning.kept(ACCEPTANCE),
        draft=draft if isinstance(drafter, specjax.ModelDrafter) else 0.0,
        draft_mesh=planning.Mesh(),
    )
    return planning.plan_round(setting, hardware, num_draft).seconds
