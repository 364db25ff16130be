"""All conditions, registered, and made from text such as ``quantised(bits=4)``."""

import inspect
from collections.abc import Iterable

from capture.errors import cut, first_line, quoted
from explorer.comparison.conditions import (  # noqa: F401  importing them registers them
    expert_pruning,
    head_pruning,
    merging,
    weights,
)
from explorer.comparison.conditions.condition import CONDITIONS, Condition
from explorer.errors import ConditionError, RouterError
from explorer.router_cards import parse_router


def make_condition(text: str) -> Condition:
    """Make a condition from its name, with arguments where they differ from the defaults.

    Raises
    ------
    UnknownNameError
        If no condition has the name.
    ConditionError
        If it takes no such argument, or not with this value.
    """
    try:
        name, options = parse_router(text)
    except RouterError as error:
        raise ConditionError(
            f"A condition such as merge or quantised(bits=4) was expected, got {quoted(text)}."
        ) from error
    factory = CONDITIONS[name]
    known = list(inspect.signature(factory).parameters)
    for option in options:
        if option not in known:
            raise ConditionError(
                f"Condition {quoted(name)} takes no argument {quoted(option)}. "
                f"It takes: {', '.join(known)}."
            )
    try:
        return factory(**options)
    except TypeError as error:
        raise ConditionError(f"{cut(text)} cannot be made: {first_line(error)}.") from None


def make_conditions(texts: Iterable[str]) -> list[Condition]:
    """Make conditions; each label must be there once.

    Raises
    ------
    ConditionError
        If two are the same, or one cannot be made.
    """
    made = [make_condition(text) for text in texts]
    labels = [one.label for one in made]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise ConditionError(f"Different conditions were expected, got {twice} twice.")
    return made
