"""Command line: compare routers or conditions on a run, report, export, list the routers there are.

What a command does is a function of a module of ``explorer.commands``, loaded when it is asked for.
Where that takes seconds, its arguments are here, so that ``--help`` does not wait.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from capture.errors import CaptureError
from capture.paths import path_argument
from explorer.commands import RUN_HELP, Output, cache, place
from explorer.errors import ComparisonCancelled, ExplorerError

ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells expect
COMPARE_EXAMPLES = """\
examples:
  python -m explorer compare demo
      some routers of every family, live in the embedded model, with random controls
  python -m explorer compare runs/mine.duckdb --routers "top_k(k=1), kmeans(n_clusters=128)"
      replay of what the run recorded; no model is loaded
  python -m explorer compare runs/mine.duckdb --routers gru_recurrent,top_p --layers --seeds 0,1,2
      in the model, in all layers and in one layer at a time, three seeds
  python -m explorer compare demo --routers my_router --router-file my_router.py --live
      a router of your own; the file's code runs
"""
CONDITIONS_EXAMPLES = """\
examples:
  python -m explorer conditions demo
      precision, quantisation, pruning, low rank and merging, and distilled routers
  python -m explorer conditions runs/mine.duckdb --conditions "quantised(bits=4), merge(keep=0.5)"
  python -m explorer conditions demo --conditions "precision(parts='router+experts')" --json
"""

ATLAS_EXAMPLES = """\
examples:
  python -m explorer atlas demo
      what the loss becomes without each expert, beside an expert of about equal load
  python -m explorer atlas runs/mine.duckdb --screen --check 128 --out atlas.parquet
      one gradient instead, for models with thousands of experts; 128 taken out to check it
"""
PRUNE_EXAMPLES = """\
examples:
  python -m explorer prune demo --condition "prune_reap(keep=0.5)" --out mask.json
      which half of the experts to keep, and what the loss is without the others
  python -m explorer prune demo --checkpoint smaller
      a model of the same class with a quarter of its experts less, loaded again and measured
"""


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``compare``."""
    parser.epilog = COMPARE_EXAMPLES
    add = parser.add_argument
    add("run", metavar="RUN", help="a run file, or demo")
    add(
        "--routers",
        metavar="A,B",
        help="names, with arguments where they differ from the defaults: top_k(k=1). "
        "Default: some of every family, live",
    )
    add("--live", action="store_true", default=None, help="run the model with each router")
    add("--layers", action="store_true", help="also with one layer at a time; implies --live")
    add("--no-replay", action="store_true", help="leave out the replay of recorded inputs")
    add("--seeds", default="0", metavar="0,1", help="of routers that are stochastic (default: 0)")
    add("--tokens", type=int, default=10_000, metavar="N", help="to report on (default: 10000)")
    add("--fit-tokens", type=int, default=20_000, metavar="N", help="to fit on (default: 20000)")
    add("--skip", choices=("block", "layer"), default="block", help="what layer rules skip")
    add(
        "--oracle",
        action="store_true",
        help="also let the loss choose among all sets of experts in the last layer: a bound",
    )
    add(
        "--pick",
        type=float,
        metavar="SHARE",
        help="of rules named with several settings compare only the one that loses least at SHARE "
        "of the experts' operations, chosen on a part of the fit split",
    )
    add("--no-controls", action="store_true", help="leave out the random controls")
    add("--against", metavar="ROUTER", help="also set every router beside this one, by text")
    add("--no-latency", action="store_true", help="leave out the timings")
    add("--model", metavar="MODEL", help="default: the model that the run was recorded from")
    add("--router-file", action="append", default=[], metavar="FILE.py", help="runs its code")
    add("--json", action="store_true", help="print all rows and columns as JSON")
    add("--quiet", action="store_true", help="no progress bar")


def _conditions_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``conditions``."""
    parser.epilog = CONDITIONS_EXAMPLES
    add = parser.add_argument
    add("run", metavar="RUN", help="a run file, or demo")
    add("--conditions", metavar="A,B", help="names, with arguments: quantised(bits=4); or none")
    add("--students", metavar="A,B", help="routers to distil from the model's gate; or none")
    add("--tokens", type=int, default=50_000, metavar="N", help="to report on (default: 50000)")
    add("--fit-tokens", type=int, default=20_000, metavar="N", help="to learn on (default: 20000)")
    add("--model", metavar="MODEL", help="default: the model that the run was recorded from")
    add("--json", action="store_true", help="print all tables as JSON")
    add("--quiet", action="store_true", help="do not say what is measured")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    parser.add_argument("run", type=path_argument, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE", help="never overwritten"
    )
    parser.add_argument("--view", metavar="ID", help="a saved view, as in its link: ?view=ID")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``export``."""
    parser.add_argument("run", type=path_argument, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE", help="never overwritten"
    )
    parser.add_argument(
        "--counts-only",
        action="store_true",
        help="leave out text, token ids and all that is known per token; keep the sums",
    )


