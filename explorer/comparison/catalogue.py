"""The cards of all registered routers: for the command line, and for pages, which load no torch."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from explorer.errors import ComparisonError

ROOT = Path(__file__).resolve().parent.parent.parent


def cards() -> list[dict[str, Any]]:
    """Return the cards of the routers registered in this process; imports torch.

    Returns
    -------
    list of dict
        What table ``routers`` of a comparison holds, but ``paper`` and ``differs`` apart, and
        ``needs`` (names of fields of ``RouterInputs``), ``weighing``, ``shelved`` and
        ``arguments`` with their defaults.
    """
    from explorer.comparison.live_results import card
    from explorer.comparison.router_names import arguments_of
    from explorer.routers import ROUTERS

    found = []
    for name in ROUTERS:
        factory = ROUTERS[name]
        router = factory()
        arguments = ", ".join(
            f"{one}={default!r}" for one, default in arguments_of(factory).items()
        )
        info = router.info
        known = {
            **{"paper": info.paper, "differs": info.differs, "weighing": info.weighing},
            **{"shelved": info.shelved, "needs": sorted(info.needs)},
        }
        found.append({**card(name, router), **known, "arguments": arguments})
    return found


@functools.cache
def catalogue() -> tuple[dict[str, Any], ...]:
    """Return the cards of our own routers, read by another process once, without torch in this one.

    Raises
    ------
    ComparisonError
        If that process fails.
    """
    result = subprocess.run(
        [sys.executable, "-m", "explorer", "routers", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise ComparisonError(f"The routers could not be listed: {result.stderr.strip()[-300:]}")
    return tuple(json.loads(result.stdout))
