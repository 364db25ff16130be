"""Tokens: a prompt's own text, coloured by what the routers did; a token's experts; an expert's."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from explorer.pages.tokens.data import (
    QUANTITIES,
    Pin,
    prompt_experts,
    token_experts,
    token_gates,
    token_quantity,
    token_scores,
    tokens,
)
from explorer.pages.tokens.figures import (
    expert_colors,
    expert_groups,
    quantity_scale,
    score_bars,
    token_layer_heatmap,
    token_routes,
    tokens_shown,
)
from explorer.pages.tokens.what_if import what_if_section, what_is_asked
from explorer.queries.load import expert_load_by_domain
from explorer.queries.overview import prompt, prompt_count, prompts
from explorer.text import counted, covering, plain
from explorer.ui import address, theme
from explorer.ui.chart import chart
from explorer.ui.concordance import expert_tokens_section
from explorer.ui.heatmap import Scale
from explorer.ui.problems import instead, section, without_ids
from explorer.ui.shell import current_view
from explorer.ui.state import View, ask, is_dark
from explorer.ui.theme import PinKey
from explorer.ui.token_strip import Legend, Token, token_strip
from explorer.ui.wording import (
    Scope,
    absent_gate,
    certainty_sentence,
    domain_name,
    expert_label,
    probabilities,
    prompt_name,
    routing_sentence,
    token_name,
    unnamed,
)

# a picker with more entries gets slow in the browser; the search narrows the list down
MAX_LISTED = 1000
# longer prompts are shown in part, around the chosen token
MAX_STRIP = 4096
MAX_PINS = theme.N_HUES
_COLORS = {
    "expert": "Expert",
    "entropy": "Gate entropy",
    "margin": "Margin",
    "top1_weight": "Top-1 weight",
    "pinned_weight": "Pinned experts",
}
_TAKES = 3  # domains of an expert that are named
_MODES = {"look": "As it was", "what-if": "What if"}
_SCOPES = {"layer": "This layer", "mean": "Mean of layers"}


def render() -> None:
    """Draw the page."""
    view = current_view()
    address.follow_jump()
    if view.run.counts_only or view.run.sums_only:
        _text_left_out(view)
        return
    st.markdown(
        "A model reads text in pieces, its **tokens**. Below is a prompt as the model saw it; "
        "click a token to see which experts it went to, and how sure the router was."
    )
    expert_tokens_section(view)
    chosen = _pick_prompt(view)
    if chosen is None:
        return
    prompt_id = int(chosen["prompt_id"])
    listed = ask(view, tokens, prompt_id=prompt_id)
    listed.attrs["prompt_id"] = prompt_id
    if listed.empty:
        instead("No token of this prompt was recorded: the capture stopped before it.")
        return
    if without_ids(view.run, "This page"):
        return
    token_id = _selected(listed, view)
    mode = address.choose(
        st.segmented_control, "mode", "Routing", _MODES, label_visibility="collapsed"
    )
    quantity, pins, values = _colouring(view, chosen)
    token = listed[listed["token_id"] == token_id].iloc[0]
    if mode == "what-if":
        _strip(view, listed, values, quantity, pins, token_id)
        what_if_section(view, listed, token, what_is_asked())
        return
    left, right = st.columns([3, 2], gap="large")
    with left:
        _strip(view, listed, values, quantity, pins, token_id)
        _heatmap(view, chosen, values, quantity, token_id, listed)
    with right, st.container(key="token panel"):
        token_panel(view, token, pins)


def _text_left_out(view: View) -> None:
    """Say what there is instead of tokens in a run of sums."""
    st.markdown(
        "This page reads prompts token by token, and this run holds neither their text nor what "
        "the routers did with each token. The sums that were kept are on these pages:"
    )
    pages = {"overview": "Overview", "load_balance": "Load balance"}
    if view.run.counts_only:
        pages["flow"] = "Flow"  # pairs of experts are sums, too
    for page, title in pages.items():
        st.page_link(
            f"explorer/pages/{page}/page.py",
            label=title,
            icon=":material/arrow_forward:",
            query_params=address.kept(),
        )


def _pick_prompt(view: View) -> "pd.Series | None":
    total = ask(view, prompt_count, **view.prompt_filters)
    found = ask(view, prompts, limit=MAX_LISTED, **view.prompt_filters)
    wanted = address.read("prompt")
    listed = set(found["prompt_id"].astype(str))
    if wanted.isdecimal() and wanted not in listed and view.part is None:
        # a link may name a prompt beyond the list
        linked = ask(view, prompt, prompt_id=min(int(wanted), 2**31 - 1))
        if len(linked) and view.domain in (None, linked["domain"].iloc[0]):
            found = pd.concat([linked, found])
    if found.empty:
        instead("No prompt matches. Change the filters at the side.")
        return None
    if total > MAX_LISTED:
        st.caption(
            f"The first {MAX_LISTED:,} of {total:,} prompts are listed: search at the side for a "
            "text that the others contain."
        )
    rows = {str(row["prompt_id"]): row for _, row in found.iterrows()}
    names = {key: prompt_name(row) for key, row in rows.items()}
    first = _default_prompt(found)
    key = address.choose(
        st.selectbox,
        "prompt",
        "Prompt",
        list(rows),
        default=first,
        show=lambda key: names.get(key, key),
        resets=("token",),
        help="Type to search in the list.",
    )
    return rows[key]


def _default_prompt(found: pd.DataFrame) -> str:
    """Return the first prompt that has text to look at, rather than a single word."""
    fitting = found[found["tokens"] >= 12]
    return str((fitting if len(fitting) else found)["prompt_id"].iloc[0])


def _selected(listed: pd.DataFrame, view: View) -> int:
    """Return the token of the address; by default an early one, so that a panel is there."""
    middle = int(listed["token_id"].iloc[min(len(listed) - 1, 5)])
    if (of_slice := _of_slice(view)) is not None:
        middle = int(listed["token_id"][listed["token_id"].isin(of_slice)].iloc[0])
    known = set(listed["token_id"].astype(str))
    return int(address.pick("token", sorted(known), default=str(middle), what="Token"))


def _colouring(view: View, chosen: pd.Series) -> tuple[str, list[Pin], pd.DataFrame]:
    """Draw the choice of colours; return the quantity, the pins, and its values."""
    row = st.container(horizontal=True, vertical_alignment="bottom", gap="medium")
    with row:
        quantity = address.choose(
            st.segmented_control,
            "color",
            "Colour by",
            _COLORS,
            help="  \n".join(f"**{_COLORS[q]}**: {QUANTITIES[q].meaning}" for q in _COLORS),
        )
    pins: list[Pin] = []
    if quantity == "pinned_weight":
        pins = _pick_pins(view)
        if not pins:
            st.caption("Pin at least one expert; until then the text is coloured by expert.")
            quantity = "expert"
    prompt_id = int(chosen["prompt_id"])
    values = ask(view, token_quantity, prompt_id=prompt_id, quantity=quantity, pinned=tuple(pins))
    values = view.of_layers(values)
    scope = "layer"
    if quantity != "expert":  # experts of different layers have nothing in common
        with row:
            scope = address.choose(
                st.segmented_control,
                "scope",
                "At",
                list(_SCOPES),
                show=lambda s: f"Layer {view.site_name}" if s == "layer" else _SCOPES[s],
            )
    st.session_state["strip scope"] = scope
    return quantity, pins, values


def _pick_pins(view: View) -> list[Pin]:
    names = {
        f"{s.layer}.{s.site}.{e}": expert_label(view.named(s.layer, s.site), e)
        for s in view.run.sites
        for e in range(s.n_experts)
    }
    asked = [pin for pin in address.read("pins").split(",") if pin]
    kept = [pin for pin in dict.fromkeys(asked) if pin in names][:MAX_PINS]
    if kept != asked:
        address.note("Some pinned experts of the link are not in this run; they were left out.")
        address.write("pins", ",".join(kept))
    key = "address:pins"
    st.session_state[key] = kept
    st.multiselect(
        "Pinned experts",
        list(names),
        key=key,
        format_func=names.__getitem__,
        max_selections=MAX_PINS,
        placeholder="Choose up to eight, such as L3.E12",
        on_change=lambda: address.write("pins", ",".join(st.session_state[key])),
    )
    return [(int(a), int(b), int(c)) for a, b, c in (pin.split(".") for pin in kept)]


@section("The prompt, token by token")
def _strip(
    view: View,
    listed: pd.DataFrame,
    values: pd.DataFrame,
    quantity: str,
    pins: list[Pin],
    token_id: int,
) -> None:
    scope = st.session_state["strip scope"]
    scale = quantity_scale(values["value"], QUANTITIES[quantity])
    here = view.here(values) if scope == "layer" else values
    if (of_slice := _of_slice(view)) is not None:
        here = here[here["token_id"].isin(of_slice)]
    level = here.groupby("token_id")["value"].mean()
    where = f"layer {view.site_name}" if scope == "layer" else _mean_of(view)
    legend = Legend(
        f"{QUANTITIES[quantity].label}, {where}:", f"{scale.low:.3g}", f"{scale.high:.3g}"
    )
    hues = dict.fromkeys(level.index, theme.accent(is_dark()))
    marks: dict[int, str] = {}
    if quantity == "expert":
        hues, marks, legend = _of_experts(view, here)
        scale, level = Scale("", 0.0, 1.0), level.where(level.isna(), 1.0)
    elif pins:
        hues = _pin_hues(view, listed, pins, scope)
        swatches = tuple(
            (color, expert_label(view.named(a, b), c))
            for (a, b, c), color in zip(pins, theme.hues(is_dark()), strict=False)
        )
        legend = Legend("Went to a pinned expert:", swatches=swatches)
    absent = _absent(view, here, quantity)
    hints = _hints(view, listed, level, QUANTITIES[quantity].label, absent)
    start = _window_start(listed, token_id)
    shown = listed.iloc[start : start + MAX_STRIP]
    if len(shown) < len(listed):
        st.caption(f"Tokens {start:,} to {start + len(shown) - 1:,} of {len(listed):,} are shown.")
    found = _found(view, listed)
    strip = []
    for row in shown.itertuples():
        value = float(level.get(row.token_id, float("nan")))
        known = value == value
        part = min(1.0, max(0.0, (value - scale.low) / (scale.high - scale.low))) if known else None
        text = row.text if row.text is not None else unnamed(row.token, row.position)
        hue = hues.get(row.token_id)
        strip.append(
            Token(
                int(row.token_id),
                text,
                part,
                hints[row.token_id],
                hue,
                generated=row.phase == "generated",
                mark=marks.get(row.token_id, ""),
                found=row.Index in found,
            )
        )
    token_strip(
        strip,
        selected=token_id,
        legend=legend,
        label="Tokens of the prompt. Arrow keys step, Enter chooses.",
        key="strip",
        on_pick=lambda picked: address.write("token", str(picked)),
    )


def _found(view: View, listed: pd.DataFrame) -> set[int]:
    """Return the rows of the tokens that the text of the search covers."""
    if view.part is None or not view.part.search:
        return set()
    pieces = listed["text"].fillna("").tolist()
    covered = itertools.chain.from_iterable(covering(pieces, view.part.search))
    return set(listed.index[list(covered)])


def _of_experts(view: View, here: pd.DataFrame) -> tuple[dict[int, str], dict[int, str], Legend]:
    """Return the colour and the number of the heaviest expert of each token, and the legend."""
    colors = expert_colors(is_dark())
    known = here.assign(group=expert_groups(here, _sizes(view))).dropna(subset=["group"])
    hues = {row.token_id: colors[int(row.group)] for row in known.itertuples()}
    # a number at every token would hide the words: one where the expert changes
    changes = known[known["value"] != known["value"].shift()]
    marks = {row.token_id: f"{row.value:.0f}" for row in changes.itertuples()}
    swatches = []
    for group, part in known.groupby("group"):
        name = expert_label(view.site_name, int(part["value"].iloc[0]))
        if (n := part["value"].nunique()) > 1:
            name = f"{n} others"
        swatches.append((colors[int(group)], f"{name} · {len(part)}"))
    return hues, marks, Legend("Heaviest expert, and its tokens here:", swatches=tuple(swatches))


def _sizes(view: View) -> dict[tuple[int, int], int]:
    return {(info.layer, info.site): info.n_experts for info in view.run.sites}


def _mean_of(view: View) -> str:
    if view.layers is None:
        return "mean of the layers"
    return f"mean of the layers {view.layers[0]} to {view.layers[1]}"


def _of_slice(view: View) -> "npt.NDArray[np.int64] | None":
    """Return the tokens of the slice, which alone are tinted; None without one."""
    return None if view.part is None else view.part.token_ids


def _window_start(listed: pd.DataFrame, token_id: int) -> int:
    """Return the first token shown, so that the chosen one is inside."""
    place = int((listed["token_id"] == token_id).to_numpy().argmax())
    return (place // MAX_STRIP) * MAX_STRIP


def _pin_hues(view: View, listed: pd.DataFrame, pins: list[Pin], scope: str) -> dict[int, str]:
    """Return the colour of the pinned expert that each token gave most weight to."""
    prompt_id = int(listed.attrs["prompt_id"])
    best: dict[int, tuple[float, str]] = {}
    for pin, color in zip(pins, theme.hues(is_dark()), strict=False):
        if scope == "layer" and pin[:2] != (view.layer, view.site):
            continue
        found = ask(view, prompt_experts, prompt_id=prompt_id, layer=pin[0], site=pin[1])
        for row in found[found["expert_id"] == pin[2]].itertuples():
            if row.weight > best.get(row.token_id, (0.0, ""))[0]:
                best[row.token_id] = (row.weight, color)
    return {token_id: color for token_id, (_, color) in best.items()}


def _absent(view: View, values: pd.DataFrame, quantity: str) -> str:
    """Say why some of the values are missing: what is so of each router that has none."""
    places = values[values["value"].isna()][["layer", "site"]].drop_duplicates()
    found = [view.run.site_info(int(layer), int(site)) for layer, site in places.to_numpy()]
    reasons = dict.fromkeys(absent_gate(quantity, info.n_experts, info.top_k) for info in found)
    return ", or ".join(reasons) or "not recorded"


def _hints(
    view: View, listed: pd.DataFrame, level: "pd.Series[float]", label: str, absent: str
) -> dict[int, str]:
    """Say of each token where it went at the layer of the view."""
    prompt_id = int(listed.attrs["prompt_id"])
    found = ask(view, prompt_experts, prompt_id=prompt_id, **view.place)
    routes: dict[int, list[str]] = {}
    for row in found.itertuples():
        share = "" if pd.isna(row.weight_share) else f" {row.weight_share:.0%}"
        routes.setdefault(row.token_id, []).append(
            expert_label(view.site_name, row.expert_id) + share
        )
    hints = {}
    missing = f"{label}: {absent}" if _of_slice(view) is None else "not of the slice"
    for row in listed.itertuples():
        value = float(level.get(row.token_id, float("nan")))
        amount = f"{label} {value:.3g}" if value == value else missing
        where = ", ".join(routes.get(row.token_id, [])) or "no expert"
        hints[row.token_id] = f"token {row.position}, {row.phase}: {where}; {amount}"
    return hints


@section("Tokens by layer")
def _heatmap(
    view: View,
    chosen: pd.Series,
    values: pd.DataFrame,
    quantity: str,
    token_id: int,
    listed: pd.DataFrame,
) -> None:
    place = int((listed["token_id"] == token_id).to_numpy().argmax())
    domain = chosen["domain"] or None
    figure = token_layer_heatmap(
        values,
        QUANTITIES[quantity],
        scope=Scope(len(listed), domain, None, bool(view.run.info["complete"]), layers=view.layers),
        groups=expert_groups(values, _sizes(view)) if quantity == "expert" else None,
        start=max(0, place - 60),
        missing=_absent(view, values, quantity),
        dark=is_dark(),
    )
    # the title says what the colours are
    figure.update_traces(colorbar_title_text="", selector={"type": "heatmap"})
    _mark(figure, view, values, len(listed), place)
    chart(
        figure,
        key="token map",
        alt=f"Heatmap of {counted(len(listed), 'token')} by "
        f"{counted(values['layer'].nunique(), 'layer')}: "
        f"{QUANTITIES[quantity].label}.",
        table=values.drop(columns="token_id"),
        made=None
        if quantity == "pinned_weight"
        else view.recipe(
            token_quantity,
            prompt_id=int(chosen["prompt_id"]),
            quantity=quantity,
            drop=("token_id",),
            over_layers=True,
        ),
        on_click=lambda data: _go_to_cell(view, data),
    )


def _mark(figure: go.Figure, view: View, values: pd.DataFrame, n_tokens: int, place: int) -> None:
    """Outline the chosen token's cell at the chosen layer."""
    sites = list(dict.fromkeys(zip(values["layer"], values["site"], strict=True)))
    shown = tokens_shown(n_tokens, len(sites), start=max(0, place - 60))
    x, y = place - shown.start, sites.index((view.layer, view.site))
    line = {"color": theme.foreground(is_dark()), "width": 1}
    figure.add_vrect(x0=x - 0.5, x1=x + 0.5, line=line)
    figure.add_shape(
        type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, line=line | {"width": 3}
    )


