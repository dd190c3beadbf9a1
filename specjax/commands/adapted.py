"""The benchmark ``adapted``: models of other packages through ``specjax.adapt``, beside the packages' own samplers."""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import os
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import specjax
from specjax.commands import measure
from specjax.commands.console import print_table

PROMPT = 64  # tokens; the packages need no padding at a power of two
VOCAB, WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD = 8192, 512, 1536, 6, 8, 4, 64  # 24 M parameters
END = 1 << 20  # a token that ends a text, outside the vocabulary: all texts have the same length


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model of a package, in both of its uses.

    Attributes:
      name: of package and family.
      own: the package's sampler, greedy: takes prompts, int32 ``[rows, t]``, and how many tokens to write; returns the
        new tokens, integers ``[rows, n]``.
      targets: the model through ``specjax.adapt``, by way.
    """

    name: str
    own: Callable[[np.ndarray, int], np.ndarray]
    targets: dict[str, specjax.LanguageModel]


def tunix(slots: int) -> Adapted:
    """Returns tunix's Qwen3 and its sampler, whose caches have ``slots`` slots."""
    nnx = importlib.import_module("flax.nnx")
    qwen3, sampling = map(importlib.import_module, ("tunix.models.qwen3.model", "tunix.generate.sampler"))
    sizes = {"embed_dim": WIDTH, "hidden_dim": HIDDEN, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD}
    config = qwen3.ModelConfig(num_layers=LAYERS, vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-6, **sizes)
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
    cache = sampling.CacheConfig(cache_size=slots, num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD)
    sampler = sampling.Sampler(model, numbers(), cache)

    def own(prompts: np.ndarray, count: int) -> np.ndarray:
        return np.stack(sampler(as_texts(prompts), count).tokens)

    adapt = functools.partial(specjax.adapt, model, lambda rows, slots: model.init_cache(rows, slots, jnp.float32))
    return Adapted("tunix, Qwen3", own, {way: adapt(way=way) for way in ("mapped", "scratch")})


def keras_hub(slots: int) -> Adapted:
    """Returns keras-hub's Qwen3 and its sampler. The sampler's cache is as long as its texts."""
    del slots
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras, hub = map(importlib.import_module, ("keras", "keras_hub"))
    if keras.backend.backend() != "jax":
        raise ValueError(f"the backend of keras is {keras.backend.backend()}; set KERAS_BACKEND=jax")
    backbone = hub.models.Qwen3Backbone(
        vocabulary_size=VOCAB, num_layers=LAYERS, num_query_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD,
        hidden_dim=WIDTH, intermediate_dim=HIDDEN,
    )  # fmt: skip
    model = hub.models.Qwen3CausalLM(backbone, preprocessor=None)
    model.compile(sampler="greedy")

    def own(prompts: np.ndarray, count: int) -> np.ndarray:
        padded = np.pad(prompts, ((0, 0), (0, count)))
        mask = np.arange(padded.shape[1]) < prompts.shape[1]
        inputs = {"token_ids": padded, "padding_mask": np.broadcast_to(mask, padded.shape)}
        return np.asarray(model.generate(inputs, stop_token_ids=None)["token_ids"])[:, prompts.shape[1] :]

    def call(values: Any, tokens: Any, positions: Any, cache: Any, attention_mask: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(model.variables, values, strict=True))):
            logits, states, cache = model.call_with_cache(tokens, cache, positions[0, 0])
        return logits, cache, {-1: states}

    def empty(rows: int, slots: int) -> Any:
        return jnp.zeros((rows, LAYERS, 2, slots, KV_HEADS, HEAD))

    values = [variable.value for variable in model.variables]
    return Adapted("keras-hub, Qwen3", own, {"mapped": specjax.adapt(values, empty, call=call)})


