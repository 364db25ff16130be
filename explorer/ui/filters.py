"""The bar at the side: the run, and the filters that act on all pages."""

import streamlit as st

from capture.errors import CaptureError
from explorer import slices, writing
from explorer.errors import ExplorerError
from explorer.queries.where import Part
from explorer.run import Run
from explorer.text import counted, plain, visible
from explorer.ui import address, problems, state
from explorer.ui.glossary import help_text
from explorer.ui.state import PHASES, RunProblem, View, several_sites
from explorer.ui.wording import domain_name, site_name

MAX_SEARCH = 200


def select_view() -> View | RunProblem | None:
    """Draw the bar at the side and return what it says; None when the folder has no run."""
    names = state.run_names()
    if not names:
        address.write_run("")
        return None
    with st.sidebar:
        name = address.choose(
            st.selectbox,
            "run",
            "Run",
            names,
            default=state.default_run(names),
            on_write=address.write_run,
            help=help_text("run"),
        )
        address.write("run", name)
        _list_refused(names)
        # the bar stays, to choose another run
        try:
            run, key = state.opened(name)
        except (CaptureError, ExplorerError) as error:
            return RunProblem(str(error))
        phase = _select_phase(run)
        domain = _select_domain(run)
        part = _select_part(run)
        layers = _select_layers(run)
        layer, site = _select_site(run, layers)
    return View(run, name, key, domain, phase, layer, site, part, layers)


def chips(view: View) -> None:
    """Draw the filters that act on what is below, each with a button that takes it off."""
    part = view.part or Part()
    said = {
        "domain": None if view.domain is None else f"Domain: {domain_name(view.domain)}",
        "phase": view.phase and f"Phase: {PHASES[view.phase]}",
        "search": part.search and f"Contains “{part.search}”",
        "slice": part.slice and f"Slice: {part.slice}",
        "from": view.layers and f"Layers {view.layers[0]} to {view.layers[1]}",
    }
    active = {name: label for name, label in said.items() if label}
    if not active:
        return
    with st.container(horizontal=True, gap="small", vertical_alignment="center", key="chips"):
        for name, label in active.items():
            st.button(
                plain(label),
                icon=":material/close:",
                key=f"chip {name}",
                help="Take this filter off",
                on_click=take_off,
                args=(name,),
            )
        if len(active) > 1:
            st.button(
                "Clear all", key="chip all", type="tertiary", on_click=take_off, args=tuple(active)
            )


def take_off(*names: str) -> None:
    """Take filters out of the address."""
    for name in names:
        address.write(name, "")
        if name == "from":
            address.write("to", "")


def _list_refused(names: list[str]) -> None:
    """List the files that were found to be no sound runs, each with the reason."""
    refused = state.refused(names)
    if refused:
        with st.expander(f"{counted(len(refused), 'file')} cannot be shown"):
            for name, reason in refused.items():
                st.caption(f"**{plain(name)}** · {plain(reason)}")


def _select_phase(run: Run) -> str | None:
    if run.phases == ["prompt"] or not run.phases:
        return address.pick("phase", run.phases, default="", what="Phase") or None
    phase = address.choose(
        st.segmented_control,
        "phase",
        "Phase",
        ["", *run.phases],
        show=PHASES.__getitem__,
        help=help_text("phase"),
    )
    return phase or None


def _select_domain(run: Run) -> str | None:
    if run.domains in ([], [""]):
        return None
    domains = {address.domain_key(domain): domain for domain in run.domains}
    value = address.choose(
        st.selectbox,
        "domain",
        "Domain",
        ["", *domains],
        show=lambda key: domain_name(domains[key]) if key else "All domains",
        help=help_text("domain"),
    )
    return domains.get(value)


def _select_part(run: Run) -> Part | None:
    """Draw the search in the prompts and the choice of a slice."""
    if not run.records_ids:
        if address.read("search") or address.read("slice"):
            address.note(f"The search and the slice of the link do not apply: that {run.needs_ids}")
            address.write("search", "")
            address.write("slice", "")
        return None
    search = address.typed(
        "search",
        "Prompts that contain",
        MAX_SEARCH,
        placeholder="any text",
        help="Upper or lower case; press Enter. All pages show the tokens of these prompts only.",
    )
    chosen = _select_slice(run)
    if not search and chosen is None:
        return None
    if chosen is None:
        return Part(search)
    return Part(search or None, chosen.info.name, chosen.info.created, token_ids=chosen.token_ids)


def _select_slice(run: Run) -> slices.Slice | None:
    """Draw the choice of a slice where the run has some; return the one chosen."""
    known = _listed(run, slices.version(run))
    usable = [info for info in known if not info.problem]
    wanted = address.read("slice")
    if not usable and not wanted:
        return None
    name = address.choose(
        st.selectbox,
        "slice",
        "Slice",
        ["", *(info.name for info in usable)],
        show=lambda name: visible(name) if name else "All tokens",
        help=help_text("slice"),
    )
    if not name:
        return None
    try:
        chosen = slices.load_slice(run, name)
    except ExplorerError as error:
        address.note(str(error))
        address.write("slice", "")
        return None
    _about(run, chosen.info)
    return chosen


@st.cache_data(max_entries=32, show_spinner=False, hash_funcs={Run: lambda run: run.fingerprint})
def _listed(run: Run, version: int) -> list[slices.SliceInfo]:
    return slices.list_slices(run)


def _about(run: Run, info: slices.SliceInfo) -> None:
    with st.popover("About this slice", icon=":material/info:", width="stretch"):
        by = f" by {plain(info.author)}" if info.author else ""
        st.markdown(f"{counted(info.n_tokens, 'token')}, saved{by} on {plain(info.created[:10])}.")
        if info.note:
            st.markdown(plain(info.note, lines=True))
        if writing.may_write():
            st.button("Delete the slice", on_click=_delete, args=(run, info.name))


@problems.in_callback
def _delete(run: Run, name: str) -> None:
    slices.delete_slice(run, name)
    address.write("slice", "")


def _select_layers(run: Run) -> tuple[int, int] | None:
    """Draw the range of layers; None = all of them."""
    names = [str(layer) for layer in run.layers]
    if len(names) < 2:
        return None
    left, right = st.columns(2)
    with left:
        first = _select_end("from", "Layers from", names, names[0])
    with right:
        last = _select_end("to", "to", names[names.index(first) :], names[-1])
    return None if (first, last) == (names[0], names[-1]) else (int(first), int(last))


def _select_end(name: str, label: str, choices: list[str], default: str) -> str:
    def change(value: str) -> None:
        address.write(name, "" if value == default else value)
        # what was chosen outside of the range is not shown any more
        for other in ("layer", "head", *(["to"] if name == "from" else [])):
            number = address.read(other).split(".")[0]
            outside = number.isdecimal() and (
                int(number) < int(value) if name == "from" else int(number) > int(value)
            )
            if outside:
                address.write(other, "")

    return address.choose(
        st.selectbox,
        name,
        label,
        choices,
        default=default,
        on_write=change,
        help="Figures over layers show this range only." if name == "from" else None,
    )


def _select_site(run: Run, layers: tuple[int, int] | None) -> tuple[int, int]:
    several = several_sites(run)
    sites = {
        site_name(s.layer, s.site, several=several): (s.layer, s.site)
        for s in run.sites
        if layers is None or layers[0] <= s.layer <= layers[1]
    }
    name = address.choose(
        st.selectbox,
        "layer",
        "Layer",
        list(sites),
        show=lambda name: f"Layer {name}",
        help="The decoder layer whose router the pages look at.",
    )
    return sites[name]
