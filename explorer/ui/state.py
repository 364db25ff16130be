"""What the pages share: the runs folder, the open run, the view of it, and cached answers."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import streamlit as st

from capture.errors import CaptureError, quoted
from capture.paths import RUN_SUFFIX, given_path
from explorer import writing
from explorer.errors import ExplorerError, RunError
from explorer.queries.load import balance_table
from explorer.queries.overview import token_count
from explorer.queries.where import Part
from explorer.run import Run, open_run
from explorer.ui import printing
from explorer.ui.recipe import Recipe
from explorer.ui.wording import Scope, site_name

T = TypeVar("T")
Key = tuple[str, int, int]  # path, time of change in ns, bytes

ROOT = Path(__file__).resolve().parent.parent.parent
# (token, router) rows that are counted while somebody waits
MAX_ROWS = 500_000
PHASES = {"": "All", "prompt": "Prompt", "generated": "Generated"}


@dataclass(frozen=True)
class View:
    """The run that is open and the filters that are set.

    Attributes
    ----------
    name : str
        Of the run, inside the runs folder.
    key : tuple
        Changes when the file does.
    domain, phase : str or None
        None = all; the domain "" = prompts without one.
    layer, site : int
    part : Part or None
        Of the prompts or tokens: what the search and the slice leave; None = all.
    layers : (int, int) or None
        First and last layer that figures over layers show; None = all.
    """

    run: Run
    name: str
    key: Key
    domain: str | None
    phase: str | None
    layer: int
    site: int
    part: Part | None = None
    layers: tuple[int, int] | None = None

    @property
    def place(self) -> dict[str, Any]:
        """The router that the view looks at, as the questions take it."""
        return {"layer": self.layer, "site": self.site}

    @property
    def filters(self) -> dict[str, Any]:
        """What chooses tokens, as the questions take it."""
        return {"domain": self.domain, "phase": self.phase, "part": self.part}

    @property
    def prompt_filters(self) -> dict[str, Any]:
        """What chooses prompts, as the questions take it."""
        return {"domain": self.domain, "part": self.part}

    def shows(self, layer: int) -> bool:
        """Return whether a layer is in the range that is shown."""
        return self.layers is None or self.layers[0] <= layer <= self.layers[1]

    def of_layers(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows whose ``layer`` is in the range that is shown."""
        if self.layers is None:
            return rows
        return rows[rows["layer"].between(*self.layers)].reset_index(drop=True)

    def here(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of the router that the view looks at."""
        return rows[(rows["layer"] == self.layer) & (rows["site"] == self.site)]

    def sampled(self) -> "View":
        """Return the view for figures over all layers.

        The run holds totals of domains and phases only, so that a part is counted token by token.
        Where a reader would wait for that, every n-th token is counted; captions say so.
        """
        if self.part is None:
            return self
        n_tokens = ask(self, token_count, **self.filters)
        step = -(-n_tokens * len(self.run.sites) // MAX_ROWS)
        return self if step <= 1 else replace(self, part=replace(self.part, step=step))

    @property
    def site_name(self) -> str:
        """The layer, and the router's number where a layer has several."""
        return self.named(self.layer, self.site)

    def named(self, layer: int, site: int) -> str:
        """Return how a site of the run is called, on pages and in addresses."""
        return site_name(layer, site, several=several_sites(self.run))

    def scope(self, n_tokens: int | None = None, *, over_layers: bool = False) -> Scope:
        """Return what captions say of the tokens behind a figure.

        Parameters
        ----------
        n_tokens : int, optional
            By default those that the filters leave.
        over_layers : bool
            The figure draws layers, so that it has only those of the range.
        """
        if n_tokens is None:
            n_tokens = ask(self, token_count, **self.filters)
        part = self.part or Part()
        return Scope(
            n_tokens,
            self.domain,
            self.phase,
            bool(self.run.info["complete"]),
            search=part.search,
            slice=part.slice,
            step=part.step,
            layers=self.layers if over_layers else None,
        )

    def recipe(
        self,
        question: Callable[..., Any],
        *,
        first: bool = False,
        drop: tuple[str, ...] = (),
        over_layers: bool = False,
        **arguments: Any,
    ) -> tuple[Recipe, Run]:
        """Return how a figure's table is made, as ``chart`` takes it; see ``Recipe``."""
        layers = self.layers if over_layers else None
        return Recipe(question, arguments, first, drop, layers), self.run


class RunProblem(NamedTuple):
    """Why the chosen run cannot be shown."""

    text: str


def runs_folder() -> Path:
    """Return the folder given after ``streamlit run app.py --``, else ``runs/`` beside app.py."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runs", default=str(ROOT / "runs"))
    given = parser.parse_known_args(sys.argv[1:])[0].runs
    return given_path(given, "the folder of runs", RunError)


def run_names() -> list[str]:
    """List the runs of the folder, newest first."""
    folder = runs_folder()
    files = writing.own_files(folder, f"*{RUN_SUFFIX}")
    files.sort(key=lambda path: (-path.stat().st_mtime_ns, path.name))
    return [path.stem for path in files]


def is_dark() -> bool:
    """Return whether the reader's theme is dark."""
    return (printing.theme() or st.context.theme.type) == "dark"


def key_of(path: Path) -> Key:
    """Return what names a file as it is now; OSError where there is none."""
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


def opened(name: str) -> tuple[Run, Key]:
    """Return the run of a name and the key of its file.

    Raises
    ------
    ExplorerError, CaptureError
        If there is no such run, or its file is not a run file.
    """
    path = writing.in_folder(runs_folder(), f"{name}{RUN_SUFFIX}")
    try:
        key = key_of(path)
    except OSError:
        raise ExplorerError(f"The run {quoted(name)} was removed; choose another one.") from None
    try:
        return _open(key), key
    except (CaptureError, ExplorerError) as error:
        # whoever looks need not know where on the server the runs lie
        said = str(error)
        for folder in (path.absolute().parent, path.parent):
            said = said.replace(f"{folder}/", "")
        raise ExplorerError(said) from None


def default_run(names: list[str]) -> str:
    """Return the newest run that can be opened: one bad file must not be everybody's first page."""
    return next((name for name in names if not problem_of(name)), names[0])


def problem_of(name: str) -> str:
    """Return why the run of a name cannot be opened, "" where it can."""
    try:
        return _problem(name, key_of(runs_folder() / f"{name}{RUN_SUFFIX}"))
    except OSError:
        return "it was removed"


def refused(names: list[str]) -> dict[str, str]:
    """Return the runs that were looked at and cannot be opened, with the reasons.

    Those that are newer than the newest sound one: the others are looked at when they are chosen.
    """
    found = {}
    for name in names:
        problem = problem_of(name)
        if not problem:
            break
        found[name] = problem
    return found


# for a while: a file that another process writes can be opened later
@st.cache_data(max_entries=1_000, ttl=10, show_spinner=False)
def _problem(name: str, key: Key) -> str:
    try:
        opened(name)
    except (CaptureError, ExplorerError) as error:
        return str(error)
    return ""


@st.cache_resource(max_entries=8, show_spinner=False, on_release=lambda run: run.close())
def _open(key: Key) -> Run:
    return open_run(key[0])


def close_runs() -> None:
    """Close all run files; pages open them again."""
    _open.clear()


def several_sites(run: Run) -> bool:
    """Return whether some layer of the run has more than one router."""
    return len(run.layers) < len(run.sites)


def ask(view: View, question: Callable[..., T], **arguments: Any) -> T:
    """Return ``question(run, **arguments)``, remembered until the run's file changes."""
    name = f"{question.__module__}.{question.__qualname__}"
    answer: T = _answer(view.key, name, arguments, view.run, question)
    return answer


@st.cache_data(max_entries=400, show_spinner=False, hash_funcs={Part: lambda part: part.key})
def _answer(
    key: Key, name: str, arguments: dict[str, Any], _run: Run, _question: Callable[..., Any]
) -> Any:
    return _question(_run, **arguments)


def balance_of(view: View, load: pd.DataFrame) -> pd.DataFrame:
    """Return the balance of every site under the view's filters, remembered."""
    return _balance(view.key, view.filters, view.layers, load, view.scope().n_tokens)


@st.cache_data(max_entries=50, show_spinner=False, hash_funcs={Part: lambda part: part.key})
def _balance(
    key: Key,
    filters: dict[str, Any],
    layers: tuple[int, int] | None,
    _load: pd.DataFrame,
    n_tokens: int,
) -> pd.DataFrame:
    return balance_table(_load, n_tokens=n_tokens)


def new_name(folder: Path, wish: str) -> str:
    """Return a name for a new run that no file and no unfinished capture has."""
    taken = {path.name.split(RUN_SUFFIX)[0] for path in folder.glob(f"*{RUN_SUFFIX}*")}
    name, number = wish, 2
    while name in taken:
        name, number = f"{wish}-{number}", number + 1
    return name


def in_folder(path: str) -> bool:
    """Return whether a file is directly in the runs folder."""
    return Path(path).parent == runs_folder()


def exists(path: str) -> bool:
    """Return whether there is such a file."""
    return Path(path).is_file()
