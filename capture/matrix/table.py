"""The matrix as lines for people, and as the table of a paper."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from capture.errors import ConfigError
from capture.matrix.compare import CHECKS, EXACT, REFUSED, UNTESTED, WRONG, Verdict, check
from capture.matrix.found import architectures
from capture.model.load import loading_bars, transformers_library

OUTCOMES = (EXACT, WRONG, REFUSED, UNTESTED)
HEAD = "| result | `score_function`, or why | compared | model types |\n|---|---|---|---|\n"


def check_all(names: Sequence[str] = ()) -> Iterator[Verdict]:
    """Yield what capture makes of each architecture, by name.

    Parameters
    ----------
    names : sequence of str
        Model types; none = all that transformers has.

    Raises
    ------
    ConfigError
        If there is no such architecture.
    """
    known = {found.model_type: found for found in architectures()}
    for name in names:
        if name not in known:
            near = ", ".join(get_close_matches(name, known)) or "python -m capture matrix lists all"
            raise ConfigError(
                f"A model type with routed experts of the installed transformers was expected, got "
                f"{name!r}. Did you mean: {near}?"
            )
    transformers_library().logging.set_verbosity_error()
    with warnings.catch_warnings(), loading_bars(shown=False):
        warnings.simplefilter("ignore")  # of models that were made up
        for name in names or known:
            yield check(known[name])


def line(verdict: Verdict) -> str:
    """Return one line about one architecture."""
    said = verdict.reason or (
        f"{', '.join(verdict.rules)}; sites: {verdict.n_sites}; compared: {compared(verdict)}"
    )
    return f"{verdict.outcome:8} {verdict.model_type}: {said}"


def summary(verdicts: Sequence[Verdict], seconds: float) -> str:
    """Return the counts and how long they took."""
    counts = [(name, sum(v.outcome == name for v in verdicts)) for name in OUTCOMES]
    said = ", ".join(f"{count} {name}" for name, count in counts if count or name != WRONG)
    return f"{len(verdicts)} architectures: {said}. {seconds:.0f} s."


def markdown(verdicts: Iterable[Verdict]) -> str:
    """Return the table: a row for what is recorded by one rule, and for each other reason."""
    rows: dict[tuple[int, str, str], list[str]] = {}
    for verdict in verdicts:
        why = verdict.reason or ", ".join(f"`{rule}`" for rule in verdict.rules)
        why = why.replace("|", "\\|").replace("\n", " ")
        key = OUTCOMES.index(verdict.outcome), why, compared(verdict)
        rows.setdefault(key, []).append(verdict.model_type)
    lines = [
        f"| {OUTCOMES[place]} | {why} | {made} | "
        f"{', '.join(f'`{name}`' for name in sorted(names))} |\n"
        for (place, why, made), names in sorted(rows.items(), key=_most_first)
    ]
    return HEAD + "".join(lines)


def compared(verdict: Verdict) -> str:
    """Return which checks were made of an exact one: all, or all but some."""
    if verdict.outcome != EXACT:
        return "-"
    missing = [check for check in CHECKS if check not in verdict.checks]
    return f"all but {', '.join(missing)}" if missing else "all"


def _most_first(row: tuple[tuple[int, str, str], list[str]]) -> tuple[int, int, str, str]:
    (place, why, made), names = row
    return place, -len(names), why, made
