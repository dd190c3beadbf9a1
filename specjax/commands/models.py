"""The models, prompts and verification rule of a benchmark."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

import specjax
from specjax.aot.programs import draft_config
from specjax.checkpoint.fetched import config_path
from specjax.commands import hosts, measure
from specjax.commands.accelerator.speed import random_model
from specjax.commands.drafter_spec import TREE_RULES, named_drafter
from specjax.commands.places import folder_or_shipped
from specjax.hf.config import read_config
from specjax.hf.gguf import is_gguf
from specjax.transformer import DecoderConfig

DRAFTLESS = {"width", "rollback", "prompts", "repeats", "rollouts"}  # benchmarks for which no --draft is opened
SPARE = 64  # positions past prompt and new tokens, for the drafts of the last round


def rule(args: argparse.Namespace, drafter: Any) -> Any:
    """Returns the verification rule of a drafter's rounds; ``rates_of`` has checked ``--forced-acceptance``."""
    chosen = specjax.verify.default_rule(drafter)
    if getattr(drafter, "tree_depth", None) is not None:
        return TREE_RULES[args.tree_rule] if args.tree_rule else chosen
    rates = rates_of(args, drafter.num_draft)
    return chosen if rates is None else specjax.testing.ForcedAcceptance(chosen, rates)


def rates_of(args: argparse.Namespace, num_draft: int) -> tuple[float, ...] | None:
    """Returns the rates of ``--forced-acceptance`` for rounds with ``num_draft`` drafts, or None.

    Raises:
      ValueError: a number is not from 0 to 1, or there are too few numbers.
    """
    rates = args.forced_acceptance
    if rates is None:
        return None
    if odd := [rate for rate in rates if not 0 <= rate <= 1]:
        raise ValueError(f"--forced-acceptance has {odd[0]}; give rates from 0 to 1")
    rates = rates * num_draft if len(rates) == 1 else rates
    if len(rates) < num_draft:
        raise ValueError(
            f"--forced-acceptance has {len(rates)} rates for --num-draft {num_draft}; give 1 rate or {num_draft}"
        )
    return tuple(rates[:num_draft])


def open_all(args: argparse.Namespace, chosen: list[str], mesh: Mesh | None) -> None:
    """Opens target and draft, once for all benchmarks, and writes them into ``args``: ``model`` and ``drafts``.

    ``opened`` is the target with its tokenizer, unless weights are random. Not all benchmarks need a draft.

    Raises:
      ValueError: a folder or config is missing or wrong, or does not fit the benchmarks.
    """
    given = args.target
    if args.draft is not None and DRAFTLESS.issuperset(chosen):
        cure = "give --drafters model:DIR" if "prompts" in chosen else "leave it out"
        raise ValueError(f"--draft is given, and {' and '.join(chosen)} do not read it; {cure}")
    args.target = folder_or_shipped(given)
    args.random_weights = args.random_weights or (args.target.is_file() and not is_gguf(args.target))
    if args.random_weights:
        _check_random(args, chosen, mesh)
        _draw_all(args, given)
        return
    if not DRAFTLESS.issuperset(chosen):
        args.draft = folder_or_shipped(args.draft, "py-14m-draft", "--draft")
        hosts.check_same_folders(args.target, args.draft)
    args.opened = specjax.open(args.target, mesh=mesh, quantize=args.quantize, dtype=args.dtype)
    args.model = args.opened.model
    if not DRAFTLESS.issuperset(chosen):
        _open_draft(args, mesh)
        _check_positions(args, chosen)


def _open_draft(args: argparse.Namespace, mesh: Mesh | None) -> None:
    # The draft is small, so it is whole on each device.
    args.drafts = {
        g: specjax.load_drafter(
            f"model:{args.draft}", args.model, g, mesh=mesh, quantize=args.quantize_draft, dtype=args.dtype
        )
        for g in args.num_draft
    }
    args.config = read_config(config_path(args.target))[0]
    args.draft_config = read_config(config_path(args.draft))[0]


def _check_random(args: argparse.Namespace, chosen: list[str], mesh: Mesh | None) -> None:
    if mesh is not None:
        raise ValueError("random weights are made on one device; leave out --mesh and --distributed")
    if trained := [what for what in chosen if what in ("drafters", "peer", "prompts", "repeats", "rollouts")]:
        raise ValueError(f"{trained[0]} needs trained weights; give --target DIR without --random-weights")


def _check_positions(args: argparse.Namespace, chosen: list[str]) -> None:
    """Raises ValueError if a context does not fit the models' positions."""
    if not {"sweep", "startup"}.intersection(chosen):
        return
    limit = min(config.max_position_embeddings for config in (args.config, args.draft_config))
    if max(args.context) + args.new_tokens > limit:
        raise ValueError(
            f"--context {max(args.context)} and --new-tokens {args.new_tokens} are more than the {limit} positions of "
            "target and draft; give smaller numbers, or --random-weights"
        )


def _draw_all(args: argparse.Namespace, given: Path | None) -> None:
    """Makes target and draft with random weights."""

    def shape(path: Path) -> DecoderConfig:
        return read_config(config_path(path))[0]

    args.config = _longer(args, shape(args.target))
    # The shipped draft belongs to the shipped target. Other targets get a draft of their own sizes.
    if args.draft is None and given is not None:
        args.draft_config = _longer(args, draft_config(args.config))
    else:
        args.draft_config = _longer(args, shape(folder_or_shipped(args.draft, "py-14m-draft", "--draft")))
    if args.draft_config.vocab_size != args.config.vocab_size:
        raise ValueError(
            f"--draft has a vocabulary of {args.draft_config.vocab_size}, and --target one of "
            f"{args.config.vocab_size}; give a draft with the target's"
        )
    args.model, draft = random_model(args.config, 0, args.dtype), random_model(args.draft_config, 1, args.dtype)
    if args.quantize:
        args.model = specjax.quantize(args.model, args.quantize)
    if args.quantize_draft:
        draft = specjax.quantize(draft, args.quantize_draft)
    args.drafts = {g: specjax.ModelDrafter(draft, g) for g in args.num_draft}


def _longer(args: argparse.Namespace, config: DecoderConfig) -> DecoderConfig:
    """Returns the config with at least as many positions as the contexts need."""
    positions = max(config.max_position_embeddings, max(args.context) + args.new_tokens + SPARE)
    return dataclasses.replace(config, max_position_embeddings=positions)


def named_drafters(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Opens the drafters of ``--drafters`` and returns them with their specs, one for each ``--num-draft``.

    Raises:
      ValueError: as for ``specjax.load_drafter``.
    """
    tokenizer = args.opened.need_tokenizer()
    options = {"quantize": args.quantize_draft, "tree": args.tree, "siblings": args.siblings, "dtype": args.dtype}
    return [
        (spec, named_drafter(spec, args.opened, tokenizer, g, **options))
        for spec in args.drafters
        for g in args.num_draft
    ]


def prompts(args: argparse.Namespace, length: int, count: int) -> np.ndarray:
    """Returns ``count`` prompts of ``length`` tokens, int32: excerpts of held-out modules, or random tokens."""
    if args.random_weights:
        return np.random.default_rng(0).integers(0, args.config.vocab_size, (count, length)).astype(np.int32)
    return measure.held_out_excerpts(args.target, length, count)
