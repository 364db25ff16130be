"""How pages and figures say things: names, labels, numbers, captions and sentences.

Plotly reads a subset of HTML in titles, labels and hovers, so every text from a prompt, a token,
a domain or a file name goes through ``label``. A number that is not defined is a dash, and of names
beside each other no two look alike that are not the same.
"""

import html
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.text import ABSENT, NOT_RECORDED, counted, one_line, visible

NO_DOMAIN = "(no domain)"
_ALL_DOMAINS = "All domains"  # of the filter at the side
_QUOTES = "“”"


def label(text: str | None, *, limit: int = 40, spaces: bool = False) -> str:
    """Return text for a plotly title, tick or hover: visible, short, and escaped."""
    shown = visible(text, spaces=spaces)
    if len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    return escaped(shown)


def escaped(text: str) -> str:
    """Return text that plotly shows as it is."""
    # it shows &quot; as it is, but knows numbers
    return html.escape(text).replace("&quot;", "&#34;")


def domain_name(domain: str | None) -> str:
    """Return what a domain is called, not escaped; prompts without one have the name ``""``.

    A domain that somebody named as pages name none or all of them stands in quotes.
    """
    if not domain:
        return NO_DOMAIN
    shown = visible(domain)
    return f"“{shown}”" if shown.strip(_QUOTES) in (NO_DOMAIN, _ALL_DOMAINS) else shown


def domain_label(domain: str | None) -> str:
    """Return a domain's name for a figure; see ``domain_name``."""
    return label(domain_name(domain))


def distinct(shown: Sequence[str], of: Sequence[Hashable] | None = None) -> list[str]:
    """Return texts with a number behind those that look alike but are of different things.

    Parameters
    ----------
    shown : sequence of str
    of : sequence, optional
        What each is of; by default each is of another thing.
    """
    things: Sequence[Hashable] = range(len(shown)) if of is None else of
    taken: dict[str, Hashable] = {}
    known: dict[tuple[str, Hashable], str] = {}
    given = set(shown)
    for text, thing in zip(shown, things, strict=True):
        if (text, thing) in known:
            continue
        name, number = text, 1
        while name in taken or (name != text and name in given):
            number += 1
            name = f"{text} ({number})"
        taken[name], known[text, thing] = thing, name
    return [known[text, thing] for text, thing in zip(shown, things, strict=True)]


def short(texts: Sequence[str], limit: int) -> list[str]:
    """Return texts of at most about ``limit`` characters, different ones still different.

    A long text is cut at its end, or in its middle where its beginning is that of another one.
    """
    cut = [_cut(text, limit) for text in texts]
    alike: dict[str, set[str]] = {}
    for text, name in zip(texts, cut, strict=True):
        alike.setdefault(name, set()).add(text)
    cut = [
        _middle(text, limit) if len(alike[name]) > 1 and len(text) > limit else name
        for text, name in zip(texts, cut, strict=True)
    ]
    return distinct(cut, texts)


def labels(
    texts: Sequence[str | None],
    *,
    limit: int = 40,
    spaces: bool = False,
    of: Sequence[Hashable] | None = None,
) -> list[str]:
    """Return the labels of names that stand beside each other; see ``label``.

    Parameters
    ----------
    of : sequence, optional
        What each text is the name of; by default equal texts name one thing.
    """
    seen = distinct([visible(text, spaces=spaces) for text in texts], of or texts)
    return [escaped(name) for name in short(seen, limit)]


def domain_labels(domains: Sequence[str | None]) -> list[str]:
    """Return the labels of several domains."""
    seen = distinct([domain_name(domain) for domain in domains], [d or "" for d in domains])
    return [escaped(name) for name in short(seen, 40)]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _middle(text: str, limit: int) -> str:
    tail = (limit - 1) // 2
    return text[: limit - 1 - tail] + "…" + text[-tail:]


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number in a format; a dash for a missing or infinite one."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return format(value, form)


def by_chance(value: float | None, form: str, unit: str = "") -> str:
    """Return what is expected by chance, "" where that is not defined."""
    return f"by chance {value:{form}}{unit}" if value is not None and math.isfinite(value) else ""


def span(values: npt.ArrayLike, form: str = ".3g") -> str:
    """Return ``from SMALLEST to LARGEST`` of what is defined, for sentences.

    Parameters
    ----------
    values : array [N]
        Where none is defined, the text says so.
    """
    found = np.asarray(values, dtype=np.float64)
    found = found[np.isfinite(found)]
    if not found.size:
        return "not defined for any"
    return f"from {found.min():{form}} to {found.max():{form}}"


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
        Only every n-th token was counted.
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
        line = f"n = {counted(self.n_tokens, 'token')}"
        filters = self.filters()
        if filters:
            line += f" of {', '.join(filters)}"
        parts = [line, *notes]
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


# bounds of the gate entropy as a share of ln(experts); words only, no statistics behind them
_SURE, _LEANING, _UNDECIDED = 0.4, 0.7, 0.9


