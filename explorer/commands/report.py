"""``python -m explorer report`` and ``export``: a run as a page to read, or without its text."""

import argparse
from pathlib import Path

from capture.paths import path_argument
from explorer import writing
from explorer.commands.compare import Output
from explorer.errors import ExplorerError

RUN_HELP = "a run file, or the name of one in runs/"


def run_file(given: Path) -> Path:
    """Return the run file that is meant: as given, or of this name in ``runs/``."""
    named = Path("runs", f"{given}.duckdb")
    return named if not given.suffix and not given.exists() and named.is_file() else given


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    parser.add_argument("run", type=path_argument, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE", help="never overwritten"
    )
    parser.add_argument("--view", metavar="ID", help="a saved view, as in its link: ?view=ID")


def run_report(options: argparse.Namespace) -> Output:
    """Write a run, or a saved view of it, as one HTML file."""
    from explorer.report.build import write_report
    from explorer.saved_views import load_view

    run = run_file(options.run)
    view = load_view(run.absolute().parent, options.view) if options.view else None
    failed = write_report(run, options.out, view).failed
    notes = [f"warning: {title} could not be made whole: {why}" for title, why in failed.items()]
    return Output(str(options.out), notes)


def export_arguments(parser: argparse.ArgumentParser) -> None:
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


def run_export(options: argparse.Namespace) -> Output:
    """Write a run without its text."""
    if not options.counts_only:
        raise ExplorerError(
            "Say what to export: --counts-only leaves the text out. A run as it is needs no "
            "export; copy the file."
        )
    return Output(str(writing.export_counts(run_file(options.run), options.out)))