def _go_to_cell(view: View, data: list[float]) -> None:
    layer, site, token_id = (int(value) for value in data[:3])
    address.write("layer", view.named(layer, site))
    address.write("token", str(token_id))


@section("Token")
def token_panel(view: View, token: pd.Series, pins: Sequence[PinKey] = ()) -> None:
    """Draw the panel of one token.

    Parameters
    ----------
    token : Series
        A row of ``data.tokens``.
    pins : sequence of (layer, site, expert)
        Shown in their colours.
    """
    token_id = int(token["token_id"])
    text = token["text"]
    st.subheader(f"Token {int(token['position']):,}: “{plain(token_name(text))}”", anchor=False)
    experts = view.of_layers(ask(view, token_experts, token_id=token_id))
    gates = view.of_layers(ask(view, token_gates, token_id=token_id))
    here = view.here(experts)
    gate = view.here(gates).iloc[0]
    st.markdown(
        routing_sentence(here, site_name=view.site_name, n_experts=int(gate["n_experts"]))
        + " "
        + certainty_sentence(
            normalized_entropy=float(gate["normalized_entropy"]),
            margin=float(gate["margin"]),
            topk_mass=float(gate["topk_mass"]),
            n_experts=int(gate["n_experts"]),
            top_k=int(gate["top_k"]),
        )
        + _beside(token, experts)
    )
    _specialties(view, here)
    _scores(view, token_id, text, str(gate["score_function"]))
    route = token_routes(experts, token_text=text, pins=pins, dark=is_dark())
    # the panel is narrow
    known = experts["weight"].notna().any()
    route.update_layout(title={"text": f"Experts by layer{' (share of weight)' if known else ''}"})
    chart(
        route,
        key="token routes",
        alt="Bars, one per layer: the experts of the token and their share of its weight.",
        table=_route_table(experts, gates),
        on_click=lambda data: address.jump_to_expert(view, data),
    )


