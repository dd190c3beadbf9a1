"""Continues prompts by speculative decoding and shows what it gained.

python scripts/generate.py                                    the shipped pair on a built-in prompt
python scripts/generate.py --prompt 'def mean(x):' --compare  speed-up over plain decoding
head -30 x.py | python scripts/generate.py --trace t.html     a page that shows where each token came from
python scripts/generate.py --target DIR --chat --prompt 'Why is the sky blue?'      asks a chat model
python scripts/generate.py --target DIR --mesh data=2,tensor=4      splits it over eight devices (docs/distributed.md)
"""

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C and `| head` end it quietly and at once, even while modules load or XLA compiles
    for name in ("SIGINT", "SIGPIPE"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)

import hosts
import jax
import numpy as np
from drafter_spec import folders_of, named_drafter, short_name
from jax.sharding import Mesh
from trace_page import Trace, render
from transcript import COUNTS, Transcript, follow

import specjax

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "checkpoints" / "py-14m"
SHIPPED_DRAFT = ROOT / "checkpoints" / "py-14m-draft"
PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self, items=()):'''
VERIFY = {"token": specjax.verify.token, "block": specjax.verify.block, "coupled": specjax.verify.coupled}
COMPARED_RUNS = 5
STDIN_WAIT_S = 3.0  # a pipe that nobody writes to must not hold up a call without arguments
# Sampling parameters and the values at which they do nothing.
IDLE = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str):
        self.exit(2, f"error: {hosts.label()}{' '.join(message.split())}\n")


def utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8") from None
    return text


def text_file(path: Path) -> str:
    """Returns the text without its last newline: a token joins that with the indentation which is to follow."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise ValueError(f"--prompt-file: {path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"--prompt-file: {path} cannot be read: {error.strerror}") from None


def check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError unless files can be written where they are wanted, found out by making one beside each."""
    for name in ("json", "trace"):
        path = getattr(args, name)
        if path is None:
            continue
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"--{name}: {path} is not a regular file; give the name of one, or a new name")
        folder = path.absolute().parent
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"--{name}: {folder} cannot be written to: {error.strerror}") from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that nobody ever sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = parser.add_argument_group("prompts", "several are one batch; text piped in is one when none is given")
    text.add_argument("--prompt", dest="prompts", action="append", type=utf8, metavar="TEXT")
    text.add_argument("--prompt-file", dest="prompts", action="append", type=Path, metavar="FILE")
    text.add_argument("--chat", action="store_true", help="prompts are messages, laid out by the target's template")
    text.add_argument("--system", type=utf8, metavar="TEXT", help="system message ahead of each, with --chat")
    text.add_argument(
        "--stop", action="append", type=utf8, default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    models = parser.add_argument_group("models")
    models.add_argument("--target", type=Path, default=SHIPPED, metavar="DIR", help="checkpoint (default: py-14m)")
    models.add_argument(
        "--drafter",
        metavar="SPEC",
        help="model:DIR, mtp:DIR, eagle:DIR, medusa:DIR, early-exit:LAYERS, ngram, none, or cascade:A,B, B where A has "
        "nothing (default: the shipped draft, or ngram)",
    )
    models.add_argument(
        "--ignore-config-key",
        dest="ignore_config_keys",
        action="append",
        default=[],
        metavar="KEY",
        help="read config.json without this key, past a refusal of what it says; may be repeated",
    )
    models.add_argument("--num-draft", type=int, default=4, metavar="N", help="tokens drafted per round (default: 4)")
    models.add_argument(
        "--shard-draft",
        action="store_true",
        help="over a mesh, split the drafter like the target (default: it is whole)",
    )
    models.add_argument("--verify", choices=VERIFY, default="block", help="how drafts are verified (default: block)")
    draws = parser.add_argument_group("sampling")
    draws.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    draws.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0 keeps all")
    draws.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens that reach P")
    draws.add_argument("--min-p", type=float, default=0.0, metavar="P", help="keep tokens of P times the likeliest")
    draws.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is none")
    draws.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="0 is none")
    draws.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="0 is none")
    draws.add_argument("--seed", type=int, default=0, metavar="S", help="of the first prompt; the next has S + 1 ...")
    draws.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="most per prompt (default: 200)")
    out = parser.add_argument_group("output", "text goes to standard output, figures to standard error")
    out.add_argument("--compare", action="store_true", help="measure the speed-up over plain decoding")
    out.add_argument("--json", type=Path, metavar="FILE", help="write text, tokens and figures")
    out.add_argument("--trace", type=Path, metavar="FILE", help="write an HTML page: where each token came from")
    hosts.add_mesh_options(parser)
    return parser, parser.parse_args(argv)


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Returns the prompts, which the first of several processes reads for all."""
    own: list[str] = []
    if hosts.is_first():
        given = [text_file(prompt) if isinstance(prompt, Path) else prompt for prompt in args.prompts or []]
        own = given or [piped_text() or PROMPT]
    return json.loads(hosts.exchange(json.dumps(own))[0])


def piped_text() -> str:
    """Returns what is piped in, less its last newline; nothing from a terminal, or when nothing comes."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        waiting = select.select([sys.stdin], [], [], STDIN_WAIT_S)[0]
    except (OSError, ValueError):  # no file that can be polled
        waiting = [sys.stdin]
    if not waiting:
        hosts.note(
            "nothing was piped in, so the prompt is the built-in one (--prompt-file /dev/stdin waits for text)\n"
        )
        return ""
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    return sys.stdin.read().removesuffix("\n")


def compare(request: dict[str, Any], drafter: Any, rows: int) -> dict[str, float]:
    """Returns tokens per second with the drafter and without: medians of interleaved runs, one compiled loop each.

    The compiled loop knows no stop strings: both go on behind them.
    """
    rates: dict[str, list[float]] = {"with_drafter": [], "plain": []}
    for run in range(COMPARED_RUNS + 1):
        for name, proposer in (("with_drafter", drafter), ("plain", None)):
            start = time.perf_counter()
            stats = jax.block_until_ready(specjax.generate(**request, drafter=proposer)).stats
            seconds = time.perf_counter() - start
            if run:  # the first compiles
                rates[name].append(int(specjax.sharding.gathered(stats.emitted)[:rows].sum()) / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def results(transcripts: list[Transcript], seconds: float) -> dict[str, Any]:
    """Returns what ``--json`` writes: figures of each prompt, and of all together."""
    prompts = [
        {
            "prompt": transcript.prompt,
            "messages": transcript.messages,
            "text": transcript.text,
            "stopped": transcript.stopped,
            "tokens": transcript.ids,
            **transcript.counts,
        }
        for transcript in transcripts
    ]
    total = {name: sum(prompt[name] for prompt in prompts) for name in COUNTS}
    places = {
        name: [sum(counts) for counts in zip(*(prompt[name] for prompt in prompts), strict=True)]
        for name in ("drafted_at", "accepted_at")
    }
    return {
        **total,
        **places,
        "emitted_per_round": total["emitted"] / total["rounds"],
        "tokens_per_second": total["emitted"] / seconds,
        "prompts": prompts,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the closing figures."""
    lines = [
        ("tokens", f"{result['emitted']} in {result['rounds']} rounds"),
        ("emitted per round", f"{result['emitted_per_round']:.2f}  (plain decoding: 1)"),
        ("tokens per second", f"{result['tokens_per_second']:.1f}  (streamed; compilation excluded)"),
    ]
    if result["drafted"]:
        lines.append(("drafts accepted", f"{result['accepted']} of {result['drafted']}"))
    for place, (drafted, accepted) in enumerate(zip(result["drafted_at"], result["accepted_at"], strict=True), 1):
        share = accepted / drafted if drafted else 0
        lines.append((f"  at position {place}", f"{share:4.0%}  {'#' * round(20 * share)}"))
    if "speedup" in result:
        speeds = result["comparison"]
        rates = f"{speeds['with_drafter']:.1f} against {speeds['plain']:.1f} tokens/s"
        times = f"{result['speedup']:.2f} times plain decoding"
        lines.append(("speed-up", f"{times}  ({rates}, medians of {COMPARED_RUNS} runs)"))
    return "\n".join(f"{name:<20} {value}".rstrip() for name, value in lines) + "\n"


def settings(args: argparse.Namespace, spec: str, mesh: Mesh | None) -> dict[str, str]:
    """Returns how the text was made, by name, leaving out sampling parameters that do nothing."""
    chosen = {"target": args.target.resolve().name, "drafter": short_name(spec)}
    if spec != "none":
        chosen |= {"drafts per round": str(args.num_draft), "verify": args.verify}
    chosen["temperature"] = f"{args.temperature:g}" if args.temperature else "0 (greedy)"
    for name, idle in IDLE.items():
        if getattr(args, name) != idle:
            chosen[name.replace("_", " ")] = f"{getattr(args, name):g}"
    if args.stop:
        chosen["stop strings"] = ", ".join(map(repr, args.stop))
    if mesh is not None:
        chosen["mesh"] = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return chosen | ({"seed": str(args.seed)} if args.temperature else {})


def figures(result: dict[str, Any]) -> dict[str, str]:
    """Returns what a trace page shows large."""
    shown = {
        "tokens per round (plain decoding: 1)": f"{result['emitted_per_round']:.2f}",
        "tokens emitted": str(result["emitted"]),
        "rounds": str(result["rounds"]),
    }
    if result["drafted"]:
        shown["of drafts accepted"] = f"{result['accepted'] / result['drafted']:.0%}"
    shown["tokens per second"] = f"{result['tokens_per_second']:.0f}"
    if "speedup" in result:
        shown["speed-up over plain decoding"] = f"{result['speedup']:.2f}\u00d7"
    return shown


def request_for(
    args: argparse.Namespace,
    target: Any,
    transcripts: list[Transcript],
    stop_tokens: Sequence[int],
    mesh: Mesh | None,
) -> dict[str, Any]:
    """Returns the arguments of ``specjax.generate``, all but the drafter.

    Rows that make the prompts divide over a mesh are copies of the first, of one token each, behind the others.
    """
    prompts = [transcript.prompt_ids for transcript in transcripts]
    added = 0 if mesh is None else -len(prompts) % mesh.shape["data"]
    most = min(args.max_new_tokens, 2**31 - 1)
    limits = np.asarray([most] * len(prompts) + [1] * added, np.int64) if added else None
    prompt_bt, prompt_length_b = specjax.pad_prompts(prompts + prompts[:1] * added)
    return {
        "target": target,
        "prompt_bt": prompt_bt,
        "prompt_length_b": prompt_length_b,
        "verify": VERIFY[args.verify],
        "sampling": specjax.Sampling(
            temperature=args.temperature,
            seed=args.seed,
            max_new_tokens=limits,
            **{name: getattr(args, name) for name in IDLE},
        ),
        "max_new_tokens": args.max_new_tokens,
        "stop_tokens": stop_tokens,
    }


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    with contextlib.ExitStack() as stack:
        try:
            mesh = stack.enter_context(hosts.run(args))
            if hosts.is_first():
                check_outputs(args)
            prompts = prompts_of(args)
            default = f"model:{SHIPPED_DRAFT}" if args.target.resolve() == SHIPPED else "ngram"
            spec = default if args.drafter is None else args.drafter
            hosts.check_same_folders(args.target, *folders_of(spec))
            opened = specjax.open(args.target, mesh=mesh, ignore_config_keys=args.ignore_config_keys)
            target, tokenizer = opened.model, opened.tokenizer
            if tokenizer is None:
                raise ValueError(f"{opened.path} has no tokenizer.json; add the model's")
            rules = specjax.sharding.RULES if args.shard_draft else {}
            drafter = None
            if spec != "none":
                drafter = named_drafter(spec, target, tokenizer, args.num_draft, mesh, rules, args.ignore_config_keys)
            if args.compare and drafter is None:
                raise ValueError("--compare needs a drafter to compare with plain decoding; --drafter is none")
            if args.system is not None and not args.chat:
                raise ValueError("--system is given without --chat; give both, or neither")
            template = specjax.text.load_chat_template(args.target) if args.chat else None
            stop_tokens = opened.stop_tokens
            transcripts = [
                Transcript(tokenizer, prompt, args.max_new_tokens, stop_tokens, args.stop, template, args.system)
                for prompt in prompts
            ]
            request = request_for(args, target, transcripts, stop_tokens, mesh)
            # The first of two equal calls compiles, so that the second can be timed.
            warm_up, rounds = (specjax.stream(**request, drafter=drafter) for _ in range(2))
        except (ValueError, TypeError, OSError) as error:
            parser.error(str(error))

        progress = hosts.note if sys.stderr.isatty() else lambda message: None
        progress("compiling ...")
        next(warm_up)
        progress("\r\x1b[K")
        seconds = follow(rounds, transcripts)
        result = results(transcripts, seconds) | {"settings": settings(args, spec, mesh)}
        if args.compare:
            progress("comparing with plain decoding ...")
            result["comparison"] = compare(request, drafter, len(prompts))
            result["speedup"] = result["comparison"]["with_drafter"] / result["comparison"]["plain"]
            progress("\r\x1b[K")
        hosts.note("\n" + table(result))
        if hosts.is_first():
            try:
                write(args, result, transcripts)
            except OSError as error:
                parser.error(str(error))


def write(args: argparse.Namespace, result: dict[str, Any], transcripts: list[Transcript]) -> None:
    """Writes the files that were asked for."""
    if args.json:
        write_whole(args.json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if args.trace:
        traces = [Trace(transcript.prompt, transcript.rounds) for transcript in transcripts]
        write_whole(args.trace, render(traces, result["settings"], figures(result)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its code
    main()
