"""The command that writes a report: ``python -m explorer report``."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command ``report`` to those of ``python -m explorer``."""
    parser = subparsers.add_parser(
        "report",
        help="write a run, or a saved view of it, as one HTML file",
        description="Write a run, or a saved view of it, as one HTML file that works offline.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run file")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="never overwritten")
    parser.add_argument("--view", metavar="ID", help="a saved view, as in its link: ?view=ID")
    parser.set_defaults(call=report)


def report(options: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from explorer.report.build import write_report
    from explorer.views import load_view

    view = load_view(options.run.absolute().parent, options.view) if options.view else None
    sys.stdout.write(f"{write_report(options.run, options.out, view)}\n")
    return 0
