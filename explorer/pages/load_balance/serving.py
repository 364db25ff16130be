"""The part of the load balance page for serving: GPUs, decode batches, hot and cold experts."""

import numpy as np
import pandas as pd
import streamlit as st

from explorer.pages.load_balance import data
from explorer.pages.load_balance.figures import balancedness_lines, coverage, decode_reads, gpu_bars
from explorer.pages.load_balance.placements import placements_section
from explorer.queries.load import BatchRouting, routing
from explorer.text import counted
from explorer.ui import address
from explorer.ui.chart import chart, listing
from explorer.ui.problems import instead, section, without_ids
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import span

MAX_TOKENS = 30_000  # that batches are made of
_SEED = 0


def serving_section(view: View, load: pd.DataFrame) -> None:
    """Draw what serving this traffic would ask of GPUs.

    Parameters
    ----------
    load : DataFrame
        Of all experts, from ``queries.load.expert_load``, under the view's filters.
    """
    st.subheader("Serving", anchor=False)
    _hot_and_cold(view, load)
    _gpus(view, load)
    _batches(view)


_LISTS = {"hot": "Hottest first", "cold": "Coldest first", "dead": "Dead"}


@section("Hottest, coldest and dead experts")
def _hot_and_cold(view: View, load: pd.DataFrame) -> None:
    """List all experts of the layers that are shown; a row leads to its expert."""
    known = load.dropna(subset=["ratio"])
    kind = address.choose(st.segmented_control, "hot", "Experts by load", _LISTS)
    rows = known.sort_values("ratio", ascending=kind != "hot", kind="stable")
    if kind == "dead":
        rows = rows[rows["assignments"] == 0]
    if rows.empty:
        instead("Every expert of these layers was chosen.")
        return
    rows = rows.assign(share=100 * rows["share"]).reset_index(drop=True)

    def go_to() -> None:
        chosen = st.session_state["experts by load"]["selection"]["rows"]
        if chosen:
            place = rows.loc[chosen[0], ["layer", "site", "expert_id"]]
            address.jump_to_expert(view, place.astype(float).tolist())

    columns = {
        "layer": "Layer",
        **({"site": "Router"} if (load["site"] > 0).any() else {}),
        "expert_id": "Expert",
        "assignments": ("Assignments", "localized"),
        "share": ("Share", "%.2f%%"),
        "ratio": ("× fair share", "%.2f"),
    }
    listing(
        rows,
        columns,
        alt=f"{counted(len(rows), 'expert')} of the layers that are shown by load; click a title "
        "to sort, and the box of a row for its expert",
        key="experts by load",
        on_select=go_to,
        selection_mode="single-row",
        height=320,
    )
    dead = int((known["assignments"] == 0).sum())
    st.caption(
        f"{counted(len(rows), 'expert')} of {len(known):,}, {dead} of them dead. Click a title to "
        "sort, and the box of a row for its expert."
    )


@section("Load of GPUs")
def _gpus(view: View, load: pd.DataFrame) -> None:
    experts = view.run.site_info(view.layer, view.site).n_routed
    same = load[load["n_experts"] == experts]
    gpus, nodes, groups, replicas = _controls(experts)
    table = data.gpu_table(same, gpus=gpus, nodes=nodes, groups=groups, replicas=replicas)
    balance = data.balance_of_gpus(table)
    overall = data.overall(table)
    more = replicas / experts - 1
    said = ", ".join(
        f"**{policy}** {value:.3f} (slowest GPU × {1 / value:.2f})"
        for policy, value in overall.items()
        if value > 0
    )
    said = said or "not defined without an assignment"
    st.markdown(
        f"Balancedness over all layers, mean over largest GPU load: {said}. With {replicas} "
        f"physical experts on {counted(gpus, 'GPU')}, {more:.0%} more expert weights are held in "
        "memory."
    )
    if "in order" not in set(table["policy"]):
        st.caption(
            f"{experts} experts do not divide by {counted(gpus, 'GPU')} in the order of their ids."
        )
    if len(same) < len(load):
        st.caption(f"Only layers with {experts} experts.")
    here = view.here(table)
    left, right = st.columns(2, gap="medium")
    with left:
        chart(
            gpu_bars(here, layer=view.site_name, scope=view.scope(), dark=is_dark()),
            key="gpu bars",
            alt=f"Bars: load of {counted(gpus, 'GPU')} in layer {view.site_name} under "
            f"{counted(here['policy'].nunique(), 'placement')}, {span(here['ratio'], '.2f')} times "
            "the mean.",
            table=here,
        )
    with right:
        chart(
            balancedness_lines(balance, scope=view.scope(over_layers=True), dark=is_dark()),
            key="gpu balance",
            alt=f"Balancedness of {counted(gpus, 'GPU')} over "
            f"{counted(balance['layer'].nunique(), 'layer')} under "
            f"{counted(balance['policy'].nunique(), 'placement')}.",
            table=balance,
        )
    st.caption(
        "EPLB: DeepSeek's expert-parallel load balancer, which copies hot experts and packs them. "
        "Loads are those of this traffic; other traffic is balanced less well."
    )
    placements_section(
        view, n_experts=experts, gpus=gpus, nodes=nodes, groups=groups, replicas=replicas
    )


