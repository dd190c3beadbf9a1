"""The command ``generate``: continues prompts by speculative decoding and prints its figures."""

import argparse
import contextlib
import io
import json
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

import specjax
from specjax.checkpoint.generation import load_generation_defaults
from specjax.checkpoint.spec import folders_of
from specjax.commands import compilation_cache, figures, hosts
from specjax.commands.console import Parser, add_adapter, add_dtype, add_ignored_keys, add_quantize, write_whole
from specjax.commands.drafter_spec import TREE_RULES, add_tree, check_tree_options, named_drafter
from specjax.commands.places import folder_or_shipped, shipped
from specjax.commands.streams import has_escapes
from specjax.commands.trace_page import Trace, render
from specjax.commands.transcript import Transcript, follow

SHIPPED, SHIPPED_DRAFT = "py-14m", "py-14m-draft"  # of checkpoints/
PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self, items=()):'''
VERIFY = {"token": specjax.verify.token, "block": specjax.verify.block, "coupled": specjax.verify.coupled}
TEMPERATURE = 0.8  # unless another is given
STDIN_WAIT_S = 3.0  # a pipe that nobody writes to must not hold up a call without arguments


def utf8(text: str) -> str:
    """Returns the text if it can be encoded; a type of ``argparse``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8") from None
    return text


def text_file(path: Path) -> str:
    """Returns a file's text without its last newline.

    A tokenizer joins a newline and the indentation after it in one token. A prompt that ends in a newline would make
    that token impossible.

    Raises:
      ValueError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n")  # without a byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"--prompt-file: {path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"--prompt-file: {path} cannot be read: {error.strerror}") from None


def check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError unless the files of ``--json`` and ``--trace`` can be written."""
    for name in ("json", "trace"):
        path = getattr(args, name)
        if path is None:
            continue
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"--{name}: {path} is not a regular file; give the name of one, or a new name")
        # Permissions alone do not tell, so a file is made in the same folder.
        folder = path.absolute().parent
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"--{name}: {folder} cannot be written to: {error.strerror}") from None


ABOUT = """Continues prompts by speculative decoding and prints its figures.

%(prog)s                                           the shipped pair of models on a built-in prompt
%(prog)s --prompt 'def mean(x):' --compare         speed-up over plain decoding
head -30 x.py | %(prog)s --trace t.html            a page with the origin of each token
%(prog)s --target DIR --chat --prompt 'Hello!'     a message to a chat model
%(prog)s --target DIR --mesh data=2,tensor=4       a model split over eight devices (docs/distributed.md)
"""


def parse(argv: list[str] | None, prog: str) -> tuple[Parser, argparse.Namespace]:
    """Returns the parser, for later errors, and the arguments."""
    # The groups have the order of the work: prompts, models, sampling, output.
    parser = Parser(prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = parser.add_argument_group("prompts", "several are one batch; text piped in is one when none is given")
    text.add_argument("--prompt", dest="prompts", action="append", type=utf8, metavar="TEXT")
    text.add_argument("--prompt-file", dest="prompts", action="append", type=Path, metavar="FILE")
    text.add_argument("--chat", action="store_true", help="prompts are messages, laid out by the target's template")
    text.add_argument("--system", type=utf8, metavar="TEXT", help="system message before each message, with --chat")
    text.add_argument("--chat-template", type=utf8, metavar="NAME", help="which of the target's templates, with --chat")
    text.add_argument(
        "--sanitize-control-tokens",
        action="store_true",
        help="special tokens typed into a message are ordinary text, with --chat",
    )
    text.add_argument(
        "--stop", action="append", type=utf8, default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    models = parser.add_argument_group("models")
    models.add_argument("--target", type=Path, metavar="DIR", help="folder or GGUF file (default: the shipped py-14m)")
    models.add_argument(
        "--drafter",
        metavar="SPEC",
        help="model:DIR, eagle:DIR, block:DIR, mtp:DIR, medusa:DIR, assistant:DIR, early-exit:LAYERS, ngram, "
        "suffix, suffix:FILE.txt, none, or cascade:A,B, where B drafts if A has nothing (default: the shipped draft, "
        "or ngram)",
    )
    add_adapter(models, "the target")
    add_ignored_keys(models)
    add_quantize(models)
    add_dtype(models)
    models.add_argument("--num-draft", type=int, default=4, metavar="N", help="tokens drafted per round (default: 4)")
    add_tree(models)
    models.add_argument(
        "--fixed",
        action="store_true",
        help="draft N tokens in every round (default: as many as pay, up to N)",
    )
    models.add_argument(
        "--shard-draft",
        action="store_true",
        help="over a mesh, split the drafter like the target (default: it is whole)",
    )
    models.add_argument("--verify", choices=VERIFY, help="how chains are verified (default: block)")
    draws = parser.add_argument_group("sampling")
    draws.add_argument("--temperature", type=float, metavar="T", help=f"0 is greedy (default: {TEMPERATURE})")
    draws.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens; 0 keeps all")
    draws.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that reach P")
    draws.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest"
    )
    draws.add_argument("--repetition-penalty", type=float, metavar="X", help="1 changes nothing (default: not used)")
    draws.add_argument("--presence-penalty", type=float, metavar="X", help="0 changes nothing (default: not used)")
    draws.add_argument("--frequency-penalty", type=float, metavar="X", help="0 changes nothing (default: not used)")
    draws.add_argument(
        "--generation-defaults",
        action="store_true",
        help="take options that are not given from the target's generation_config.json",
    )
    draws.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the first prompt; the second has S + 1, and so on"
    )
    draws.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="at most N tokens per prompt (default: 200)"
    )
    out = parser.add_argument_group("output", "text goes to standard output, figures to standard error")
    out.add_argument("--compare", action="store_true", help="measure the speed-up over plain decoding")
    out.add_argument("--json", type=Path, metavar="FILE", help="write text, tokens and figures")
    out.add_argument("--trace", type=Path, metavar="FILE", help="write an HTML page with the origin of each token")
    compilation_cache.add_options(parser)
    hosts.add_mesh_options(parser)
    return parser, parser.parse_args(argv)


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Returns the prompts. The first of several processes reads them for all."""
    own: list[str] = []
    if hosts.is_first():
        given = [text_file(prompt) if isinstance(prompt, Path) else prompt for prompt in args.prompts or []]
        own = given or [piped_text() or PROMPT]
    return json.loads(hosts.exchange(json.dumps(own))[0])


def piped_text() -> str:
    """Returns the text that is piped in, without its last newline; "" from a terminal, or if no text comes.

    Raises:
      ValueError: standard input cannot be read, or is not UTF-8.
    """
    if sys.stdin is not None and sys.stdin.isatty():
        return ""
    hint = ""
    if sys.stdin is not None:
        try:
            waiting = select.select([sys.stdin], [], [], STDIN_WAIT_S)[0]
        except (OSError, ValueError):  # standard input is a file that cannot be polled
            waiting = [sys.stdin]
        if waiting and (text := _read_stdin(sys.stdin).removesuffix("\n")):
            return text
        hint = "" if waiting else " (--prompt-file /dev/stdin waits for text)"
    hosts.note(f"nothing was piped in, so the prompt is the built-in one{hint}\n")
    return ""


def _read_stdin(stdin: TextIO) -> str:
    """Returns all of standard input, without a byte order mark; raises as ``piped_text`` does."""
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        return stdin.read()
    except UnicodeDecodeError:
        raise ValueError("standard input is not UTF-8 text; give such text, or --prompt") from None
    except OSError as error:  # such as a folder
        raise ValueError(f"standard input cannot be read: {error.strerror}; give --prompt") from None


def compare(request: dict[str, Any], drafter: Any, rows: int) -> dict[str, float]:
    """Returns tokens per second with the drafter and without it: medians of runs in turn, one compiled loop each.

    The compiled loop has no stop strings: both go on after them.

    Args:
      request: arguments of ``specjax.generate``, from ``request_for``.
      drafter: the drafter.
      rows: rows that count; rows after them only fill up the mesh.
    """
    rates: dict[str, list[float]] = {"with_drafter": [], "plain": []}
    for run in range(figures.COMPARED_RUNS + 1):
        for name, proposer in (("with_drafter", drafter), ("plain", None)):
            start = time.perf_counter()
            stats = jax.block_until_ready(specjax.generate(**request, drafter=proposer)).stats
            seconds = time.perf_counter() - start
            if run:  # the first compiles
                rates[name].append(int(specjax.sharding.gathered(stats.emitted)[:rows].sum()) / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def request_for(
    args: argparse.Namespace,
    target: Any,
    transcripts: list[Transcript],
    stop_tokens: Sequence[int],
    mesh: Mesh | None,
) -> dict[str, Any]:
    """Returns the arguments of ``specjax.generate`` without the drafter.

    Example, 3 prompts on a mesh of ``data=2``: a fourth row is a copy of the first prompt and emits one token.
    """
    prompts = [transcript.prompt_ids for transcript in transcripts]
    # The mesh has equally many rows on each part, so rows may have to be added.
    added = 0 if mesh is None else -len(prompts) % mesh.shape["data"]
    limits = [args.max_new_tokens] * len(prompts) + [1] * added if added else args.max_new_tokens
    return {
        "target": target,
        "prompts": prompts + prompts[:1] * added,
        "verify": (VERIFY | TREE_RULES)[args.verify],
        "sampling": specjax.Sampling(
            temperature=args.temperature,
            seed=args.seed,
            **{name: getattr(args, name) for name in figures.IDLE},
        ),
        "max_new_tokens": limits,
        "stop_tokens": stop_tokens,
        "fixed": args.fixed,
    }


def fill_sampling(args: argparse.Namespace) -> None:
    """Sets the sampling options that were not given: from ``generation_config.json`` if asked for, or to defaults."""
    said = load_generation_defaults(args.target) if args.generation_defaults else {}
    for name, value in ({"temperature": TEMPERATURE} | figures.IDLE | said).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_rule(args: argparse.Namespace) -> None:
    """Raises ValueError if a rule of chains is given with ``--tree``, or an option of trees without it."""
    check_tree_options(args)
    if args.tree is not None and args.verify is not None:
        raise ValueError(f"--verify is {args.verify}, a rule for chains, and --tree is given; give --tree-rule")


def fill_rule(args: argparse.Namespace, drafter: specjax.Drafter | None) -> None:
    """Sets ``verify`` to the name of the rule."""
    rules = VERIFY | TREE_RULES
    default = specjax.verify.default_rule(drafter)
    args.verify = args.verify or args.tree_rule or next(name for name, rule in rules.items() if rule == default)


def default_drafter(target: Path) -> str:
    """Returns the spec of the shipped draft model for the shipped target, and "ngram" for other targets."""
    shipped_target, draft = shipped(SHIPPED), shipped(SHIPPED_DRAFT)
    if draft is not None and shipped_target is not None and target.resolve() == shipped_target.resolve():
        return f"model:{draft}"
    return "ngram"


def main(argv: list[str] | None = None, prog: str = "generate.py") -> None:
    """Runs the command."""
    parser, args = parse(argv, prog)
    compilation_cache.set_up(args)
    with contextlib.ExitStack() as stack:
        try:
            mesh = stack.enter_context(hosts.run(args))
            # Cheap checks come first: files that cannot be written, and models that are missing.
            args.target = folder_or_shipped(args.target, SHIPPED)
            if hosts.is_first():
                check_outputs(args)
            prompts = prompts_of(args)
            fill_sampling(args)
            check_rule(args)
            spec = default_drafter(args.target) if args.drafter is None else args.drafter
            adapters = [] if args.adapter is None else [args.adapter]
            hosts.check_same_folders(args.target, *adapters, *folders_of(spec))
            # Errors of models, drafter and options come before anything compiles, and each is one line.
            ignored = args.ignore_config_keys
            options = {"ignore_config_keys": ignored, "quantize": args.quantize, "adapter": args.adapter}
            options["dtype"] = args.dtype
            opened = specjax.open(args.target, mesh=mesh, **options)
            target, tokenizer = opened.model, opened.need_tokenizer()
            rules = specjax.sharding.RULES if args.shard_draft else {}
            drafter = None
            if spec != "none":
                drafter = named_drafter(
                    *(spec, opened, tokenizer, args.num_draft, mesh, rules, ignored, args.quantize_draft, args.tree),
                    dtype=args.dtype,
                    siblings=args.siblings,
                )
            elif args.tree is not None:
                raise ValueError(f"--tree is {args.tree} and --drafter is none; give a drafter")
            fill_rule(args, drafter)
            if args.compare and drafter is None:
                raise ValueError("--compare needs a drafter to compare with plain decoding; --drafter is none")
            for name in ("system", "chat_template", "sanitize_control_tokens"):
                if getattr(args, name) not in (None, False) and not args.chat:
                    raise ValueError(f"--{name.replace('_', '-')} is given without --chat; give both, or neither")
            template = opened.need_chat_template() if args.chat else None
            stop_tokens = opened.stop_tokens
            transcripts = [
                Transcript(
                    *(tokenizer, prompt, args.max_new_tokens, stop_tokens, args.stop, template, args.system),
                    sanitize_control_tokens=args.sanitize_control_tokens,
                    chat_template=args.chat_template,
                )
                for prompt in prompts
            ]
            request = request_for(args, target, transcripts, stop_tokens, mesh)
            # The first of two equal calls compiles, so the second can be timed.
            warm_up, rounds = (specjax.stream(**request, drafter=drafter) for _ in range(2))
        except (ValueError, TypeError, OSError) as error:
            parser.error(hosts.describe(error))

        # The text streams to standard output. The figures follow on standard error, so the text can be piped.
        progress = hosts.note if has_escapes(sys.stderr) else lambda message: None
        progress("compiling ...")
        next(warm_up)
        progress("\r\x1b[K")
        seconds = follow(rounds, transcripts)
        result = figures.results(transcripts, seconds) | {"settings": figures.settings(args, spec, mesh)}
        if args.compare:
            progress("comparing with plain decoding ...")
            result["comparison"] = compare(request, drafter, len(prompts))
            result["speedup"] = result["comparison"]["with_drafter"] / result["comparison"]["plain"]
            progress("\r\x1b[K")
        hosts.note("\n" + figures.table(result))
        if hosts.is_first():
            try:
                write(args, result, transcripts)
            except OSError as error:
                parser.error(hosts.describe(error))


def write(args: argparse.Namespace, result: dict[str, Any], transcripts: list[Transcript]) -> None:
    """Writes the files of ``--json`` and ``--trace``, where given."""
    if args.json:
        write_whole(args.json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if args.trace:
        traces = [Trace(transcript.prompt, transcript.rounds) for transcript in transcripts]
        write_whole(args.trace, render(traces, result["settings"], figures.large(result)))
