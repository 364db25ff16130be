"""What the pages share: the runs folder, the open run, the filters, and cached answers."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import streamlit as st

from capture.errors import CaptureError
from explorer.balance import balance_table
from explorer.errors import ExplorerError
from explorer.figures.caption import Scope, site_name
from explorer.figures.text import visible
from explorer.pages import address
from explorer.queries.overview import token_count
from explorer.run import Run, open_run

T = TypeVar("T")
Key = tuple[str, int, int]  # path, time of change in ns, bytes

ROOT = Path(__file__).resolve().parent.parent.parent
SUFFIX = ".duckdb"
NO_DOMAIN = "(none)"  # in the address, where "" means all domains
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
    """

    run: Run
    name: str
    key: Key
    domain: str | None
    phase: str | None
    layer: int
    site: int

    @property
    def site_name(self) -> str:
        """The layer, and the router's number where a layer has several."""
        return site_name(self.layer, self.site, several=several_sites(self.run))

    def scope(self, n_tokens: int | None = None) -> Scope:
        """Return what captions say of the tokens behind a figure."""
        if n_tokens is None:
            n_tokens = ask(self, token_count, domain=self.domain, phase=self.phase)
        return Scope(n_tokens, self.domain, self.phase, bool(self.run.info["complete"]))


class Problem(NamedTuple):
    """Why the chosen run cannot be shown."""

    text: str


def runs_folder() -> Path:
    """Return the folder given after ``streamlit run app.py --``, else ``runs/`` beside app.py."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    return Path(parser.parse_known_args(sys.argv[1:])[0].runs).expanduser()


def run_names() -> list[str]:
    """List the runs of the folder, newest first."""
    folder = runs_folder()
    files = [path for path in folder.glob(f"*{SUFFIX}") if path.is_file()]
    files.sort(key=lambda path: (-path.stat().st_mtime_ns, path.name))
    return [path.stem for path in files]


def is_dark() -> bool:
    """Return whether the reader's theme is dark."""
    return st.context.theme.type == "dark"


def select_view() -> View | Problem | None:
    """Draw the bar at the side and return what it says; None when the folder has no run."""
    names = run_names()
    if not names:
        address.write_run("")
        return None
    with st.sidebar:
        name = address.choose(
            st.selectbox,
            "run",
            "Run",
            names,
            default=names[0],
            show=lambda name: name,
            on_write=address.write_run,
            help="A run is one recording of one model on one set of prompts.",
        )
        address.write("run", name)
        # the bar stays, to choose another run
        try:
            run, key = _opened(name)
        except (CaptureError, ExplorerError) as error:
            return Problem(str(error))
        phase = _select_phase(run)
        domain = _select_domain(run)
        layer, site = _select_site(run)
    return View(run, name, key, domain, phase, layer, site)


def _opened(name: str) -> tuple[Run, Key]:
    path = runs_folder() / f"{name}{SUFFIX}"
    try:
        status = path.stat()
    except OSError:
        raise ExplorerError(f"The run {name!r} was removed; choose another one.") from None
    key = (str(path), status.st_mtime_ns, status.st_size)
    return _open(key), key


@st.cache_resource(max_entries=8, show_spinner=False, on_release=lambda run: run.close())
def _open(key: Key) -> Run:
    return open_run(key[0])


def _select_phase(run: Run) -> str | None:
    if run.phases == ["prompt"] or not run.phases:
        return address.pick("phase", ["prompt"], default="", what="phase") or None
    phase = address.choose(
        st.segmented_control,
        "phase",
        "Phase",
        ["", *run.phases],
        default="",
        show=PHASES.__getitem__,
        help="Prompt: tokens that the model read. Generated: tokens that it wrote.",
    )
    return phase or None


def _select_domain(run: Run) -> str | None:
    if run.domains in ([], [""]):
        return None
    keys = [domain or NO_DOMAIN for domain in run.domains]
    value = address.choose(
        st.selectbox,
        "domain",
        "Domain",
        ["", *keys],
        default="",
        show=lambda domain: visible(domain) if domain else "All domains",
        help="What the prompts are about, as labelled when they were recorded.",
    )
    return {"": None, NO_DOMAIN: ""}.get(value, value)


def _select_site(run: Run) -> tuple[int, int]:
    several = several_sites(run)
    sites = {site_name(s.layer, s.site, several=several): (s.layer, s.site) for s in run.sites}
    name = address.choose(
        st.selectbox,
        "layer",
        "Layer",
        list(sites),
        default=next(iter(sites)),
        show=lambda name: f"Layer {name}",
        help="The decoder layer whose router the pages look at.",
    )
    return sites[name]


def several_sites(run: Run) -> bool:
    """Return whether some layer of the run has more than one router."""
    return len(run.layers) < len(run.sites)


def ask(view: View, question: Callable[..., T], **arguments: Any) -> T:
    """Return ``question(run, **arguments)``, remembered until the run's file changes."""
    name = f"{question.__module__}.{question.__qualname__}"
    answer: T = _answer(view.key, name, arguments, view.run, question)
    return answer


@st.cache_data(max_entries=400, show_spinner=False)
def _answer(
    key: Key, name: str, arguments: dict[str, Any], _run: Run, _question: Callable[..., Any]
) -> Any:
    return _question(_run, **arguments)


def balance_of(view: View, load: pd.DataFrame) -> pd.DataFrame:
    """Return the balance of every site under the view's filters, remembered."""
    return _balance(view.key, view.domain, view.phase, load, view.scope().n_tokens)


@st.cache_data(max_entries=50, show_spinner=False)
def _balance(
    key: Key, domain: str | None, phase: str | None, _load: pd.DataFrame, n_tokens: int
) -> pd.DataFrame:
    return balance_table(_load, n_tokens=n_tokens)


def new_name(folder: Path, wish: str) -> str:
    """Return a name for a new run that no file and no unfinished capture has."""
    taken = {path.name.split(SUFFIX)[0] for path in folder.glob(f"*{SUFFIX}*")}
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
