"""What to compare: routers, settings, and the button that starts it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from capture.errors import PromptError, cut, quoted
from capture.paths import RUN_SUFFIX
from explorer import writing
from explorer.comparison.conditions import USUAL
from explorer.comparison.results_file import comparisons_of, open_comparison
from explorer.errors import ComparisonError, RouterError, UnknownNameError
from explorer.pages.compare.figures import family_name
from explorer.router_cards import CARDS, SENSIBLE, parse_router, split_routers
from explorer.run import Run
from explorer.text import duration, plain
from explorer.ui import address
from explorer.ui.job import as_record, follow, typed_prompts, uploaded_prompts
from explorer.ui.state import Key, View, key_of, new_name, runs_folder
from explorer.worker import CaptureRequest, CompareRequest, Job, shared_worker
from explorer.worker.capture_cost import comparison_seconds, seconds_per_token
from explorer.worker.requests import DEMO_MODEL

_TOKENS = (2_000, 5_000, 10_000, 30_000, 100_000)
_WATCHED = "comparison in progress"
_RUN, _TYPED, _FILE = "run", "typed", "file"
_SOURCES = {_RUN: "This run", _TYPED: "Typed prompts", _FILE: "Uploaded prompts"}


@dataclass(frozen=True)
class _Wanted:
    """What the form says."""

    routers: list[str]
    options: dict[str, Any]
    prompts: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""


def start_comparison(view: View, *, first: bool) -> None:
    """Draw the job in progress, and the form for a new one to those who may write.

    Parameters
    ----------
    first : bool
        There is no comparison yet, so that the form is open.
    """
    job = _job()
    if job is not None:
        if job.active:
            st.session_state[_WATCHED] = job.job_id
        ended = follow(job.job_id, key="compare")
        if ended is None:
            return
        if ended.path:
            run = getattr(ended.request, "run", "")
            if run and run != str(view.run.path):
                _open(ended)
            elif st.session_state.pop(_WATCHED, None) == ended.job_id:
                address.write("comparison", Path(ended.path).name)
    if not writing.may_write():
        return
    with st.expander("New comparison", expanded=first, icon=":material/add:"):
        wanted = _form(view.run)
        if st.button("Compare", type="primary", disabled=bool(wanted.problem)):
            _start(view, wanted)
        if wanted.problem:
            st.caption(plain(wanted.problem))
        elif expected := _expected(view, wanted):
            st.caption(expected)
        st.caption(
            "The same from a terminal: `python -m explorer compare RUN --routers ... --live`. "
            "Routers that the file has already are not computed again."
        )


def _job() -> Job | None:
    """Return the comparison that the address names, or the newest active one."""
    jobs = [job for job in shared_worker().jobs() if isinstance(job.request, CompareRequest)]
    wanted = address.read("job")
    named = next((job for job in jobs if str(job.job_id) == wanted), None)
    return named or next((job for job in jobs if job.active), None)


def _open(job: Job) -> None:
    name = Path(job.request.run).stem if isinstance(job.request, CompareRequest) else ""
    if name and st.button(f"Open {plain(name)}", icon=":material/open_in_new:"):
        address.write_run(name)
        st.rerun()


def _form(run: Run) -> _Wanted:
    # an export without text has nothing to route or to predict
    without_text = run.counts_only or run.sums_only
    sources = [source for source in _SOURCES if source != _RUN or not without_text]
    source = st.segmented_control(
        "Text to compare on",
        sources,
        default=sources[0],
        required=True,
        format_func=_SOURCES.__getitem__,
        help="Prompts of your own are recorded with the demo model first, then compared on.",
        key="compare source",
    )
    prompts, problem = _prompts(source or sources[0])
    routers, wrong = _routers()
    conditions = st.multiselect(
        "Conditions",
        USUAL,
        placeholder="None: only routers",
        help="Each is measured as a 2 × 2: its weights or the model's, with its routing or the "
        "model's. All of them take minutes.",
        key="compare conditions",
    )
    left, middle, right = st.columns(3)
    tokens = left.select_slider(
        "Held-out tokens",
        _TOKENS,
        value=10_000,
        format_func=lambda n: f"{n:,}",
        help="More tokens, smaller standard errors, more time.",
        key="compare tokens",
    )
    seeds = middle.select_slider(
        "Seeds of random rules", (1, 2, 3, 5), value=1, key="compare seeds"
    )
    with right:
        layers = st.checkbox("Also one layer at a time", key="compare layers")
        latency = st.checkbox("Measure time", value=True, key="compare latency")
        oracle = st.checkbox(
            "Bound of the last layer",
            help="Every set of experts is tried in the last layer, and the next token chooses: "
            "what no router can reach. One forward pass a set.",
            key="compare oracle",
        )
    options = _loading(run) if source == _RUN else {}
    options |= {
        "tokens": tokens,
        "fit_tokens": 2 * tokens,
        "seeds": list(range(seeds)),
        "layers": layers,
        "latency": latency,
        "oracle": oracle,
        "conditions": conditions,
    }
    return _Wanted(routers, options, prompts, problem or wrong)


def _expected(view: View, wanted: _Wanted) -> str:
    """Say how long the comparison may take, from what was measured before; "" if nothing was."""
    options = wanted.options
    files = comparisons_of(view.run.path)
    per_token = _per_token(view.key, key_of(files[0]) if files else None, view.run)
    if per_token is None or wanted.prompts or not options.get("live", True):
        return ""
    names = wanted.routers or list(SENSIBLE)
    low, high = comparison_seconds(
        per_token,
        routers=len(names) + 1,  # and chance
        tokens=options["tokens"],
        fit_tokens=options["fit_tokens"],
        seeds=len(options["seeds"]),
        latency=options["latency"],
        conditions=len(options["conditions"]),
    )
    more = [
        "rules that learn on the model's loss"
        if any(CARDS[parse_router(name).name].fits == "trained" for name in names)
        else "",
        "one layer at a time" if options["layers"] else "",
        "the bound of the last layer" if options["oracle"] else "",
    ]
    rest = " and ".join(one for one in more if one)
    return (
        f":material/timer: Expected: **{duration(low)} to {duration(high)}**, from the passes of "
        + (plain(files[0].name) if files else "the recording of this run")
        + (f"; {rest} take longer" if rest else "")
        + ". Another machine, or a busy one, differs; routers that the file has cost nothing."
    )


@st.cache_data(max_entries=8, show_spinner=False)
def _per_token(run_key: Key, key: Key | None, _run: Run) -> tuple[float, float] | None:
    try:
        if key is not None:
            with open_comparison(Path(key[0])) as last:
                return seconds_per_token(_run, last)
    except (ComparisonError, OSError):
        pass  # the page says what is wrong with the file
    return seconds_per_token(_run, None)


def _loading(run: Run) -> dict[str, Any]:
    """Ask whether the model that the run names may be loaded; without it, replay is left.

    A run may come from a stranger, and so may the name in it.
    """
    named = str(run.info["model"])
    if named == DEMO_MODEL:
        return {}
    allowed = st.checkbox(
        f"Load the model {plain(cut(named, 120))} to compare live",
        help="The run names it. It is loaded on the machine that runs this app, and downloaded "
        "first if it is not there. Without it, routers are compared by replay of what was "
        "recorded: agreement and balance, no loss.",
        key=f"compare loads {named}",
    )
    return {"model": named} if allowed else {"live": False}


def _prompts(source: str) -> tuple[list[dict[str, Any]], str]:
    """Return typed or uploaded prompts, and what is wrong with them."""
    if source == _RUN:
        return [], ""
    try:
        if source == _FILE:
            found = uploaded_prompts("compare file")
        else:
            found = typed_prompts("Prompts, one a line", "compare typed", height=120)
    except PromptError as error:
        return [], str(error)
    records = [as_record(prompt) for prompt in found if prompt.text]
    few = "Give at least four prompts: rules are fitted on some and reported on the others."
    return records, "" if len(records) >= 4 else few


def _described(name: str) -> str:
    """Return a router's name with its family and title."""
    card = CARDS[name]
    return f"{name} · {family_name(card.family)} · {card.title}"


