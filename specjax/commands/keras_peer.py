"""``keras-hub`` on JAX as a peer of ``bench``: its greedy sampler, and its speculative sampler.

keras-hub connects its speculative sampler to one family, Gemma 4. Here the sampler is called with the functions that
its documentation asks for, over a Llama target and a Llama draft.
"""

import importlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.commands.measure import Way

NEEDED = ("rope_theta", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
DRAWS = 20  # texts that are sampled for the note


def ways(target: Path, draft: Path, num_draft: int, new_tokens: int) -> tuple[list[Way], str]:
    """Opens both models and returns the ways to decode, and a note on the settings and on what was checked.

    Args:
      target: a Hugging Face folder.
      draft: a Hugging Face folder.
      num_draft: g.
      new_tokens: the number of new tokens.

    Raises:
      ValueError: keras was imported with another backend.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras, keras_hub = map(importlib.import_module, ("keras", "keras_hub"))  # here, since keras-hub is optional
    if keras.backend.backend() != "jax":
        raise ValueError(f"the backend of keras is {keras.backend.backend()}; set KERAS_BACKEND=jax")
    model, assistant = opened(keras_hub, target), opened(keras_hub, draft)
    model.compile(sampler="greedy")

    def plain(prompt: np.ndarray) -> np.ndarray:
        out = model.generate(padded(prompt[None], new_tokens), stop_token_ids=None)
        return np.asarray(out["token_ids"])[0, len(prompt) :]

    sampler = keras_hub.samplers.SpeculativeSampler(num_draft)
    speculate = speculative(keras, model, assistant, sampler)

    def speculative_way(prompt: np.ndarray) -> np.ndarray:
        return np.asarray(speculate(padded(prompt[None], new_tokens)))[0, len(prompt) :]

    name = "keras-hub"
    found = [
        Way(name, "plain", "plain", plain),
        Way(name, f"speculative, {num_draft} drafts", "draft model", speculative_way),
    ]
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in ("keras-hub", "keras"))
    note = (
        f"{versions} on JAX, float32, the same weights, compiled once for each length of prompt and text. "
        f"{checks(keras, keras_hub, model, num_draft)}"
    )
    return found, note


def opened(keras_hub: Any, folder: Path) -> Any:
    """Returns keras-hub's model of a Hugging Face folder of a Llama.

    Raises:
      ValueError: the model is no Llama, or its config lacks a key that keras-hub reads.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") != "llama":
        raise ValueError(
            f"--peer keras-hub compares Llamas, and the model_type is {raw.get('model_type')!r}; leave it out"
        )
    if lacking := [name for name in NEEDED if name not in raw]:
        raise ValueError(f"config.json lacks {lacking[0]}, which keras-hub reads; write it into the config.json")
    loaded = keras_hub.models.Llama3Backbone.from_preset(str(folder), dtype="float32")
    # keras-hub 0.32 does not read the epsilon of the norms. So a model with the right one gets the weights. Its
    # ``get_config`` leaves out whether embeddings are tied.
    config = loaded.get_config() | {"layer_norm_epsilon": raw["rms_norm_eps"]}
    config["tie_word_embeddings"] = loaded.tie_word_embeddings
    backbone = keras_hub.models.Llama3Backbone.from_config(config)
    backbone.set_weights(loaded.get_weights())
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


def padded(prompts: np.ndarray, new_tokens: int, lengths: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Returns keras-hub's inputs for prompts ``[rows, t]``, with room for new tokens; None: no prompt is shorter."""
    rows, width = prompts.shape
    place = np.arange(width + new_tokens)[None]
    mask = place < (np.full((rows, 1), width) if lengths is None else lengths[:, None])
    tokens = np.pad(prompts, ((0, 0), (0, new_tokens)))
    return {"token_ids": np.where(mask, tokens, 0).astype(np.int32), "padding_mask": mask.astype(np.int32)}


def speculative(keras: Any, model: Any, assistant: Any, sampler: Any) -> Callable[[dict[str, np.ndarray]], Any]:
    """Returns a compiled function from ``padded`` inputs to tokens, by the speculative sampler."""
    ops = keras.ops

    def seeded(lm: Any, tokens: Any) -> Any:
        backbone = lm.backbone
        width = backbone.hidden_dim // backbone.num_query_heads
        shape = (tokens.shape[0], backbone.num_layers, 2, tokens.shape[1], backbone.num_key_value_heads, width)
        return lm.call_with_cache(tokens, ops.zeros(shape, "float32"), 0)[2]

    def one(lm: Any) -> Callable[..., Any]:
        def following(prompt: Any, cache: Any, index: Any) -> Any:
            last = ops.slice(prompt, [0, index - 1], [prompt.shape[0], 1])
            logits, hidden, cache = lm.call_with_cache(last, cache, index - 1)
            return logits[:, 0], hidden[:, 0], cache

        return following

    def verify(prompt: Any, cache: Any, index: Any, k: int) -> Any:
        # The window is moved back where it would pass the end, as keras-hub does for Gemma 4.
        start = ops.maximum(0, ops.minimum(index - 1, prompt.shape[1] - k - 1))
        window = ops.slice(prompt, [0, start], [prompt.shape[0], k + 1])
        logits, _, cache = model.call_with_cache(window, cache, start)
        place = ops.minimum(ops.arange(k + 1) + index - 1 - start, k)
        return ops.take(logits, place, axis=1), cache

    def run(inputs: dict[str, Any]) -> Any:
        tokens, mask = inputs["token_ids"], inputs["padding_mask"]
        return sampler(
            next=one(model),
            prompt=tokens,
            cache=seeded(model, tokens),
            index=ops.min(ops.sum(mask, axis=-1)),
            mask=mask,
            model=model,
            draft_next=one(assistant),
            draft_cache=seeded(assistant, tokens),
            verify_next=verify,
        )

    # Variables are arguments of the program, as in keras-hub's own ``generate``.
    held = [*model.variables, *assistant.variables, *sampler.variables]

    @jax.jit
    def compiled(inputs: dict[str, Any], values: list[Any]) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(held, values, strict=True))) as scope:
            tokens = run(inputs)
        return tokens, [scope.get_current_value(each) for each in sampler.variables]

    def call(inputs: dict[str, np.ndarray]) -> Any:
        tokens, states = compiled(inputs, [each.value for each in held])
        for each, state in zip(sampler.variables, states, strict=True):
            if state is not None:
                each.assign(state)
        return tokens

    return call


