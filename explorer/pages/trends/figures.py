"""Figures of checkpoints: quantities of every layer over the training."""

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from explorer.pages.load_balance.figures import METRIC_TEXTS
from explorer.registry import Registry
from explorer.ui import theme
from explorer.ui.wording import labels, site_name


class Trend(NamedTuple):
    """A quantity that is followed over checkpoints: its title with unit, and what it means.

    ``add`` and ``form`` are as for ``METRIC_TEXTS``.
    """

    title: str
    meaning: str
    add: float = 0.0
    form: str = ".3f"


TRENDS: Registry[Trend] = Registry(
    "trend",
    saturation=Trend(
        "router saturation (share of the last checkpoint's experts)",
        "Of the experts that the last checkpoint chooses for a token, how many this one chose; "
        "1 = the routing is settled.",
    ),
    max_violation=Trend(*METRIC_TEXTS["max_violation"]),
    normalized_entropy=Trend(*METRIC_TEXTS["normalized_entropy"]),
    domain_information=Trend(
        "information between domain and expert (nats)",
        "How much the expert of a token says about its domain; a random router has some too, "
        "since domains use other words.",
    ),
)


def tokens_of(table: pd.DataFrame, quantity: str) -> dict[str, int]:
    """Return how many tokens each checkpoint's values are of; empty where it is not known.

    Saturation is of the tokens that are shared with the last checkpoint, all else of its own.
    """
    column = "shared" if quantity == "saturation" else "tokens"
    if column not in table:
        return {}
    known = table.drop_duplicates("name")
    return {
        str(name): 0 if pd.isna(n) else int(n)
        for name, n in zip(known["name"], known[column], strict=True)
    }


def trend_lines(
    table: pd.DataFrame,
    quantity: str,
    *,
    caption: str,
    axis: str = "training step of the checkpoint (evenly spaced)",
    dark: bool = False,
) -> go.Figure:
    """Draw a quantity over checkpoints, one line a layer.

    Parameters
    ----------
    table : DataFrame
        From ``explorer.pages.trends.data.trend_table``.
    quantity : str
        A name in ``TRENDS``.
    axis : str
        What the steps are.
    """
    trend = TRENDS[quantity]
    counts = tokens_of(table, quantity)
    several = bool((table["site"] > 0).any())
    order = list(dict.fromkeys(table["name"]))
    places = list(dict.fromkeys(zip(table["layer"], table["site"], strict=True)))
    # early layers dark, late ones bright
    shades = theme.marks(len(places), dark)
    figure = go.Figure()
    for place, color in zip(places, shades, strict=True):
        rows = table[(table["layer"] == place[0]) & (table["site"] == place[1])]
        name = site_name(*place, several=several)
        figure.add_trace(
            theme.line(
                [order.index(one) for one in rows["name"]],
                rows[quantity] + trend.add,
                f"layer {name}",
                form={"color": color},
                symbol=places.index(place) % 8,
                customdata=[f"n = {counts[one]:,}" if counts else "" for one in rows["name"]],
                hover=f"%{{x}}: %{{y:{trend.form}}}<br>%{{customdata}}",
            )
        )
    if quantity == "saturation":
        figure.add_hline(
            float(table["chance"].mean()), line=theme.dotted(dark), annotation_text="by chance"
        )
    known = table.drop_duplicates("name").set_index("name")
    stages = known["stage"].nunique() > 1
    shown = dict(zip(order, labels(order, limit=18), strict=True))
    names = [
        shown[name]
        if pd.isna(known.loc[name, "step"])
        else (f"stage {known.loc[name, 'stage']}: " if stages else "")
        + f"{int(known.loc[name, 'step']):,}"
        for name in order
    ]
    figure.update_xaxes(
        title=axis,
        tickvals=list(range(len(order))),
        ticktext=names,
    )
    # the figure's title has the name; both are too long for the height
    unit = trend.title.partition(" (")[2].rstrip(")")
    percent = ".0%" if trend.form.endswith("%") else None
    figure.update_yaxes(title=unit, rangemode="tozero", tickformat=percent)
    figure.update_layout(legend=theme.LEGEND_RIGHT)
    title = f"{trend.title[:1].upper()}{trend.title[1:]}"
    return theme.finish(figure, title=title, caption=caption, dark=dark, height=440)
