"""``python -m explorer routers``: the cards of the routers there are, as a table or JSON."""

import argparse
import json
from typing import Any

from explorer.commands import Output
from explorer.comparison.live_results import card
from explorer.routers import ROUTERS
from explorer.routers.by_name import arguments_of, load_router_file


def run(options: argparse.Namespace) -> Output:
    """Return the cards of all registered routers."""
    for path in options.router_file:
        load_router_file(path)
    found = [card for card in cards() if options.family in (None, card["family"])]
    if options.json:
        return Output(json.dumps(found, indent=1))
    fits = {None: "no", "statistics": "counts", "distilled": "imitation", "trained": "model's loss"}
    columns = (
        "name",
        "family",
        "part",
        "causal",
        "batch matters",
        "needs fitting",
        "selector",
        "paper",
        "how it differs",
    )
    rows = [
        [
            card["name"],
            card["family"],
            card["part"],
            "yes" if card["causal_declared"] else "no",
            "yes" if card["batch_dependent_declared"] else "no",
            fits[card["fits"]],
            "yes" if "selector=" in card["arguments"] else "no",
            card["paper"] or "-",
            (card["differs"] or "as published") if card["paper"] else "-",
        ]
        for card in found
        if not card["shelved"]
    ]
    widths = [max(len(str(row[n])) for row in [columns, *rows]) for n in range(len(columns))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [list(columns), *rows]
    ]
    shelved = [f"  {card['name']}: {card['shelved']}" for card in found if card["shelved"]]
    if shelved:
        lines += ["", "Not in the default set, kept for the record:", *shelved]
    return Output("\n".join(lines))


def cards() -> list[dict[str, Any]]:
    """Return the cards of the routers registered in this process.

    Returns
    -------
    list of dict
        What table ``routers`` of a comparison holds, but ``paper`` and ``differs`` apart, and
        ``needs`` (names of fields of ``RouterInputs``), ``weighing``, ``shelved`` and
        ``arguments`` with their defaults.
    """
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