def _routers() -> tuple[list[str], str]:
    """Return the chosen routers, none = the usual set, and what is wrong with them."""
    offered = [name for name, card in CARDS.items() if not card.shelved]
    picked = st.multiselect(
        "Routers",
        sorted(offered, key=lambda name: (CARDS[name].family, name)),
        format_func=_described,
        placeholder="Nothing chosen: some of every family",
        key="compare routers",
    )
    typed = st.text_input(
        "With arguments",
        placeholder="top_k(k=1), kmeans(n_clusters=128), top_p(p=0.5)",
        help="Any router of the list with values of its own, divided by commas.",
        key="compare typed routers",
    )
    extra = split_routers(typed)
    try:
        for text in extra:
            spec = parse_router(text)
            if spec.name not in CARDS:
                raise UnknownNameError(f"There is no router {quoted(spec.name)} in the list above.")
    except (RouterError, UnknownNameError) as error:
        return [], str(error)
    return [*picked, *extra], ""


def _start(view: View, wanted: _Wanted) -> None:
    run, capture = str(view.run.path), None
    if wanted.prompts:
        folder = runs_folder()
        run = str(folder / f"{new_name(folder, 'compared')}{RUN_SUFFIX}")
        capture = CaptureRequest(run, prompts=wanted.prompts)
    request = CompareRequest(run, wanted.routers, capture=capture, **wanted.options)
    job = writing.submit(request)
    address.write("job", str(job.job_id))
    st.rerun()
