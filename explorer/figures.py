"""The main figures of the app as calls that return a Plotly figure, for notebooks and papers.

``explorer.figures.load_heatmap(run)`` draws what the page Overview shows. All take the filters
``domain`` and ``phase`` (None = all), and ``dark``. Nothing here imports Streamlit.
"""

from itertools import pairwise

import plotly.graph_objects as go

from explorer.errors import RunError
from explorer.metrics.coactivation import pair_uplift, transition_uplift
from explorer.pages.flow import data as flow_data
from explorer.pages.flow import figures as flow_figures
from explorer.pages.load_balance import figures as load_figures
from explorer.pages.tokens import data as token_data
from explorer.pages.tokens import figures as token_figures
from explorer.queries.load import balance_table, expert_load
from explorer.queries.overview import token_count
from explorer.run import Run
from explorer.ui.wording import Scope, site_name

__all__ = [
    "coactivation",
    "flow",
    "load_bars",
    "load_heatmap",
    "load_over_layers",
    "lorenz",
    "token_heatmap",
    "transitions",
]


def load_heatmap(
    run: Run,
    *,
    domain: str | None = None,
    phase: str | None = None,
    order: str = "expert",
    dark: bool = False,
) -> go.Figure:
    """Draw the load of every expert of every layer against a fair share.

    Parameters
    ----------
    order : {"expert", "load"}
        Experts by id, or each layer's from the busiest to the idlest.
    """
    load = expert_load(run, domain=domain, phase=phase, weights=False)
    scope = _scope(run, domain, phase)
    return load_figures.load_heatmap(load, scope=scope, order=order, dark=dark)


def load_bars(
    run: Run,
    layer: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw the shares of one router's experts, the busiest first."""
    name = _name(run, layer, site)
    load = expert_load(run, layer=layer, site=site, domain=domain, phase=phase)
    return load_figures.load_bars(load, scope=_scope(run, domain, phase), layer=name, dark=dark)


def lorenz(
    run: Run,
    layer: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw how much work the least loaded experts of one router do together."""
    name = _name(run, layer, site)
    load = expert_load(run, layer=layer, site=site, domain=domain, phase=phase)
    return load_figures.lorenz(load, scope=_scope(run, domain, phase), layer=name, dark=dark)


def load_over_layers(
    run: Run,
    metric: str = "normalized_entropy",
    *,
    domain: str | None = None,
    phase: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw a measure of balance over the layers, with what uniform routing gives by chance.

    Parameters
    ----------
    metric : str
        ``max_violation``, ``coefficient_of_variation``, ``gini``, ``normalized_entropy`` (of the
        load, the default) or ``dead_experts``.
    """
    load = expert_load(run, domain=domain, phase=phase, weights=False)
    scope = _scope(run, domain, phase)
    table = balance_table(load, n_tokens=scope.n_tokens)
    return load_figures.balance_over_layers(table, metric, scope=scope, dark=dark)


def coactivation(
    run: Run,
    layer: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw how often two experts of one router serve the same token, against chance.

    Raises
    ------
    RunError
        If the router chooses one expert per token.
    """
    name = _name(run, layer, site)
    if run.site_info(layer, site).top_k < 2:
        raise RunError(
            f"Layer {name} chooses one expert per token, so that no two serve the same one. "
            "Draw flow or transitions instead."
        )
    counts = flow_data.coactivation(run, layer, site=site, domain=domain, phase=phase)
    pairs = flow_figures.Pairs(counts.tokens, pair_uplift(counts.tokens), name, name)
    scope = _scope(run, domain, phase)._replace(n_tokens=counts.n_tokens)
    return flow_figures.pair_heatmap(pairs, scope=scope, dark=dark)


def transitions(
    run: Run,
    layer: int,
    *,
    domain: str | None = None,
    phase: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw where the tokens of each expert of a layer go in the next one, against chance."""
    ((pairs, n_tokens),) = _hops(run, layer, 1, domain, phase)
    scope = _scope(run, domain, phase)._replace(n_tokens=n_tokens)
    return flow_figures.pair_heatmap(pairs, scope=scope, dark=dark)


def flow(
    run: Run,
    layer: int | None = None,
    *,
    steps: int = 3,
    n_flows: int = 12,
    domain: str | None = None,
    phase: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw the largest flows of tokens from layer to layer.

    Parameters
    ----------
    layer : int, optional
        Where they start; by default the first layer with a router.
    steps : int
        Layers to follow; fewer where the run ends.
    n_flows : int
        Drawn one by one in each step.
    """
    found = _hops(run, run.layers[0] if layer is None else layer, steps, domain, phase)
    scope = _scope(run, domain, phase)._replace(n_tokens=found[0][1])
    hops = [pairs for pairs, _ in found]
    return flow_figures.sankey(hops, n_flows=n_flows, scope=scope, dark=dark)


def token_heatmap(
    run: Run, prompt_id: int = 0, quantity: str = "entropy", *, dark: bool = False
) -> go.Figure:
    """Draw a quantity of every token of a prompt at every layer.

    Parameters
    ----------
    quantity : {"entropy", "expert", "margin", "top1_weight"}
        ``entropy`` is the gate entropy, ``expert`` the heaviest expert of the token.

    Raises
    ------
    RunError
        If the run has no such prompt.
    """
    listed = token_data.tokens(run, prompt_id)
    if listed.empty:
        raise RunError(
            f"{run.path.name} has no tokens of prompt {prompt_id}. Choose a prompt_id of its view "
            "prompts."
        )
    values = token_data.token_quantity(run, prompt_id, quantity)
    domain = run.query("SELECT domain FROM prompts WHERE prompt_id = $n", {"n": prompt_id})
    sizes = {(info.layer, info.site): info.n_experts for info in run.sites}
    return token_figures.token_layer_heatmap(
        values,
        token_data.QUANTITIES[quantity],
        scope=Scope(len(listed), domain["domain"].iloc[0], None, bool(run.info["complete"])),
        groups=token_figures.expert_groups(values, sizes) if quantity == "expert" else None,
        dark=dark,
    )


def _scope(run: Run, domain: str | None, phase: str | None) -> Scope:
    n_tokens = token_count(run, domain=domain, phase=phase)
    return Scope(n_tokens, domain, phase, bool(run.info["complete"]))


def _name(run: Run, layer: int, site: int) -> str:
    run.site_info(layer, site)
    return site_name(layer, site, several=len(run.layers) < len(run.sites))


def _hops(
    run: Run, layer: int, steps: int, domain: str | None, phase: str | None
) -> list[tuple[flow_figures.Pairs, int]]:
    """Return what goes from a layer to the next ones, and the tokens that each is counted from."""
    if layer not in run.layers:
        run.site_info(layer)  # refuses, and names the layers there are
    after = [site for site in flow_data.last_sites(run) if site.layer >= layer]
    if len(after) < 2:
        raise RunError(
            f"No router follows layer {layer} of {run.path.name}. Choose an earlier layer."
        )
    found = []
    for here, there in list(pairwise(after))[:steps]:
        counts = flow_data.transitions(run, here.layer, domain=domain, phase=phase)
        names = (_name(run, here.layer, here.site), _name(run, there.layer, there.site))
        uplift = transition_uplift(counts.tokens)
        found.append((flow_figures.Pairs(counts.tokens, uplift, *names), counts.n_tokens))
    return found
