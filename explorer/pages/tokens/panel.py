"""What every layer did with one token: sentences, the score vector, and the route."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import streamlit as st

from explorer.pages.tokens.data import token_experts, token_gates, token_scores
from explorer.pages.tokens.figures import score_bars, token_routes
from explorer.ui import address
from explorer.ui.chart import chart
from explorer.ui.part import part
from explorer.ui.state import View, ask, is_dark
from explorer.ui.theme import PinKey
from explorer.ui.visible import visible
from explorer.ui.wording import certainty_sentence, expert_label, probabilities, routing_sentence


@part("Token")
def token_panel(view: View, token: pd.Series, pins: Sequence[PinKey] = ()) -> None:
    """Draw the panel of one token.

    Parameters
    ----------
    token : Series
        A row of ``queries.tokens.tokens``.
    pins : sequence of (layer, site, expert)
        Shown in their colours.
    """
    token_id = int(token["token_id"])
    text = token["text"]
    shown = "(text not recorded)" if text is None else _name(text)
    st.subheader(f"Token {int(token['position']):,}: “{address.plain(shown)}”", anchor=False)
    experts = view.of_layers(ask(view, token_experts, token_id=token_id))
    gates = view.of_layers(ask(view, token_gates, token_id=token_id))
    here = experts[(experts["layer"] == view.layer) & (experts["site"] == view.site)]
    gate = gates[(gates["layer"] == view.layer) & (gates["site"] == view.site)].iloc[0]
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
    _scores(view, token_id, text, str(gate["score_function"]))
    route = token_routes(experts, token_text=text, pins=pins, dark=is_dark())
    # the panel is narrow
    route.update_layout(title={"text": "Experts by layer (share of combine weight)"})
    chart(
        route,
        key="token routes",
        alt="Bars, one per layer: the experts of the token and their share of its weight.",
        table=_route_table(experts, gates),
        on_click=lambda data: address.write("layer", _site_key(view, data)),
    )


def _name(text: str) -> str:
    return "␣" * len(text) if text and not text.strip(" ") else visible(text).replace("\n", "")


def _beside(token: pd.Series, experts: pd.DataFrame) -> str:
    shared = int(experts["n_shared_experts"].max()) if len(experts) else 0
    parts = " The model wrote this token itself." if token["phase"] == "generated" else ""
    if shared:
        parts += f" Beside them {shared} shared expert{'s' * (shared > 1)} saw it, as every token."
    if not pd.isna(token["loss"]):
        parts += f" Predicting the next token from here cost {token['loss']:.2f} nats of loss."
    return parts


@part("Scores of the experts")
def _scores(view: View, token_id: int, text: str | None, score_function: str) -> None:
    scores = ask(view, token_scores, token_id=token_id, layer=view.layer, site=view.site)
    if not scores["recorded"].any():
        st.info(
            "Every expert's score: not recorded for this token. Capture with `--level scores`, "
            "or with a larger `--sample-tokens`, to see it.",
            icon=":material/info:",
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


def _site_key(view: View, data: list[float]) -> str:
    layer, site = int(data[0]), int(data[1])
    return f"{layer}.{site}" if len(view.run.layers) < len(view.run.sites) else str(layer)