def _controls(experts: int) -> tuple[int, int, int, int]:
    """Draw the sizes; every one is kept in the address."""
    columns = st.columns([2, 2, 2, 4])
    powers = [n for n in (2, 4, 8, 16, 32, 64, 128, 256) if n <= experts] or [1]

    def pick(
        place: int, name: str, title: str, choices: list[int], default: int, *resets: str
    ) -> int:
        with columns[place]:
            shown = [str(n) for n in choices]
            return int(
                address.choose(
                    st.selectbox, name, title, shown, default=str(default), resets=resets
                )
            )

    gpus = pick(0, "gpus", "GPUs", powers, min(8, powers[-1]), "nodes", "replicas")
    few = [n for n in (1, 2, 4, 8) if gpus % n == 0]
    nodes = pick(1, "nodes", "Nodes", few, 1, "expert_groups")
    divisors = [n for n in range(1, experts + 1) if experts % n == 0 and n <= 64]
    fitting = [n for n in divisors if n % nodes == 0] or [1]
    usual = fitting[min(1, len(fitting) - 1)]
    groups = pick(2, "expert_groups", "Expert groups", fitting, usual)
    least = -(-experts // gpus) * gpus
    steps = [least + i * gpus for i in range(1 + max(1, experts // gpus))]
    with columns[3]:
        replicas = address.choose(
            st.select_slider,
            "replicas",
            "Physical experts a layer",
            [str(n) for n in steps],
            default=str(steps[min(1, len(steps) - 1)]),
            show=lambda n: f"{n} ({counted(int(n) - experts, 'copy', 'copies')})",
        )
    return gpus, nodes, groups, int(replicas)


@section("Batches")
def _batches(view: View) -> None:
    if without_ids(view.run, "What a decode batch reads"):
        return
    phase, chosen = _tokens(view)
    if not len(chosen.token_id):
        instead("None of these tokens is in a batch. Change the filters at the side.")
        return
    n_experts = view.run.site_info(view.layer, view.site).n_routed
    ids, note = _together(chosen, phase, decoded="generated" in view.run.phases)
    table = data.decode_reads(ids, n_experts)
    # what was read, which the view's phase and sample need not be
    scope = view.scope(len(ids))._replace(phase=phase, step=1)
    cut = (f"the first {len(ids):,} of {chosen.n_tokens:,}",) if len(ids) < chosen.n_tokens else ()
    left, right = st.columns(2, gap="medium")
    with left:
        chart(
            decode_reads(
                table,
                n_experts=n_experts,
                layer=view.site_name,
                scope=scope,
                notes=(*cut, note),
                dark=is_dark(),
            ),
            key="decode reads",
            alt=f"Different experts read by decode batches of {table['batch'].iloc[0]} to "
            f"{table['batch'].iloc[-1]} tokens, from {table['measured'].iloc[0]:.1f} to "
            f"{table['measured'].iloc[-1]:.1f} of {n_experts}.",
            table=table,
        )
    curve = data.coverage_curve(chosen.expert_ids, n_experts)
    with right:
        chart(
            coverage(curve, layer=view.site_name, scope=scope, notes=cut, dark=is_dark()),
            key="coverage",
            alt=f"Share of experts touched after so many tokens: {curve['share'].iloc[-1]:.0%} "
            f"after {int(curve['tokens'].iloc[-1]):,}.",
            table=curve,
        )


def _tokens(view: View) -> tuple[str, BatchRouting]:
    """Return the phase and the choices of the view's tokens: decoded ones where there are any."""
    known = [phase for phase in ("generated", "prompt") if phase in view.run.phases]
    phases = [view.phase] if view.phase is not None else known or ["prompt"]
    part = view.part and view.part.whole()  # the first tokens are read, not every n-th one
    for phase in phases:
        chosen = ask(
            view,
            routing,
            **view.place,
            domain=view.domain,
            phase=phase,
            part=part,
            max_tokens=MAX_TOKENS,
        )
        if len(chosen.token_id):
            break
    return phase, chosen


def _together(chosen: BatchRouting, phase: str, *, decoded: bool) -> tuple[np.ndarray, str]:
    """Return the experts of tokens in an order in which neighbours are of different requests."""
    if phase == "generated":
        return chosen.expert_ids, "batches of neighbours in the recorded decode steps"
    order = np.random.default_rng(_SEED).permutation(len(chosen.expert_ids))
    note = "batches of random prompt tokens"
    return chosen.expert_ids[order], note if decoded else f"no decoding was recorded: {note}"
