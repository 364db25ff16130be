"""What every figure says below its title: how many tokens, which ones, and that padding is out."""

from typing import NamedTuple

from explorer.figures.text import domain_label


class Scope(NamedTuple):
    """The tokens behind a figure.

    Attributes
    ----------
    n_tokens : int
    domain, phase : str or None
        Filters in force; None = all.
    complete : bool
        False for a run whose capture did not end.
    """

    n_tokens: int
    domain: str | None = None
    phase: str | None = None
    complete: bool = True

    def caption(self, *notes: str) -> str:
        """Return the line, with ``notes`` (escaped) at its end."""
        tokens = "token" if self.n_tokens == 1 else "tokens"
        filters = []
        if self.domain is not None:
            filters.append(f"domain {domain_label(self.domain)}")
        if self.phase is not None:
            filters.append(f"phase {self.phase}")
        line = f"n = {self.n_tokens:,} {tokens}"
        if filters:
            line += f" of {', '.join(filters)}"
        parts = [line, "padding excluded", *notes]
        if not self.complete:
            parts.append("the capture did not end: a part of its prompts")
        return "; ".join(parts)


def site_name(layer: int, site: int, *, several: bool) -> str:
    """Return how a site is called: its layer, and its number where a layer has several."""
    return f"{layer}.{site}" if several else str(layer)


def site_hover(*, several: bool) -> str:
    """Return how a hover names the site of a mark whose customdata starts with layer, site."""
    return "layer %{customdata[0]}" + (".%{customdata[1]}" if several else "")
