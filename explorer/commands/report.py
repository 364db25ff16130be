"""``python -m explorer report``, ``export`` and ``playground``: files to hand on."""

import argparse

from explorer import writing
from explorer.commands import Output, run_file
from explorer.errors import ExplorerError
from explorer.playground import document
from explorer.report.build import write_report
from explorer.saved_views import load_view


def run_report(options: argparse.Namespace) -> Output:
    """Write a run, or a saved view of it, as one HTML file."""
    run = run_file(options.run)
    view = load_view(run.absolute().parent, options.view) if options.view else None
    failed = write_report(run, options.out, view).failed
    notes = [f"warning: {title} could not be made whole: {why}" for title, why in failed.items()]
    return Output(str(options.out), notes)


def run_export(options: argparse.Namespace) -> Output:
    """Write a run without its text."""
    if not options.counts_only:
        raise ExplorerError(
            "Say what to export: --counts-only leaves the text out. A run as it is needs no "
            "export; copy the file."
        )
    return Output(str(writing.export_counts(run_file(options.run), options.out)))


def run_playground(options: argparse.Namespace) -> Output:
    """Write the demo model and its router as one HTML file."""
    return Output(str(writing.write_new(options.out, document(), what="Writing the playground")))
