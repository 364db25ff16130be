"""Names beside each other: short for display, and never two alike that are not the same."""

from collections.abc import Hashable, Sequence

from explorer.ui.text import domain_name, escaped, visible


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
    """Return the labels of names that stand beside each other; see ``figures.text.label``.

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
