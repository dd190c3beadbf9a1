"""The benchmark ``rollouts``: reinforcement learning of a toy reward, with drafts that stay as they are or keep up."""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

import specjax
from specjax import training
from specjax.checkpoint.spec import short_name
from specjax.commands import models
from specjax.commands.console import print_table

PROMPT, SAMPLES = 32, 4  # tokens of a prompt, and completions of each
GROUPS = 5  # parts of the run that are told apart
DRAFT_RATE = 5e-4  # the learning rate of the draft
CLIP = 0.2  # of the ratio of the policies


@dataclasses.dataclass
class Way:
    """One way to write the same rollouts, and what it took in each update.

    Attributes:
      drafter: None decodes plainly.
      trained: the state of a draft that keeps up, or None.
      seconds: of the rollouts.
      training: seconds in which the draft was trained.
      tokens_per_pass: emitted tokens for each pass of the target over a row.
      same: share of completions that are those of plain decoding.
    """

    drafter: Any = None
    trained: training.DraftState | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    training: list[float] = dataclasses.field(default_factory=list)
    tokens_per_pass: list[float] = dataclasses.field(default_factory=list)
    same: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Policy:
    """The policy in training: the target, float32 parameters, the optimiser's state and the learning rate."""

    target: specjax.LanguageModel
    params: Any
    moments: Any
    rate: float

    @classmethod
    def of(cls, target: specjax.LanguageModel, rate: float) -> "Policy":
        params = jax.tree.map(lambda x: x.astype(jnp.float32), target.params)
        return cls(target, params, optax.adam(rate).init(params), rate)

    def update(self, rollout: specjax.Rollout, reward_n: Array) -> None:
        """Takes one step of GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1), without its KL term."""
        self.params, self.moments = _update(self.rate, self.params, self.moments, self.target, rollout, reward_n)
        cast = jax.tree.map(lambda new, old: new.astype(old.dtype), self.params, self.target.params)
        self.target = self.target.with_params(cast)


@functools.partial(jax.jit, static_argnums=0)
def _update(rate: float, params: Any, moments: Any, target: Any, rollout: specjax.Rollout, reward_n: Array) -> Any:
    reward_pm = reward_n.reshape(-1, SAMPLES)  # completions of a prompt follow each other
    centred_pm = reward_pm - reward_pm.mean(1, keepdims=True)
    advantage_n1 = (centred_pm / (reward_pm.std(1, keepdims=True) + 1e-4)).reshape(-1, 1)
    mask_nt, old_nt = rollout.mask[:, 1:], rollout.logprobs
    assert old_nt is not None

    def loss(params: Any) -> Array:
        feed = specjax.Feed(rollout.tokens, jnp.zeros_like(rollout.lengths), rollout.lengths)
        logits = target.forward(params, feed, target.init_cache(*rollout.tokens.shape)).logits_btv.astype(jnp.float32)
        log_nt = -optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], rollout.tokens[:, 1:])
        ratio_nt = jnp.exp(jnp.where(mask_nt, log_nt - old_nt[:, 1:], 0))
        clipped_nt = jnp.clip(ratio_nt, 1 - CLIP, 1 + CLIP)
        gain_nt = jnp.minimum(ratio_nt * advantage_n1, clipped_nt * advantage_n1)
        return -jnp.sum(jnp.where(mask_nt, gain_nt, 0)) / jnp.maximum(mask_nt.sum(), 1)

    updates, moments = optax.adam(rate).update(jax.grad(loss)(params), moments)
    return optax.apply_updates(params, updates), moments


