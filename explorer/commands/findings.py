"""``python -m explorer findings``: what is worth knowing in a run, as sentences or JSON."""

import argparse
from urllib.parse import urlencode

from explorer.commands import Output, run_file
from explorer.findings import findings
from explorer.run import open_run
from explorer.text import counted


def run(options: argparse.Namespace) -> Output:
    """Say what is worth knowing in a run, and where the app shows it."""
    path = run_file(options.run)
    with open_run(path) as opened:
        found = findings(opened)
    if options.json:
        return Output(found.to_json())
    lines = [
        f"- {one.sentence} n = {counted(one.n, 'prompt')}.  "
        f"[{one.page}?{urlencode({'run': path.stem} | one.address)}]"
        for one in found.found
    ]
    return Output("\n".join([*lines, found.summary]))
