"""Command line: compare routers or conditions on a run, and list the routers there are.

A command is a function that adds its arguments to a parser, and one that runs; further commands
are entries of ``COMMANDS``.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from capture.errors import CaptureError
from explorer.commands import cache, compare, conditions, place, report, routers
from explorer.errors import ComparisonCancelled, ExplorerError

ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells expect


class Command(NamedTuple):
    """One word of the command line."""

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], compare.Output]


COMMANDS = {
    "compare": Command(
        "put other routers in a model's place and see what they cost",
        compare.arguments,
        compare.run,
    ),
    "conditions": Command(
        "measure precision, quantisation, pruning, merging and distilled routers",
        conditions.arguments,
        conditions.run,
    ),
    "report": Command(
        "write a run, or a saved view of it, as one HTML file that works offline",
        report.report_arguments,
        report.run_report,
    ),
    "export": Command(
        "write a run without its text, as a new run file",
        report.export_arguments,
        report.run_export,
    ),
    "place": Command(
        "place experts on GPUs, judged on traffic that was held out, as a file for an engine",
        place.arguments,
        place.run,
    ),
    "cache": Command(
        "simulate caches of experts, and list the experts that are worth keeping in fast memory",
        cache.arguments,
        cache.run,
    ),
    "routers": Command("list the routers there are", routers.arguments, routers.run),
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
    try:
        output = COMMANDS[options.command].run(options)
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
