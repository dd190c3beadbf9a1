"""Recipes, read from ``models/NAME/recipe.toml``: which model to train, on which text, with which losses."""

import dataclasses
import hashlib
import math
import tomllib
from pathlib import Path
from typing import Any

from specjax.checks import check_integer
from specjax.hf.config import decoder_config
from specjax.training.losses import DSPARK, LOSSES

TEXTS = ("corpus", "samples", "both", "on_policy")
BLOCK_HEADS = ("dflash", "dspark")
HEADS = ("mtp", "eagle", "medusa", *BLOCK_HEADS)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of the optimiser with one loss.

    Attributes:
      loss: "next_token"; or "kl" or "total_variation" against the target that this model drafts for; or, for heads that
        draft blocks, "dspark" (``specjax.training.blocks``).
      text: "corpus"; "samples", drawn from the target; "both", in turn; or "on_policy", drawn from the trained model
        when the stage begins (Agarwal et al. 2024, arXiv 2306.13649; Zhou et al. 2024, DistillSpec, arXiv 2310.08461).
        Each stage on "on_policy" draws new text.
      steps: optimiser steps.
      rows: windows in a batch.
      sequence: tokens in a window.
      peak_learning_rate: the learning rate after ``warmup_steps``; it then decays linearly to zero.
      warmup_steps: steps in which the learning rate rises linearly; fewer than ``steps``.
      weight_decay: AdamW's weight decay, on matrices only.

    Raises:
      ValueError: a name is unknown, or a number is out of range.
    """

    loss: str
    steps: int
    rows: int
    sequence: int
    peak_learning_rate: float
    text: str = "corpus"
    warmup_steps: int = 50
    weight_decay: float = 0.1

    def __post_init__(self):
        if self.loss not in (*LOSSES, DSPARK):
            raise ValueError(f"stage loss {self.loss!r} is unknown; choose from {(*LOSSES, DSPARK)}")
        if self.text not in TEXTS:
            raise ValueError(f"stage text {self.text!r} is unknown; choose from {TEXTS}")
        for name, least in (("steps", 1), ("rows", 1), ("sequence", 2), ("warmup_steps", 0)):
            check_integer(f"stage {name}", getattr(self, name), least)
        for name in ("peak_learning_rate", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"stage {name} must be a number of at least 0, got {value!r}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"stage warmup_steps {self.warmup_steps} must be below its steps, {self.steps}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The description of a model or draft head to train.

    Attributes:
      name: NAME of the folders ``models/NAME`` and ``checkpoints/NAME``.
      seed: the seed of parameters, batches and samples.
      architecture: the content of the ``config.json``: Hugging Face's keys of a model or of a draft head.
      stages: the stages, trained one after the other.
      drafts_for: the name of the target that this model drafts for, or None. The target's tokenizer is used.
      sample_tokens: how many tokens are drawn for stages on samples, and for each stage on "on_policy".
      digest: hash of the recipe file.
      head: the kind of draft head that is trained, one of ``HEADS``; None for a model.
      chain_steps: drafts of a chain that a draft head is trained for; 1 for models.

    Raises:
      ValueError: a number is out of range, or a name is unknown; the architecture is not supported; a stage's windows
        are longer than the model's positions; or a draft head has no target.
    """

    name: str
    seed: int
    architecture: dict[str, Any]
    stages: tuple[Stage, ...]
    drafts_for: str | None
    sample_tokens: int
    digest: str
    head: str | None = None
    chain_steps: int = 1

    def __post_init__(self):
        # All contradictions are found here, before training starts.
        check_integer("seed", self.seed, 0)
        check_integer("chain_steps", self.chain_steps, 1)
        if self.drafts_for is not None and not isinstance(self.drafts_for, str):
            raise ValueError(f"drafts_for is {self.drafts_for!r}; give the name of a folder of checkpoints/")
        if self.head is not None and self.head not in HEADS:
            raise ValueError(f"head {self.head!r} is unknown; choose from {HEADS}")
        if self.head is not None and self.drafts_for is None:
            raise ValueError(f"a draft head of kind {self.head!r} needs drafts_for")
        # A draft head's config is read with its target, which is not open here (``make_trainee``).
        if self.head is None:
            longest = decoder_config(self.architecture, strict=True).max_position_embeddings
            for stage in self.stages:
                if stage.sequence > longest:
                    raise ValueError(f"stage sequence {stage.sequence} exceeds max_position_embeddings {longest}")
        if self.head is not None and any(stage.text == "on_policy" for stage in self.stages):
            raise ValueError(
                f"a draft head of kind {self.head!r} draws no text of its own; give 'both' for 'on_policy'"
            )
        if self.head not in BLOCK_HEADS and any(stage.loss == DSPARK for stage in self.stages):
            raise ValueError(f"stage loss {DSPARK!r} is for heads of kind {BLOCK_HEADS}; choose from {LOSSES}")
        if self.head in (None, *BLOCK_HEADS) and self.chain_steps != 1:
            raise ValueError(f"chain_steps is {self.chain_steps}, but only heads that draft chains are trained in them")
        check_integer("sample_tokens", self.sample_tokens, 0)
        if not self.stages:
            raise ValueError("stages is empty; give at least one [[stages]]")


def read_recipe(folder: Path) -> Recipe:
    """Reads ``recipe.toml`` in a model's folder. The folder's name is the recipe's name.

    Raises:
      ValueError: the file is missing or is not TOML; a key or a value is unknown or missing; or a stage needs a target
        to imitate or to draw text from, and the recipe names none.
    """
    file = folder / "recipe.toml"
    try:
        text = file.read_text(encoding="utf-8-sig")
        raw: dict[str, Any] = tomllib.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; give a folder of models/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from None
    # The two tables that every recipe has are checked first, since the code below reads into them.
    for key, kind, example in (("architecture", dict, "[architecture]"), ("stages", list, "[[stages]]")):
        if not isinstance(raw.get(key), kind):
            raise ValueError(f"{file}: {key} is {'missing' if key not in raw else repr(raw[key])}; give {example}")
    architecture = raw.pop("architecture")
    # Models and MTP modules have a decoder's config; a family is needed to read one.
    if "head" not in raw or raw["head"] == "mtp":
        architecture = {"model_type": "llama", **architecture}
    # Known keys are popped, so that only unknown ones are left. A misspelled key must not be ignored.
    try:
        recipe = Recipe(
            name=folder.resolve().name,
            seed=raw.pop("seed", 0),
            architecture=architecture,
            stages=tuple(Stage(**stage) for stage in raw.pop("stages")),
            drafts_for=raw.pop("drafts_for", None),
            sample_tokens=raw.pop("sample_tokens", 0),
            digest=hashlib.sha256(text.encode()).hexdigest()[:16],
            head=raw.pop("head", None),
            chain_steps=raw.pop("chain_steps", 1),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    if raw:
        raise ValueError(f"{file}: unknown keys {sorted(raw)}")
    # Stages that need the target, or text that is drawn.
    for stage in recipe.stages:
        if recipe.drafts_for is None and (stage.loss != "next_token" or stage.text != "corpus"):
            raise ValueError(f"{file}: a stage with loss {stage.loss!r} on {stage.text!r} needs drafts_for")
        if stage.text != "corpus" and recipe.sample_tokens < 1:
            raise ValueError(f"{file}: a stage on {stage.text!r} needs sample_tokens")
    return recipe