def gemma(slots: int) -> Adapted:
    """Returns gemma's Gemma 3 and its sampler, whose caches have ``slots`` slots."""
    names = ("gemma.gm.nn._config", "gemma.gm.nn._modules", "gemma.gm.nn._transformer", "gemma.gm.text")
    configs, modules, transformer, text = map(importlib.import_module, names)
    kinds = (modules.AttentionType.LOCAL_SLIDING, modules.AttentionType.GLOBAL)
    config = configs.TransformerConfig(
        num_embed=VOCAB, embed_dim=WIDTH, hidden_dim=HIDDEN, num_heads=HEADS, head_dim=HEAD, num_kv_heads=KV_HEADS,
        final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True,
        sliding_window_size=512, attention_types=kinds * (LAYERS // 2),
    )  # fmt: skip
    model = transformer.Transformer(config=config, dtype=jnp.float32)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    sampler = text.Sampler(
        model=model, params=params, tokenizer=numbers(), cache_length=slots, max_out_length=slots, pad_length=PROMPT
    )

    def own(prompts: np.ndarray, count: int) -> np.ndarray:
        out = sampler.sample(as_texts(prompts), max_new_tokens=count, return_state=True)
        return np.asarray(out.state.predicted_tokens)[:, :count]

    def call(params: Any, tokens: Any, positions: Any, cache: Any, attention_mask: Any) -> Any:
        out = model.apply({"params": params}, tokens, positions=positions, cache=cache, attention_mask=attention_mask)
        return out.logits, out.cache

    def empty(rows: int, slots: int) -> Any:
        return model.init_cache(batch_size=rows, cache_length=slots, dtype=jnp.float32)

    adapt = functools.partial(specjax.adapt, params, empty, call=call)
    return Adapted("gemma, Gemma 3", own, {way: adapt(way=way) for way in ("mapped", "scratch")})


PACKAGES = {"tunix": tunix, "keras-hub": keras_hub, "gemma": gemma}


class SpecialTokens(NamedTuple):
    """Special tokens by the names of gemma's sampler; hashable, since its program depends on them."""

    PAD: int = 0
    EOS: int = END
    END_OF_TURN: int = END
    BEGIN_OF_TOOL_RESPONSE: int = END


def numbers() -> Any:
    """Returns a tokenizer of numbers that are words, as far as the samplers ask for one."""
    return types.SimpleNamespace(
        encode=lambda text, add_bos=False: [int(word) for word in text.split()],
        decode=lambda tokens: "",
        pad_id=lambda: 0,
        bos_id=lambda: None,
        eos_id=lambda: END,
        special_tokens=SpecialTokens(),
        VERSION=0,
        FORMAT=None,
        FORBIDDEN_TOKENS=(),
    )


def as_texts(prompts: np.ndarray) -> list[str]:
    """Returns the texts that ``numbers`` reads as these tokens."""
    return [" ".join(map(str, prompt)) for prompt in prompts.tolist()]


def check(names: list[str], asked: bool) -> None:
    """Raises ValueError if a package is not installed, or packages are named and the benchmark is not, or reversed."""
    if asked and not names:
        raise ValueError(f"adapted is asked for without --package; give --package with one of {', '.join(PACKAGES)}")
    if names and not asked:
        raise ValueError(f"--package {names[0]} is for the benchmark adapted; name it")
    for name in names:
        module = name.replace("-", "_")
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"--package {name} is not installed; pip install 'specjax[{name.split('-')[0]}]'")


def bench_adapted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times greedy decoding by each package's own sampler and through ``specjax.adapt``, in turn."""
    num_draft, count = args.num_draft[0], args.new_tokens
    slots = PROMPT + count + num_draft + 1
    rows: list[dict[str, Any]] = []
    for name in args.package:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            adapted = PACKAGES[name](slots)
            for batch in args.batch or [1, 8]:
                rows += _rows(adapted, batch, count, num_draft, max(3, args.repeats // 3))
    title = f"Models of packages through specjax.adapt: greedy, float32, {PROMPT} tokens of prompt, {count} new ones"
    return print_table(title, rows)


def _rows(adapted: Adapted, batch: int, count: int, num_draft: int, repeats: int) -> list[dict[str, Any]]:
    prompts = np.random.default_rng(0).integers(3, VOCAB, (batch, PROMPT), dtype=np.int32)
    calls: dict[str, Callable[[], Any]] = {"own sampler": lambda: adapted.own(prompts, count)}
    for way, target in adapted.targets.items():
        run = functools.partial(
            specjax.generate, target, prompts, max_new_tokens=count, sampling=specjax.Sampling(temperature=0.0)
        )
        calls[f"{way}, plain"] = run
        calls[f"{way}, n-grams"] = functools.partial(run, drafter=specjax.NGramDrafter(num_draft), fixed=True)
    seconds = measure.medians(calls, repeats)
    own = np.asarray(calls["own sampler"]())
    rows = []
    for name, call in calls.items():
        found = call()
        texts = own if name == "own sampler" else np.asarray(found.tokens)[:, PROMPT : PROMPT + count]
        rows.append(
            {
                "model": adapted.name,
                "batch": batch,
                "decoding": name,
                "tokens/s": batch * count / seconds[name],
                "beside own sampler": seconds["own sampler"] / seconds[name],
                "text equal": f"{int((texts == own).all(1).sum())} of {batch}",
                "tokens per pass": None if name == "own sampler" else float(found.stats.tokens_per_round),
            }
        )
    return rows
