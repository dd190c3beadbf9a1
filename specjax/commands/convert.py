"""The command ``convert``: makes a checkpoint folder of a Hugging Face folder."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import specjax
from specjax.commands.console import add_adapter, add_ignored_keys
from specjax.hf.families import FAMILIES, RENAMED
from specjax.hf.keys import read_json
from specjax.hf.multimodal import MULTIMODAL
from specjax.hf.safetensors import open_tensors
from specjax.hf.weights import PLAIN

VERIFIED_TOKENS = 48  # random tokens over which logits are compared
TOLERANCE = 1e-3  # largest difference of two float32 logits


ABOUT = """Converts a Hugging Face folder to a checkpoint folder: %(prog)s SRC DST.

SRC holds config.json, safetensors and a tokenizer, or is a GGUF file. DST appears once it is whole. (specjax.open opens
SRC, too.)
"""


def main(argv: list[str] | None = None, prog: str = "convert_hf.py") -> int:
    """Runs the command and returns the exit status."""
    parser = argparse.ArgumentParser(prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="Hugging Face folder or GGUF file")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to make")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored; quantised: as their scales)")
    add_adapter(parser, "the model")
    add_ignored_keys(parser)
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers, on this machine's CPU")
    args = parser.parse_args(argv)
    # The needs of --verify are checked first, since the conversion may take long.
    if args.verify and not args.source.is_dir():
        parser.error(f"--verify is given and SRC is {str(args.source)!r}, no folder; give a folder, or omit --verify")
    if args.verify and is_quantized(args.source):
        parser.error("--verify compares with transformers on a CPU, which cannot run most quantised weights; omit it")
    if args.verify and args.adapter is not None:
        parser.error("--verify compares with the model in SRC, without --adapter; omit one of the two")
    if args.verify and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        parser.error("--verify needs torch and transformers; pip install 'specjax[parity]'")
    if args.verify and (missing := missing_class(args.source)):
        parser.error(f"--verify needs transformers' {missing}, which the installed version lacks; install a newer one")
    # Errors of the source are one line. Ctrl-C leaves no folder.
    try:
        with tqdm(unit="B", unit_scale=True, desc="reading", disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            ignored, adapter = args.ignore_config_keys, args.adapter
            report = specjax.convert_hf(args.source, args.destination, args.dtype, progress, ignored, adapter)
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(*report, sep="\n")
    print(f"wrote {args.destination}")
    # The conversion is whole by now: an error of transformers does not undo it.
    if not args.verify:
        return 0
    try:
        return verify(args.source, args.destination)
    except Exception as error:  # transformers may raise anything
        print(f"{prog}: it is written, but not verified: {error}", file=sys.stderr)
        return 1


def is_quantized(source: Path) -> bool:
    """Returns whether a folder's tensors are quantised. Plain floats are not, whatever the config says."""
    try:
        named = read_json(source / "config.json").get("quantization_config")
        return bool(named) and any(tensor.dtype not in PLAIN for tensor in open_tensors(source).values())
    except ValueError:  # the conversion reports this error
        return False


def class_name(source: Path) -> str | None:
    """Returns the name of the class of transformers that computes a folder's model; None if no class is known.

    For a multimodal model, this is the class of the whole model.
    """
    try:
        kind = str(read_json(source / "config.json").get("model_type"))
    except ValueError:  # the conversion reports this error
        return None
    kind = RENAMED[kind].family if kind in RENAMED else kind
    known = {**FAMILIES, **MULTIMODAL}
    return known[kind].architecture if kind in known else None


def missing_class(source: Path) -> str | None:
    """Returns the name of the class that the installed transformers lacks, or None if it lacks none."""
    import transformers

    name = class_name(source)
    return None if name is None or hasattr(transformers, name) else name


def verify(source: Path, destination: Path) -> int:
    """Compares the float32 logits of both models over random tokens; returns an exit status."""
    import torch
    import transformers

    name = class_name(source)
    assert name is not None  # the folder was converted
    reference = getattr(transformers, name)

    # Both compute in float32 with the parameters as stored, so that only the computations differ.
    stored = json.loads((destination / "config.json").read_text(encoding="utf-8"))["torch_dtype"]
    config = reference.config_class.from_pretrained(source)
    vars(config).pop("quantization_config", None)  # a left-over (``is_quantized``), which transformers would act on
    theirs = reference.from_pretrained(source, config=config, dtype=torch.float32).eval()
    for parameter in theirs.parameters():  # buffers are computed, so they stay as they are
        parameter.data = parameter.data.to(getattr(torch, stored)).float()
    # Llama 4's multimodal class cannot run without images in transformers 5.24.
    theirs = theirs.language_model if name == MULTIMODAL["llama4"].architecture else theirs
    ours = specjax.load(destination, "float32")
    length = min(VERIFIED_TOKENS, ours.max_positions or VERIFIED_TOKENS)
    tokens_bt = np.random.default_rng(0).integers(0, ours.vocab_size, (1, length)).astype(np.int32)
    with torch.no_grad():
        expected_btv = theirs(torch.tensor(tokens_bt, dtype=torch.long)).logits.numpy()
    cache = ours.init_cache(1, length)
    feed = specjax.Feed(jnp.asarray(tokens_bt), jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32))
    logits_btv = np.asarray(ours.forward(ours.params, feed, cache).logits_btv)
    difference = float(np.abs(logits_btv - expected_btv).max())
    alike = float((logits_btv.argmax(-1) == expected_btv.argmax(-1)).mean())
    print(
        f"verified over {length} random tokens: largest logit difference {difference:.1e} "
        f"(limit {TOLERANCE:.0e}; the logits deviate by {expected_btv.std():.2f}), likeliest token equal in {alike:.0%}"
    )
    return 0 if difference <= TOLERANCE else 1