def bench_rollouts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains the policy for ``--updates``; in each, all ways write the same rollouts, in turn."""
    try:
        opened = models.named_drafters(args)
        trainer = training.DraftTrainer(learning_rate=DRAFT_RATE)
        for _, drafter in opened:
            trainer.init(drafter)
    except (TypeError, ValueError) as error:
        sys.exit(f"{args.prog}: error: {error}")
    tokenizer = args.opened.need_tokenizer()
    words = [tokenizer.decode([i]) for i in range(args.model.vocab_size)]
    rewarded = np.asarray([word.strip().isalpha() for word in words])
    stop = tuple(i for i, word in enumerate(words) if "\n\n" in word)
    rows = []
    for spec, drafter in opened:
        rows += _train(args, trainer, f"{short_name(spec)}, {drafter.num_draft} drafts", drafter, rewarded, stop)
    title = f"Rollouts of a policy in training; {SAMPLES} completions of each prompt, rule coupled, temperature 1"
    return print_table(title, rows)


def _train(
    args: argparse.Namespace,
    trainer: training.DraftTrainer,
    name: str,
    drafter: Any,
    rewarded_v: np.ndarray,
    stop: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Returns a row for each part of the run of one drafter."""
    policy = Policy.of(args.model, args.learning_rate)
    prompts = models.prompts(args, PROMPT, args.prompts)
    batch = min((args.batch or [8])[0], len(prompts) * SAMPLES)
    ways = {"plain": Way(), "frozen": Way(drafter), "refreshed": Way(drafter, trainer.init(drafter))}
    rewards, resting = [], {"all": [], "replaced": []}
    ask = functools.partial(
        specjax.rollout, samples=SAMPLES, rows=batch, verify=specjax.verify.coupled, stop_tokens=stop,
        max_new_tokens=args.new_tokens, slots=PROMPT + args.new_tokens + drafter.num_draft + 1, fixed=True,
    )  # fmt: skip
    bar = tqdm(range(-1, args.updates), desc=name, unit="update")
    for update in bar:  # the first one compiles
        key, found = jax.random.fold_in(jax.random.key(0), max(update, 0)), {}
        order = [list(ways)[(update + i) % len(ways)] for i in range(len(ways))]  # no way is always first
        for which in order:
            draft = ways[which].drafter
            sampling = specjax.Sampling(seed=key)
            found[which], seconds = _timed(ask, policy.target, prompts, drafter=draft, sampling=sampling)
            ways[which].seconds.append(seconds)
        plain = found["plain"]
        for which, way in ways.items():
            rollout = found[which]
            way.tokens_per_pass.append(float(rollout.stats.tokens_per_round))
            way.same.append(float((rollout.tokens == plain.tokens).all(1).mean()))
        # What rests is counted for the frozen draft, whose rounds are as many in a batch of all completions.
        rounds_n = np.asarray(found["frozen"].stats.rounds)
        resting["all"].append(1 - rounds_n.sum() / rounds_n.max() / len(rounds_n))
        resting["replaced"].append(float(found["frozen"].resting_share))
        reward_n = jnp.sum(jnp.asarray(rewarded_v)[plain.tokens] & plain.mask, 1) / jnp.maximum(plain.mask.sum(1), 1)
        rewards.append(float(reward_n.mean()))
        told = {which: way.tokens_per_pass[-1] for which, way in ways.items() if way.drafter is not None}
        bar.set_postfix(told | {"reward": rewards[-1]})
        old = policy.params, policy.moments, policy.target
        policy.update(plain, reward_n)
        if update < 0:
            policy.params, policy.moments, policy.target = old
        kept = ways["refreshed"]
        (state, _), seconds = _timed(trainer.update, kept.trained, policy.target, found["refreshed"])
        kept.training.append(seconds)
        if update >= 0:
            kept.trained, kept.drafter = state, state.drafter
    return [_row(name, ways, rewards, resting, part) for part in np.array_split(np.arange(args.updates), GROUPS)]


def _timed(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    """Returns what a call returns, and the seconds that it took."""
    begin = time.perf_counter()
    return jax.block_until_ready(call(*args, **options)), time.perf_counter() - begin


def _row(
    name: str, ways: dict[str, Way], rewards: list[float], resting: dict[str, list[float]], part: np.ndarray
) -> dict[str, Any]:
    """Returns the figures of some updates. The entry before the first update is of the run that compiled."""
    at = part + 1

    def mean(values: list[float]) -> float:
        return float(np.asarray(values)[at].mean())

    def total(values: list[float]) -> float:
        return float(np.asarray(values)[at].sum())

    plain, frozen, refreshed = (ways[which] for which in ("plain", "frozen", "refreshed"))
    base = total(plain.seconds)
    return {
        "drafter": name,
        "updates": f"{part[0] + 1} to {part[-1] + 1}",
        "reward": mean(rewards),
        "same texts": min(mean(frozen.same), mean(refreshed.same)),
        "tokens per pass, frozen": mean(frozen.tokens_per_pass),
        "refreshed": mean(refreshed.tokens_per_pass),
        "speed-up, frozen": base / total(frozen.seconds),
        "speed-up, refreshed": base / total(refreshed.seconds),
        "with training": base / (total(refreshed.seconds) + total(refreshed.training)),
        "resting, all rows": mean(resting["all"]),
        "resting, replaced": mean(resting["replaced"]),
    }
