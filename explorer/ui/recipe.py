"""The data of a figure as code: Python that asks the run the same question, and its SQL."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from explorer.queries.where import Part
from explorer.run import Run

_MOST_IDS = 1_000  # of a slice, written into SQL
_NAMED = re.compile(r"\$([A-Za-z_]\w*)")


class Recipe(NamedTuple):
    """How the table of a figure is made.

    Attributes
    ----------
    question : callable
        Of ``explorer.queries`` or of a page's ``data``; its first argument is the run.
    arguments : dict
    first : bool
        The question answers with several things, of which the table is the first.
    drop : tuple of str
        Columns that the figure's table leaves out.
    layers : (int, int), optional
        First and last layer of the table.
    """

    question: Callable[..., Any]
    arguments: Mapping[str, Any]
    first: bool = False
    drop: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None


def python(recipe: Recipe, file_name: str) -> str:
    """Return code that makes ``table``, to be run where ``explorer`` is found.

    Parameters
    ----------
    file_name : str
        Of the run.
    """
    name = recipe.question.__name__
    known = {key: value for key, value in recipe.arguments.items() if value is not None}
    part = known.get("part")
    imports = [f"from {recipe.question.__module__} import {name}"]
    if isinstance(part, Part):
        imports.append("from explorer.queries.where import Part")
        if part.slice:
            imports.append("from explorer.slices import load_slice")
    arguments = "".join(f", {key}={_written(value)}" for key, value in known.items())
    lines = [
        "from explorer import open_run",
        *sorted(imports),
        "",
        f"run = open_run({file_name!r})  # of the runs folder",
        f"table = {name}(run{arguments}){'[0]' if recipe.first else ''}",
    ]
    if recipe.drop:
        lines.append(f"table = table.drop(columns={list(recipe.drop)!r})")
    if recipe.layers:
        low, high = recipe.layers
        lines.append(f'table = table[table["layer"].between({low}, {high})]')
    return "\n".join(lines)


def _written(value: Any) -> str:
    if not isinstance(value, Part):
        return repr(value)
    given = {"search": repr(value.search) if value.search else ""}
    if value.slice:
        given |= {
            "slice": repr(value.slice),
            "token_ids": f"load_slice(run, {value.slice!r}).token_ids",
        }
    if value.step > 1:
        given["step"] = str(value.step)
    return f"Part({', '.join(f'{key}={text}' for key, text in given.items() if text)})"


def sql(recipe: Recipe, run: Run) -> str:
    """Return what is read from the run file, one statement after another.

    What comes after the reading, such as intervals, is in the Python code only.
    """
    asked: list[str] = []

    class Listening(Run):
        def __init__(self) -> None:
            self.__dict__.update(run.__dict__)

        def table(self, sql: str, params: Any = None) -> Any:
            asked.append(_filled(sql, params if isinstance(params, Mapping) else {}))
            return run.table(sql, params)

    recipe.question(Listening(), **recipe.arguments)
    return ";\n\n".join(dict.fromkeys(asked)) + ";"


def _filled(statement: str, params: Mapping[str, Any]) -> str:
    """Write values in the places of their names."""
    filled = _NAMED.sub(
        lambda found: _literal(params[found[1]]) if found[1] in params else found[0], statement
    )
    lines = [line for line in filled.splitlines() if line.strip()]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    margin = min(indents[1:], default=0) if indents and indents[0] == 0 else min(indents, default=0)
    return "\n".join(line[margin:] if line[:margin].isspace() else line for line in lines)


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) > _MOST_IDS:
            return f"[/* {len(value):,} token ids of the slice */]"
        return "[" + ", ".join(_literal(one) for one in value) + "]"
    return str(value)