def checks(keras: Any, keras_hub: Any, model: Any, num_draft: int) -> str:
    """Returns what a check of the speculative sampler found, with the target as its own draft model."""
    samplers, new = keras_hub.samplers, num_draft + 1
    prompts = np.random.default_rng(0).integers(1, model.backbone.vocabulary_size, (2, 12)).astype(np.int32)
    # At temperature 1 the first new token must have the target's law. Its most likely value has probability ``most``.
    law_v = keras.ops.softmax(model({"token_ids": prompts[:1], "padding_mask": np.ones((1, 12), np.int32)})[0, -1])
    most = float(keras.ops.max(law_v))
    random = samplers.SpeculativeSampler(num_draft, base_sampler=samplers.RandomSampler(), seed=0)
    draw, inputs = speculative(keras, model, model, random), padded(prompts[:1], new)
    firsts = [int(np.asarray(draw(inputs))[0, 12]) for _ in range(DRAWS)]
    likely = firsts.count(int(np.argmax(law_v)))
    # Rows of two lengths: no token of a prompt may change.
    lengths = np.asarray([6, 12])
    greedy = speculative(keras, model, model, samplers.SpeculativeSampler(num_draft))
    together = np.asarray(greedy(padded(prompts, new, lengths)))
    kept = all((together[i, :n] == prompts[i, :n]).all() for i, n in enumerate(lengths))
    return (
        "Its speculative sampler with the target as its own draft model, at temperature 1: the first token was the "
        f"most likely one in {likely} of {DRAWS} draws, and its probability is {most:.0%}. Greedy, with prompts of 6 "
        f"and 12 tokens in one batch: it {'kept the prompts' if kept else 'overwrote tokens of the longer prompt'}."
    )