def expert_label(site_name: str, expert: int) -> str:
    """Return how an expert is called: its layer and its number there."""
    return f"L{site_name}.E{expert}"


def undefined_load(n_experts: int) -> str:
    """Say why a measure of load is not defined for a layer."""
    return "not defined for one expert" if n_experts == 1 else "no assignment of these tokens"


def absent_gate(quantity: str, n_experts: int, top_k: int) -> str:
    """Say why a token has no value at a router: it is not defined there, or was not recorded.

    Parameters
    ----------
    quantity : str
        A name in ``explorer.pages.tokens.data.QUANTITIES``.
    """
    if quantity == "entropy" and n_experts == 1:
        return "not defined for one expert"
    if quantity == "margin" and top_k >= n_experts:
        return "not defined, as no expert is left out"
    return {
        "expert": "no expert was chosen",
        "top1_weight": "no expert was chosen",
        "pinned_weight": "no expert is pinned there",
    }.get(quantity, "not recorded")


def token_name(text: str | None) -> str:
    """Return a token by itself, on one line; of white space every space shows."""
    if text and not text.strip(" "):
        return "␣" * len(text)
    return NOT_RECORDED if text is None else visible(text, running=True).replace("\n", "")


def prompt_name(row: pd.Series) -> str:
    """Return a prompt on one line, for a list to choose from."""
    text = "(token ids, no text)" if row["text"] is None else one_line(row["text"], 90)
    domain = f"{visible(row['domain'])} · " if row["domain"] else ""
    return f"{row['prompt_id']} · {domain}{counted(row['tokens'], 'token')} · {text}"


def listed(parts: Sequence[str]) -> str:
    """Join words as a sentence does."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def unnamed(token: object, position: int) -> str:
    """Return what stands for a token without text: its vocabulary id, else its position."""
    return f"⟨#{position}⟩" if pd.isna(token) else f"⟨{token}⟩"


def routing_sentence(experts: pd.DataFrame, *, site_name: str, n_experts: int) -> str:
    """Say which experts a token went to; ``experts`` has one row per slot, best first."""
    if experts.empty:
        return f"In layer {site_name} the router chose no expert for this token."
    if len(experts) == 1:
        return (
            f"In layer {site_name} the router sent this token to expert "
            f"{experts['expert_id'].iloc[0]} alone, one of {n_experts}."
        )
    ids = [f"expert {row.expert_id}" for row in experts.itertuples()]
    if experts["weight_share"].isna().any():
        given = f"sent this token to {listed(ids)}"
    else:
        shares = [number(share, ".0%") for share in experts["weight_share"]]
        shares[0] += " of this token's weight"
        given = "gave " + listed([f"{s} to {e}" for s, e in zip(shares, ids, strict=True)])
    return f"In layer {site_name} the router {given}, choosing among {n_experts} experts."


def certainty_sentence(
    *, normalized_entropy: float, margin: float, topk_mass: float, n_experts: int, top_k: int
) -> str:
    """Say how sure the router was; nan where a number is not defined or was not recorded."""
    if n_experts == 1:
        return "With one expert there is no choice: gate entropy and margin are not defined."
    if math.isnan(normalized_entropy):
        return "How sure it was is not known: its gate entropy was not recorded."
    amount = f"(gate entropy {normalized_entropy:.0%}; 0% = sure, 100% = all experts alike)"
    if normalized_entropy < _SURE:
        text = f"It was sure {amount}"
    elif normalized_entropy < _LEANING:
        text = f"It leaned clearly to its choice {amount}"
    elif normalized_entropy < _UNDECIDED:
        text = f"It hesitated {amount}"
    else:
        text = f"It saw hardly any difference between the experts {amount}"
    if not math.isnan(topk_mass):
        chosen = "the chosen expert" if top_k == 1 else f"the {top_k} chosen experts"
        text += f": {chosen} had {topk_mass:.0%} of its probability"
    text += "."
    if not math.isnan(margin):
        text += f" The last choice was ahead of the next expert by {margin:.3g} in score."
    elif top_k >= n_experts:
        text += " No expert is left out, so that no margin is defined."
    return text


def probabilities(
    scores: npt.NDArray[np.float64], score_function: str
) -> tuple[npt.NDArray[np.float64], str, float | None]:
    """Return scores as a reader can compare them, their unit, and the value of no preference.

    Parameters
    ----------
    scores : array [E]
        As the router put them out; nan where it ruled an expert out.
    score_function : str
        As in the view ``sites``.
    """
    if score_function in ("softmax", "softmax_topk"):
        powers = np.exp(scores - np.nanmax(scores))
        return powers / np.nansum(powers), "probability (0..1)", 1 / len(scores)
    if score_function in ("sigmoid", "sigmoid_topk"):
        # in two halves, so that no power overflows
        small = np.exp(-np.abs(scores))
        return (
            np.where(scores >= 0, 1 / (1 + small), small / (1 + small)),
            "sigmoid of the score (0..1)",
            None,
        )
    if score_function == "probabilities":
        return scores, "probability (0..1)", 1 / len(scores)
    return scores, "raw router score", None
