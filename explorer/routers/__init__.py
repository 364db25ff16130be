"""Routers: rules that send tokens to experts, or to other parts of a model.

base        the contract, and the registry ``ROUTERS``
layers      fitting every layer, or one router for all layers
scores      what the host model makes of logits
selectors   top-k, threshold, top-p
probe       whether a rule looks into the future or at other sequences
native      the model's own decision, and top-k of its scores
literature  noise, one expert, biases, groups
thresholds  top-p, skipping, ReLU
hashing     the token id alone decides
assignment  rules that look at a batch: expert choice, balanced assignment, Sinkhorn, capacity
baseline    controls
clusters    K-means and Gaussian mixtures of hidden states
clustering  tables of experts per cluster
cluster_gates  a short list, or a linear router, per cluster
neighbours  what similar recorded inputs did
distill     the fit loop of routers that learn by imitation
students    linear and cosine gates, distilled
attention   expert keys, attention among experts
parts       heads and layers chosen by attention
tokens      which tokens run a layer: selectors over the tokens of a sequence
part_controls  chance and constants for heads and layers
static_layers  the same blocks dropped for all tokens, found by trying
gating      gates before layers, heads and experts
recurrent   a state that runs through the layers
lookahead   a layer's experts from what the layer before saw
rl          policy gradient and Q-learning from exploration of one layer at a time
gate_training  how gates learn on the model's own loss
trained_gates  the gates that do
rl_online   REINFORCE and Q-learning over layers, all layers at once
training    routers that learn on the model's own loss, and what they are given
live        a router as ``capture.swap.routers`` takes it (imported on its own)
recorded    what routers need, from a run file (imported on its own)

Importing this package imports torch; ``import explorer`` does not import this package.
"""

from explorer.routers import (
    amod,
    assignment,
    attention,
    baseline,
    cluster_gates,
    clustering,
    gating,
    hashing,
    literature,
    lookahead,
    moh,
    native,
    neighbours,
    part_controls,
    parts,
    recurrent,
    rl,
    rl_online,
    static_layers,
    students,
    thresholds,
    trained_gates,
)
from explorer.routers.base import (
    FAMILIES,
    ROUTERS,
    Decision,
    PartMask,
    PartRouter,
    Router,
    RouterInfo,
    RouterInputs,
    Routing,
    RoutingRouter,
    Site,
)
from explorer.routers.layers import AcrossLayers, fit_layers, route_layers
from explorer.routers.learning.context import TrainedRouter, TrainingCancelled, TrainingSession
from explorer.routers.probe import Verdict, probe
from explorer.routers.selectors import Selector, Threshold, TopK, TopP

__all__ = [
    "FAMILIES",
    "ROUTERS",
    "AcrossLayers",
    "Decision",
    "PartMask",
    "PartRouter",
    "Router",
    "RouterInfo",
    "RouterInputs",
    "Routing",
    "RoutingRouter",
    "Selector",
    "Site",
    "Threshold",
    "TopK",
    "TopP",
    "TrainedRouter",
    "TrainingCancelled",
    "TrainingSession",
    "Verdict",
    "amod",
    "assignment",
    "attention",
    "baseline",
    "cluster_gates",
    "clustering",
    "fit_layers",
    "gating",
    "hashing",
    "literature",
    "lookahead",
    "moh",
    "native",
    "neighbours",
    "part_controls",
    "parts",
    "probe",
    "recurrent",
    "rl",
    "rl_online",
    "route_layers",
    "static_layers",
    "students",
    "thresholds",
    "trained_gates",
]
