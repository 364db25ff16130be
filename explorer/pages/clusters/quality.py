"""How far a map and its clusters can be trusted, beside the picture."""

from typing import Any

import streamlit as st

from explorer.maps.cache import Kept
from explorer.maps.features import Source
from explorer.maps.prepare import Prepared
from explorer.maps.quality import FEWEST_MEASURED
from explorer.ui.number import number
from explorer.ui.part import part

METHODS = {"kmeans": "K-Means", "gmm": "Gaussian mixture", "hdbscan": "HDBSCAN"}
SEED = 0  # of layouts, clusters and measures


@part("How good the map is")
def quality_panel(
    source: Source,
    method: str,
    prepared: Prepared,
    laid_out: Kept | None,
    grouped: Kept | None,
    layout: str,
) -> None:
    """Say how far the picture and the clusters can be trusted."""
    st.markdown("**How good is it?**")
    facts = laid_out.facts if laid_out else {}
    names = {"UMAP": "trustworthiness", "PCA": "trustworthiness_pca"}
    st.metric(
        "Trustworthiness",
        _number(facts.get(names[layout])),
        help="How many of a point's 15 neighbours on the picture are neighbours among the vectors "
        "too, and by how much the others are not: 1 = all are, about 0.5 = by chance. Measured on "
        "a sample of 2,000 points.",
        border=True,
    )
    if not prepared.has_umap:
        st.caption("Measured beside a UMAP, and there are too few different points for one.")
    elif laid_out is None:
        st.caption("Measured on the UMAP, which is not there yet.")
    elif facts[names[layout]] is None:
        st.caption(f"Not defined for fewer than {FEWEST_MEASURED} different points.")
    else:
        other = "PCA" if layout == "UMAP" else "UMAP"
        st.caption(f"of this {layout}; of the {other}: {_number(facts.get(names[other]))}")
    found = grouped.facts if grouped else {}
    domains = found.get("domains") or {}
    st.metric(
        "NMI with domains",
        _number(domains.get("nmi")),
        help="Normalised mutual information of clusters and domains: 0 = the clusters say nothing "
        "of the domain, 1 = they are the domains. By chance: domains dealt out anew among the "
        "prompts, mean of 50.",
        border=True,
    )
    if domains and domains.get("nmi") is not None:
        st.caption(
            f"By chance {_number(domains.get('floor'))} "
            f"(95 % below {_number(domains.get('floor_high'))})"
        )
    elif source.unit == "experts":
        st.caption("An expert has no domain of its own.")
    if domains and domains.get("nmi") is None:
        st.caption("Not defined: the mapped points are of fewer than two domains.")
    if grouped is not None:
        st.metric("Clusters", found["n_clusters"], border=True)
        st.caption(_about_clusters(method, prepared, found))
    missing = prepared.n_all - len(prepared.ids)
    st.caption(
        f"{len(prepared.ids):,} of {prepared.n_all:,} {source.unit} have a vector"
        + (f"; {missing:,} have none and are not on the map." if missing else ".")
        + f" Seed {SEED}."
    )


def _about_clusters(method: str, prepared: Prepared, found: dict[str, Any]) -> str:
    text = f"{METHODS[method]} in all {prepared.dims:,} dimensions"
    if found["fitted"] < len(prepared.ids):
        text += f", found from {found['fitted']:,} points"
    if found["noise"]:
        text += f"; {found['noise']:.0%} of the points are in none"
    if not found["converged"]:
        text += "; stopped before it had settled"
    return text + "."


def _number(value: float | None) -> str:
    return number(value, ".2f")