def _playground_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``playground``."""
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE", help="never overwritten"
    )


def _findings_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``findings``."""
    parser.add_argument("run", type=path_argument, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--json", action="store_true", help="with effects, intervals and p values")


def _atlas_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``atlas``."""
    parser.epilog = ATLAS_EXAMPLES
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help=f"{RUN_HELP}, or demo")
    add("--tokens", type=int, default=8_000, metavar="N", help="at most so many (default: 8000)")
    add("--seed", type=int, default=0, help="draws texts, halves and controls (default: 0)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--screen",
        action="store_true",
        help="only estimate, by one gradient: as is done by itself with more than 512 experts",
    )
    how.add_argument(
        "--exact", action="store_true", help="take every expert out, however many there are"
    )
    add(
        "--check",
        type=int,
        default=64,
        metavar="N",
        help="experts to take out beside an estimate, which says how it ranks them (default: 64)",
    )
    add("--model", metavar="MODEL", help="default: the model that the run was recorded from")
    add(
        "--out",
        type=path_argument,
        metavar="FILE",
        help=".json, .parquet or .duckdb; never overwritten",
    )
    add("--quiet", action="store_true", help="do not say what is measured")


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``prune``."""
    parser.epilog = PRUNE_EXAMPLES
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help=f"{RUN_HELP}, or demo")
    add(
        "--condition",
        default="prune_atlas(keep=0.75)",
        metavar="NAME",
        help="how to choose: prune_atlas, prune_frequency, prune_reap, prune_naee or prune_random, "
        "with arguments (default: prune_atlas(keep=0.75))",
    )
    add("--fit-tokens", type=int, default=20_000, metavar="N", help="to choose on (default: 20000)")
    add("--tokens", type=int, default=20_000, metavar="N", help="to judge on (default: 20000)")
    add("--model", metavar="MODEL", help="default: the model that the run was recorded from")
    add("--out", type=path_argument, metavar="FILE", help="write the mask as JSON")
    add(
        "--checkpoint",
        type=path_argument,
        metavar="FOLDER",
        help="write the model without the experts, load it again and measure its loss",
    )


def _routers_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``routers``."""
    parser.add_argument("--family", metavar="FAMILY", help="only one family")
    parser.add_argument("--router-file", action="append", default=[], metavar="FILE.py")
    parser.add_argument("--json", action="store_true", help="print the whole cards as JSON")


class Command(NamedTuple):
    """One word of the command line: what it is for, its arguments, and what runs it."""

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    function: str = "run"


COMMANDS = {
    "compare": Command(
        "put other routers in a model's place and see what they cost",
        _compare_arguments,
        "explorer.commands.compare",
    ),
    "conditions": Command(
        "measure precision, quantisation, pruning, merging and distilled routers",
        _conditions_arguments,
        "explorer.commands.conditions",
    ),
    "report": Command(
        "write a run, or a saved view of it, as one HTML file that works offline",
        _report_arguments,
        "explorer.commands.report",
        "run_report",
    ),
    "playground": Command(
        "write the demo model as one HTML file: type, and see where every token is routed",
        _playground_arguments,
        "explorer.commands.report",
        "run_playground",
    ),
    "findings": Command(
        "say what is worth knowing in a run: at most seven sentences, each tested",
        _findings_arguments,
        "explorer.commands.findings",
    ),
    "export": Command(
        "write a run without its text, as a new run file",
        _export_arguments,
        "explorer.commands.report",
        "run_export",
    ),
    "place": Command(
        "place experts on GPUs, judged on traffic that was held out, as a file for an engine",
        place.arguments,
        "explorer.commands.place",
    ),
    "cache": Command(
        "simulate caches of experts, and list the experts that are worth keeping in fast memory",
        cache.arguments,
        "explorer.commands.cache",
    ),
    "atlas": Command(
        "knock every expert out of the model in turn and see what the loss becomes",
        _atlas_arguments,
        "explorer.commands.atlas",
    ),
    "prune": Command(
        "drop experts, and write the mask and the smaller model",
        _prune_arguments,
        "explorer.commands.atlas",
        "prune",
    ),
    "routers": Command(
        "list the routers there are", _routers_arguments, "explorer.commands.routers"
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m explorer", description="Explore routing.")
    words = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = words.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(own)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = make_parser().parse_args(arguments)
    command = COMMANDS[options.command]
    try:
        run = getattr(importlib.import_module(command.module), command.function)
        output: Output = run(options)
    except ComparisonCancelled as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED
    except (ExplorerError, CaptureError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept.", file=sys.stderr)
        return INTERRUPTED
    try:
        print(output.text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for note in output.notes:
        print(note, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
