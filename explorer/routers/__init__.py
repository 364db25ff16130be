"""Routers: rules that send tokens to experts, or to other parts of a model.

contract    what a router is, the registry ``ROUTERS``, fitting every layer
scores      what the host model makes of logits
selectors   top-k, threshold, top-p
sequences   what a token may know of its sequence
live_rule   a router as ``capture.swap.routers`` takes it (imported on its own)
recorded    what routers need, from a run file (imported on its own)
by_name     routers made by name, with arguments; a user's own file (imported on its own)
subsets     the best subset to drop, by trying

The rules, a file a family:

native      the model's own decision, other k, noise, one expert
deepseek    loss-free bias, groups of experts
thresholds  top-p, skipping, ReLU
hashing     the token id alone decides
assignment  rules that look at a batch: expert choice, balanced assignment, Sinkhorn, capacity
distilled   linear and cosine students of the model's gate, and look-ahead
attention   expert keys, attention among experts
heads_and_layers  heads and layers chosen by attention
clustering  tables of experts, a short list, or a linear router per cluster
clusters    the clusters themselves, and the nearest recorded tokens
gating      gates before layers, heads and experts
recurrent   a state that runs through the layers
rl          policy gradient and Q-learning from exploration of one layer at a time
rl_online   REINFORCE and Q-learning over layers, all layers at once
controls    chance and constants
learning    how routers learn: by imitation, or on the model's own loss; and gates that do

Importing this package imports torch; ``import explorer`` does not import this package.
"""

from capture.store.records import Place
from capture.swap.rules import Decision, PartMask, RouterInputs, Routing
from explorer.router_cards import FAMILIES, RouterInfo
from explorer.routers import (
    assignment,
    attention,
    clustering,
    clusters,
    controls,
    deepseek,
    distilled,
    gating,
    hashing,
    heads_and_layers,
    native,
    recurrent,
    rl,
    rl_online,
    thresholds,
)
from explorer.routers.contract import (
    ROUTERS,
    AcrossLayers,
    PartRouter,
    Router,
    RoutingRouter,
    fit_layers,
    route_layers,
)
from explorer.routers.learning import gates
from explorer.routers.learning.training import TrainedRouter, TrainingCancelled, TrainingSession
from explorer.routers.selectors import Selector, Threshold, TopK, TopP

__all__ = [
    "FAMILIES",
    "ROUTERS",
    "AcrossLayers",
    "Decision",
    "PartMask",
    "PartRouter",
    "Place",
    "Router",
    "RouterInfo",
    "RouterInputs",
    "Routing",
    "RoutingRouter",
    "Selector",
    "Threshold",
    "TopK",
    "TopP",
    "TrainedRouter",
    "TrainingCancelled",
    "TrainingSession",
    "assignment",
    "attention",
    "clustering",
    "clusters",
    "controls",
    "deepseek",
    "distilled",
    "fit_layers",
    "gates",
    "gating",
    "hashing",
    "heads_and_layers",
    "native",
    "recurrent",
    "rl",
    "rl_online",
    "route_layers",
    "thresholds",
]
