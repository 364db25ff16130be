"""What every figure says below its title: how many tokens, which ones, and that padding is out."""

import html
from collections.abc import Mapping
from typing import NamedTuple

from explorer.ui.text import domain_label, domain_name, label


class Caption(str):
    """The line below a figure's title, and what chose the tokens behind it, as plain values."""

    filters: dict[str, str]

    def __new__(cls, text: str, filters: Mapping[str, str]) -> "Caption":
        """Return a text with filters: their names, such as ``domain``, and values."""
        line = super().__new__(cls, text)
        line.filters = dict(filters)
        return line


class Scope(NamedTuple):
    """The tokens behind a figure.

    Attributes
    ----------
    n_tokens : int
    domain, phase : str or None
        Filters in force; None = all.
    complete : bool
        False for a run whose capture did not end.
    search : str or None
        Text that the prompts contain.
    slice : str or None
        Name of the slice that the tokens are of.
    whole_prompts : bool
        All tokens of the prompts that have one of the slice.
    step : int
        Only every so manieth token was counted.
    layers : (int, int) or None
        First and last layer of a figure that has a range of the run's layers only.
    """

    n_tokens: int
    domain: str | None = None
    phase: str | None = None
    complete: bool = True
    search: str | None = None
    slice: str | None = None
    whole_prompts: bool = False
    step: int = 1
    layers: tuple[int, int] | None = None

    def caption(self, *notes: str) -> Caption:
        """Return the line, with ``notes`` (escaped) at its end."""
        tokens = "token" if self.n_tokens == 1 else "tokens"
        line = f"n = {self.n_tokens:,} {tokens}"
        filters = self.filters()
        if filters:
            line += f" of {', '.join(filters)}"
        parts = [line, "padding excluded", *notes]
        if self.step > 1:
            parts.append(f"counted from every {ordinal(self.step)} token")
        if self.layers is not None:
            first, last = self.layers
            parts.append(f"layer {first} only" if first == last else f"layers {first} to {last}")
        if not self.complete:
            parts.append("the capture did not end: a part of its prompts")
        return Caption("; ".join(parts), self.filter_values())

    def filter_values(self) -> dict[str, str]:
        """Return the filters in force by name, not escaped, as exports carry them."""
        values = {
            "domain": None if self.domain is None else domain_name(self.domain),
            "phase": self.phase,
            "search": self.search,
            "slice": self.slice,
            "tokens": "whole prompts" if self.slice and self.whole_prompts else None,
            "layers": None if self.layers is None else f"{self.layers[0]} to {self.layers[1]}",
            "counted": f"every {ordinal(self.step)} token" if self.step > 1 else None,
            "capture": None if self.complete else "did not end",
        }
        return {name: value for name, value in values.items() if value}

    def filters_text(self) -> str:
        """Return the filters in force, as text that is not escaped."""
        return ", ".join(html.unescape(part) for part in self.filters())

    def filters(self) -> list[str]:
        """Return what chose the tokens, escaped for a figure."""
        filters = []
        if self.domain is not None:
            filters.append(f"domain {domain_label(self.domain)}")
        if self.phase is not None:
            filters.append(f"phase {self.phase}")
        if self.search:
            filters.append(f"prompts with “{label(self.search, limit=24)}”")
        if self.slice:
            whole = "prompts of " if self.whole_prompts else ""
            filters.append(f"{whole}slice “{label(self.slice, limit=24)}”")
        return filters

    def without_filters(self) -> "Scope":
        """Return the scope of a figure on which no filter but the phase acts."""
        return self._replace(domain=None, search=None, slice=None, step=1)


def ordinal(number: int) -> str:
    """Return 2nd, 3rd, 4th and so on."""
    last = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{last}"


def site_name(layer: int, site: int, *, several: bool) -> str:
    """Return how a site is called: its layer, and its number where a layer has several."""
    return f"{layer}.{site}" if several else str(layer)


def site_hover(*, several: bool) -> str:
    """Return how a hover names the site of a mark whose customdata starts with layer, site."""
    return "layer %{customdata[0]}" + (".%{customdata[1]}" if several else "")