def _specialties(view: View, experts: pd.DataFrame) -> None:
    """Say of each expert of the token what else it takes, with a link to it."""
    loads = ask(view, expert_load_by_domain, phase=view.phase, part=view.part, **view.place)
    counts = loads.pivot_table(index="expert_id", columns="domain", values="assignments")
    for expert in experts["expert_id"]:
        name = expert_label(view.site_name, expert)
        takes = counts.loc[expert] / counts.loc[expert].sum()
        said = [
            f"{plain(domain_name(domain))} {share:.0%}"
            for domain, share in takes.nlargest(_TAKES).items()
            if share > 0
        ]
        label = f"{name} takes {', '.join(said)}" if len(counts.columns) > 1 else name
        there = {"layer": view.site_name, "id": str(expert), "about": "expert"}
        st.page_link(
            "explorer/pages/experts/page.py",
            label=label,
            icon=":material/arrow_forward:",
            query_params=address.kept() | there,
            help="Shares of all its tokens under the filters; click for the expert.",
        )


def _beside(token: pd.Series, experts: pd.DataFrame) -> str:
    shared = int(experts["n_shared_experts"].max()) if len(experts) else 0
    parts = " The model wrote this token itself." if token["phase"] == "generated" else ""
    if shared:
        parts += f" Beside them {counted(shared, 'shared expert')} saw it, as every token."
    if not pd.isna(token["loss"]):
        parts += f" Predicting the next token from here cost {token['loss']:.2f} nats of loss."
    return parts


