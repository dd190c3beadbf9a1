"""The benchmark ``peer``: other libraries with the same weights and prompts, timed in turn with specjax."""

import argparse
import contextlib
import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import specjax
from specjax.commands import keras_peer, measure, models, transformers_peer
from specjax.commands.console import print_table
from specjax.commands.measure import Way

PROMPT = 64  # tokens
# Module of each peer, and what it needs beside that.
PEERS = {"transformers": ("transformers", "torch"), "keras-hub": ("keras_hub", "keras")}
CURES = {
    "transformers": "install it with `pip install transformers torch`",
    "keras-hub": "install it with `pip install keras-hub`",
}


def check_device() -> None:
    """Raises ValueError unless specjax runs on the CPU."""
    if jax.default_backend() != "cpu":
        raise ValueError("--peer compares on the CPU; set JAX_PLATFORMS=cpu")


def check(name: str) -> None:
    """Raises ValueError if a peer is not installed."""
    for module in PEERS[name]:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"--peer {name} needs the package {module}, which is not installed; {CURES[name]}")


def bench_peer(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times greedy decoding of one row beside other libraries, and compares the texts token by token."""
    prompts = models.prompts(args, PROMPT, args.prompts)
    ways = own_ways(args)
    with exported(args.target, args.draft) as (target, draft):
        for name in args.peer:
            sizes = {"num_draft": args.num_draft[0], "new_tokens": args.new_tokens}
            try:
                if name == "transformers":
                    found, note = transformers_peer.ways(target, draft, **sizes, threads=args.torch_threads)
                else:
                    found, note = keras_peer.ways(target, draft, **sizes)
            except ValueError as error:
                raise SystemExit(f"{args.prog}: error: {error}") from error
            ways += found
            args.notes.append(note)
        seconds, texts = timed(ways, prompts, args.repeats)
    rows = table(ways, seconds, texts, args.new_tokens * len(prompts))
    print_table("Beside other libraries: greedy, float32, one row of text at a time", rows)
    print("\n".join(args.notes) + "\n")
    return rows


@contextlib.contextmanager
def exported(*sources: Path) -> Iterator[list[Path]]:
    """Yields Hugging Face folders of models in float32, in a temporary folder."""
    with tempfile.TemporaryDirectory() as place:
        folders = []
        for number, source in enumerate(sources):
            folders.append(Path(place, str(number)))
            if not (source / "params").is_dir():  # what transformers opens, and as what, need not be what specjax does
                specjax.convert_hf(source, Path(place, f"{number}-checkpoint"), "float32")
                source = Path(place, f"{number}-checkpoint")
            specjax.export_hf(source, folders[-1], "float32")
        yield folders


def own_ways(args: argparse.Namespace) -> list[Way]:
    """Returns specjax's ways: plain, the draft model with all drafts or as many as pay, and n-grams."""
    g = args.num_draft[0]

    def way(decoding: str, kind: str, **options: Any) -> Way:
        def decode(prompt: np.ndarray) -> np.ndarray:
            sampling = specjax.Sampling(temperature=0.0)
            generation = specjax.generate(
                args.model, prompt[None], sampling=sampling, max_new_tokens=args.new_tokens, **options
            )
            return np.asarray(generation.tokens)[0, len(prompt) : len(prompt) + args.new_tokens]

        return Way("specjax", decoding, kind, decode)

    return [
        way("plain", "plain"),
        way(f"draft model, {g} drafts", "", drafter=args.drafts[g], fixed=True),
        way("draft model, adaptive", "draft model", drafter=args.drafts[g]),
        way("n-grams, adaptive", "prompt lookup", drafter=specjax.NGramDrafter(g)),
    ]


def timed(ways: list[Way], prompts: np.ndarray, repeats: int) -> tuple[list[float], list[list[np.ndarray]]]:
    """Returns, for each way, the sum over prompts of the median seconds, and the texts."""
    seconds, texts = [0.0] * len(ways), [[] for _ in ways]
    for prompt in prompts:
        last: dict[str, np.ndarray] = {}

        def decode(i: str, prompt: np.ndarray = prompt, last: dict[str, np.ndarray] = last) -> None:
            last[i] = np.asarray(ways[int(i)].decode(prompt))

        calls = {str(i): functools.partial(decode, str(i)) for i in range(len(ways))}
        medians = measure.medians(calls, max(3, repeats // 5))
        for i in range(len(ways)):
            seconds[i] += medians[str(i)]
            texts[i].append(last[str(i)])
    return seconds, texts


def table(ways: list[Way], seconds: list[float], texts: list[list[np.ndarray]], tokens: int) -> list[dict[str, Any]]:
    """Returns the rows: rates, specjax's rate over the peer's, and how many texts equal specjax's plain text."""
    own = {way.kind: spent for way, spent in zip(ways, seconds, strict=True) if way.library == "specjax"}
    rows = []
    for way, spent, found in zip(ways, seconds, texts, strict=True):
        differs = [first_difference(a, b) for a, b in zip(found, texts[0], strict=True)]
        rows.append(
            {
                "library": way.library,
                "decoding": way.decoding,
                "tokens/s": tokens / spent,
                "specjax plain / this": own["plain"] / spent if way.library == "specjax" else None,
                "specjax / this": spent / own[way.kind] if way.library != "specjax" else None,
                "text equal": f"{differs.count(-1)} of {len(differs)}",
                "first difference": " ".join(str(place) for place in differs if place >= 0) or "none",
            }
        )
    return rows


def first_difference(a: np.ndarray, b: np.ndarray) -> int:
    """Returns the first place at which two texts differ, counted from 0; -1 if they are equal."""
    if len(a) == len(b) and (a == b).all():
        return -1
    shared = min(len(a), len(b))
    return int(np.argmax(a[:shared] != b[:shared])) if (a[:shared] != b[:shared]).any() else shared
