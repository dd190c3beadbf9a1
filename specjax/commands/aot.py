"""The command ``aot``: compiles ``generate`` for a TPU or GPU that need not exist, and checks the program."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from specjax.aot.programs import DRAFTERS, SAMPLING, SMALL, Setting, with_layers
from specjax.aot.promises import MOST_MOVES, Limits
from specjax.aot.report import broken, compile_program, report
from specjax.aot.topology import TOPOLOGIES, choose, prepare
from specjax.checkpoint.fetched import config_path
from specjax.commands.aot_table import table
from specjax.commands.console import Parser, add_ignored_keys, write_whole
from specjax.hf.config import read_config
from specjax.planning import CONFIGS
from specjax.quantized import KINDS
from specjax.transformer import DecoderConfig

ABOUT = """Compiles `generate` for a TPU or GPU that need not exist, reports what a round is, and checks its structure.

  %(prog)s                                                           a small model on one v5e chip
  %(prog)s --topology h100 --target llama-3.2-1b --drafter model     an H100, needs pip install -e '.[cuda]'
  %(prog)s --topology v6e:2x2 --tensor 4 --target DIR/config.json --rows 8 --json report.json

Nothing runs on a device, and no parameter is made: a config.json is enough. The exit status is 1 if the program breaks
a promise, and 2 on bad input. docs/accelerators.md explains promises and report.
"""


def main(argv: list[str] | None = None, prog: str = "aot.py") -> int:
    """Runs the command and returns the exit status."""
    args = _parser(prog).parse_args(argv)
    try:
        topology = choose(args.topology, args.tensor)
        target = _open_target(args)
        prepare(topology, args.flags)
        if args.table:
            if args.quantize:
                raise ValueError("--quantize and --table are given: give one of them")
            if args.tree is not None:
                raise ValueError("--tree and --table are given: give one of them")
            return table(args.table, args.topology, args.tensor, args.target or "small", target, args.rows, args.depths)
        setting = Setting(
            target if args.layers is None else with_layers(target, args.layers),
            topology,
            args.drafter,
            args.sampling,
            args.rows[0],
            args.slots,
            args.used,
            args.num_draft,
            args.tensor,
            args.quantize,
            args.tree,
        )
        # A large cache on several chips is moved by XLA's own choice, which only its size can change.
        moves = args.most_moves if args.most_moves is not None else (None if args.target else MOST_MOVES)
        program = compile_program(setting)
        made = {"target": args.target or "small"} | report(setting, program, Limits(moves, args.most_waits))
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if args.save:
        args.save.write_text(program.hlo, encoding="utf-8")
        if program.thunks is not None:
            args.save.with_suffix(".thunks").write_text(program.thunks, encoding="utf-8")
    if args.json:
        write_whole(args.json, json.dumps(made, indent=1) + "\n")
    _print(made)
    return int(bool(broken(made)))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = ", ".join(_shipped())
    parser.add_argument("--topology", default="v5e:2x2", metavar="NAME", help=f"of {', '.join(TOPOLOGIES)}")
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="devices to split the target over; default: 1"
    )
    parser.add_argument(
        "--target", metavar="CONFIG", help=f"a config.json, its folder, or one of {shipped}; default: a small model"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="cut the target to its first N layers")
    parser.add_argument("--drafter", choices=DRAFTERS, default="ngram", help="default: %(default)s")
    parser.add_argument("--quantize", choices=KINDS, help="store the target's weights so; default: bfloat16")
    parser.add_argument("--num-draft", type=int, default=4, metavar="G", help="drafts of a round; default: %(default)s")
    parser.add_argument(
        "--tree", type=int, metavar="NODES", help="draft a tree of so many drafts, at most --num-draft on a path"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1], metavar="N", help="rows of the batch; several with --table alone"
    )
    parser.add_argument("--slots", type=int, default=2048, metavar="N", help="room of a row; default: %(default)s")
    parser.add_argument(
        "--used", type=int, default=512, metavar="N", help="tokens of a row in the reported round; default: %(default)s"
    )
    parser.add_argument(
        "--sampling", choices=SAMPLING, default="greedy", help="what all rows ask for; default: %(default)s"
    )
    parser.add_argument("--flags", default="", metavar="TEXT", help="more flags of XLA: --flags='--a=1 --b=2'")
    parser.add_argument("--most-waits", type=float, metavar="N", help="break if the host waits more often in a round")
    parser.add_argument(
        "--most-moves",
        type=int,
        metavar="N",
        help=f"break if more whole caches move between memories; default: {MOST_MOVES} for the small model alone",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the optimised HLO there, and a GPU's thunks beside it"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="all drafters and samplings for --rows: one JSON line each is added to FILE, and those that FILE has are "
        "not made again",
    )
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=[2, 4],
        metavar="N",
        help="with --table: layers to cut the target to; two numbers are extrapolated to all layers. Default: 2 4",
    )
    add_ignored_keys(parser)
    return parser


def _shipped() -> list[str]:
    return sorted(file.stem for file in CONFIGS.glob("*.json"))


def _open_target(args: argparse.Namespace) -> DecoderConfig:
    if len(args.rows) > 1 and not args.table:
        raise ValueError(f"--rows has {len(args.rows)} numbers; give one, or --table FILE")
    if args.target is None:
        return SMALL
    path = CONFIGS / f"{args.target}.json" if args.target in _shipped() else config_path(args.target)
    if not path.exists() and not os.path.exists(args.target):
        raise ValueError(f"--target is {args.target!r}: no such file or folder; give a config.json, or a shipped name")
    return read_config(path, args.ignore_config_keys)[0]


def _print(made: dict[str, Any]) -> None:
    for name, value in made.items():
        if name != "promises":
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    for name, of in made["promises"].items():
        print("ok  " if of["holds"] else "FAIL", name, f"({of['detail']})" if of["detail"] else "")