@section("Scores of the experts")
def _scores(view: View, token_id: int, text: str | None, score_function: str) -> None:
    scores = ask(view, token_scores, token_id=token_id, **view.place)
    if not scores["recorded"].any():
        instead(
            "Every expert's score: not recorded for this token. Capture with `--level scores`, "
            "or with a larger `--sample-tokens`, to see it."
        )
        return
    raw = scores["score"].to_numpy(dtype=np.float64)
    values, unit, baseline = probabilities(raw, score_function)
    chart(
        score_bars(
            scores.assign(value=values),
            layer=view.site_name,
            token_text=text,
            unit=unit,
            baseline=baseline,
            column="value",
            dark=is_dark(),
        ),
        key="scores",
        alt=f"Bars of all {len(scores)} experts' scores in layer {view.site_name}, highest first; "
        "the chosen ones in another colour.",
        table=scores.assign(value=values).drop(columns="recorded"),
        on_click=lambda data: address.jump_to_expert(view, [view.layer, view.site, data[0]]),
    )


def _route_table(experts: pd.DataFrame, gates: pd.DataFrame) -> pd.DataFrame:
    """Return one row per layer: its experts with weights, and how sure it was."""
    several = (experts["site"] > 0).any()
    rows = []
    for gate in gates.itertuples():
        here = experts[(experts["layer"] == gate.layer) & (experts["site"] == gate.site)]
        name = f"{gate.layer}.{gate.site}" if several else str(gate.layer)
        chosen = [f"{expert_label(name, e.expert_id)} {e.weight:.3f}" for e in here.itertuples()]
        rows.append(
            {
                "layer": name,
                "experts and weights": ", ".join(chosen),
                "gate entropy (share of ln E)": gate.normalized_entropy,
                "margin": gate.margin,
                "probability of the chosen": gate.topk_mass,
            }
        )
    return pd.DataFrame(rows)


render()
