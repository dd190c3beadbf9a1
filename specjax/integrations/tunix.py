"""tunix: rollouts by speculative decoding, in tunix's own interface (``tunix.rl.rollout.base_rollout``)."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tunix.generate.tokenizer_adapter import TokenizerAdapter  # pyright: ignore[reportMissingImports]
from tunix.rl import common  # pyright: ignore[reportMissingImports]
from tunix.rl.rollout import base_rollout  # pyright: ignore[reportMissingImports]

from specjax import verify as verify_lib
from specjax.adapters.adapt import adapt
from specjax.engine.rollout import Rollout, rollout
from specjax.sampling import Sampling
from specjax.types import Drafter, LanguageModel, VerifyRule


def language_model(model: Any) -> LanguageModel:
    """Returns a model of tunix that makes its own cache, such as Qwen3 and Gemma, as ``specjax.LanguageModel``.

    Raises:
      ValueError: the model has no ``init_cache``.
    """
    if not hasattr(model, "init_cache"):
        raise ValueError(
            f"{type(model).__name__} has no init_cache; give SpecjaxRollout adapt=, a function that calls "
            "specjax.adapt(model, cache)"
        )
    # The dtype is that of the model's config, whatever is given.
    return adapt(model, lambda rows, slots: model.init_cache(rows, slots, None), index="end_index")


class SpecjaxRollout(base_rollout.BaseRollout):
    """A rollout engine of tunix that samples by ``specjax.rollout``: the policy's exact law, in fewer passes.

    ``rl_cluster.ClusterConfig`` takes the class, or the class with options::

        rollout_engine=functools.partial(SpecjaxRollout, drafter=specjax.NGramDrafter(num_draft=4))

    It differs from tunix's "vanilla" engine where that one has a fault, or less:

    - Equal prompts that follow each other, as GRPO asks for them, are read once.
    - Calls are numbered, and a call's number goes into its seed. So two steps of a training, and two micro-batches of a
      step, have other noise. The same sequence of calls has the same noise again.
    - Temperature 0 is greedy decoding and any other temperature is not, whatever ``top_p`` is.
    - Completions keep the token that ends them, as in tunix's vLLM engine. A loss needs it to teach a policy to stop.
    - ``logprobs`` are of the law that was sampled, after temperature, top-k and top-p; at temperature 0, of the model.

    Logits are not returned. Images are refused.

    Attributes:
      target: the policy as ``specjax.LanguageModel``, with the newest parameters.
      drafter: drafts for it, or None. It may be replaced between calls, such as by a ``training.DraftTrainer``'s.
      last: what the last call of ``generate`` sampled, or None.
    """

    target: LanguageModel
    drafter: Drafter | None
    last: Rollout | None

    def __init__(
        self,
        rollout_actor: nnx.Module,
        tokenizer: Any,
        mesh: Any = None,
        rollout_config: base_rollout.RolloutConfig | None = None,
        *,
        adapt: Callable[[Any], LanguageModel] = language_model,
        drafter: Drafter | None = None,
        verify: VerifyRule = verify_lib.block,
        rows: int | None = None,
    ):
        """Takes the policy. No program is compiled before the first rollout.

        Args:
          rollout_actor: the policy. Updates change this module.
          tokenizer: as tunix takes it: of SentencePiece or transformers, or with ``encode``, ``decode``, ``bos_id``,
            ``eos_id`` and ``pad_id``.
          mesh, rollout_config: given by tunix. The parameters say where a rollout runs, and ``generate`` gets a config.
          adapt: returns the policy as ``LanguageModel``. It is called after each update.
          drafter: drafts for the policy.
          verify: the rule.
          rows: completions that run at once; None: all.

        Raises:
          ValueError, TypeError: as ``adapt``; ``rows`` is no integer of at least 1.
        """
        del mesh, rollout_config
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(f"rows is {rows!r}; give an integer of at least 1, or None")
        self._model, self._adapt, self._verify, self._rows = rollout_actor, adapt, verify, rows
        self._tokenizer = TokenizerAdapter(tokenizer)
        self.target, self.drafter, self.last = adapt(rollout_actor), drafter, None
        self._calls = 0

    def generate(
        self, prompts: list[str], rollout_config: base_rollout.RolloutConfig, **kwargs: Any
    ) -> base_rollout.RolloutOutput:
        """Returns one completion of each prompt.

        Prompts are padded to ``max_prompt_length``, or to the next power of two above it that the longest one needs.

        Raises:
          ValueError: there is no prompt, or a number of the config is out of its range.
          TypeError: an argument that this engine does not have, such as images; or a prompt that is no text.
        """
        if kwargs:
            raise TypeError(f"specjax's rollout engine takes no {', '.join(kwargs)}; use tunix's own engine for that")
        if len(prompts) == 0:
            raise ValueError("prompts is empty; give at least one")
        if other := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise TypeError(f"prompts has {other[0]!r}; give texts, as a learner does whose batches are NumPy arrays")
        samples = _repeats(prompts)
        tokens = [self._encode(prompt) for prompt in prompts[::samples]]
        length = max(map(len, tokens))
        width = rollout_config.max_prompt_length
        width = width if length <= width else 1 << (length - 1).bit_length()
        prompt_pt = np.stack([np.pad(row, (0, width - len(row))) for row in tokens])
        greedy = rollout_config.temperature == 0
        self.last = rollout(
            self.target,
            prompt_pt,
            np.asarray([len(row) for row in tokens]),
            samples=samples,
            rows=self._rows,
            drafter=self.drafter,
            verify=self._verify,
            sampling=Sampling(
                temperature=rollout_config.temperature,
                top_k=max(rollout_config.top_k or 0, 0),
                top_p=1.0 if rollout_config.top_p is None else rollout_config.top_p,
                seed=_seed(rollout_config.seed, self._calls),
            ),
            max_new_tokens=rollout_config.max_tokens_to_generate,
            stop_tokens=tuple(rollout_config.eos_tokens or [self.eos_id()]),
            logprobs=rollout_config.return_logprobs,
        )
        self._calls += 1
        done = jax.device_get(self.last.completions(rollout_config.max_tokens_to_generate))
        count_n = done.mask.sum(axis=1)
        emitted = [row[:count] for row, count in zip(done.tokens, count_n, strict=True)]
        law = done.logprobs if greedy else done.warped_logprobs
        left = np.stack([np.pad(row, (width - len(row), 0), constant_values=self.pad_id()) for row in tokens])
        return base_rollout.RolloutOutput(
            text=[self._tokenizer.decode(self._without_end(row, rollout_config)) for row in emitted],
            logits=[],
            tokens=emitted,
            left_padded_prompt_tokens=np.repeat(left, samples, axis=0),
            logprobs=None if law is None else [row[:count] for row, count in zip(law, count_n, strict=True)],
        )

    def get_per_token_logps(self, prompt_tokens: Array, completion_tokens: Array) -> Array:
        """Returns the policy's log-probabilities of completions, by tunix's own pass; float ``[b, t]``."""
        graph, state = nnx.split(self._model)
        return common.compute_per_token_logps(
            graph, state, prompt_tokens, completion_tokens, self.pad_id(), self.eos_id()
        )

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Takes new parameters, all or those of some types. They get the dtypes and shardings that the policy has.

        Raises:
          ValueError: a parameter has another shape or another name than the policy's. The policy stays as it was.
        """
        held = nnx.state(self._model, filter_types) if filter_types else nnx.state(self._model)
        here, taken = dict(nnx.to_flat_state(held)), []
        for path, new in nnx.to_flat_state(params):
            name = ".".join(map(str, path))
            if path not in here:
                raise ValueError(f"the update has {name}, which the policy lacks; give parameters of the same model")
            old = here[path][...]
            if new.shape != old.shape:
                raise ValueError(
                    f"the update has {new.shape} at {name}, and the policy {old.shape}; give parameters of the same "
                    "model"
                )
            value = new[...].astype(old.dtype)
            # Else left as it is: an array that was put somewhere has another key in jit, which would compile anew.
            value = value if value.sharding == old.sharding else jax.device_put(value, old.sharding)
            taken.append((path, here[path].replace(value)))
        nnx.update(self._model, nnx.from_flat_state(taken))
        self.target = self._adapt(self._model)

    def pad_id(self) -> int:
        """Returns the token that pads."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """Returns the token that ends a text."""
        return self._tokenizer.eos_id()

    def model(self) -> nnx.Module:
        """Returns the policy."""
        return self._model

    def _encode(self, prompt: str) -> np.ndarray:
        first = self._tokenizer.bos_id()
        tokens = ([first] if first else []) + list(self._tokenizer.encode(prompt))
        return np.asarray(self._tokenizer.dedup_bos_ids(tokens), np.int32)

    def _without_end(self, tokens: np.ndarray, config: base_rollout.RolloutConfig) -> list[int]:
        ends = config.eos_tokens or [self.eos_id()]
        return tokens[: -1 if tokens[-1] in ends else None].tolist()


def _repeats(prompts: Sequence[str]) -> int:
    """Returns the largest n such that each prompt stands n times, or a multiple, before the next one."""
    return math.gcd(*(len(list(group)) for _, group in itertools.groupby(prompts)))


def _seed(seed: Any, call: int) -> Array:
    """Returns the key of a call: of an integer or a JAX key of either sort, or None, and the call's number."""
    if seed is None or (jnp.ndim(seed) == 0 and jnp.issubdtype(jnp.asarray(seed).dtype, jnp.integer)):
        key = jax.random.key(0 if seed is None else seed)
    else:
        key = seed if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(seed)
    return jax.random.fold_in(key, call)
