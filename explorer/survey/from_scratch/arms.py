"""Which router each model is trained with, and whether they come in the order that papers found."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.stats import t as student_t
from sklearn.cluster import KMeans

from capture.swap.rules import RouterInputs, Routing
from explorer.router_cards import RouterInfo
from explorer.routers.assignment import CapacityByPositionRouter, ExpertChoiceRouter
from explorer.routers.contract import RoutingRouter
from explorer.routers.hashing import HashRouter
from explorer.routers.native import TopKRouter
from explorer.routers.thresholds import ReluRouter

Ints = npt.NDArray[np.int64]
Key = Literal["token", "previous", "next", "bigram", "position"]
Gate = Literal["linear", "yuan", "none"]
Table = Literal["balanced", "clusters", "dispersed"]
Quantity = Literal["loss", "max_violation"]

EXPERTS = 8
AUX = 0.01


@dataclass(frozen=True)
class Arm:
    """A model to train, as far as it differs from the others.

    Attributes
    ----------
    name : str
    rule : callable
        Makes the rule that chooses experts, the same in every layer.
    n_experts, top_k : int
    score_function, renormalize
        The model's convention, see :class:`explorer.routers.contract.RouterInputs`.
    gate : {"linear", "yuan", "none"}
        What makes the logits.
    key : {"token", "previous", "next", "bigram", "position"}
        What stands for the token id in rules that look it up.
    table : {"balanced", "clusters", "dispersed"} or None
        A table of experts made from the training text, which replaces ``rule``.
    aux : float
        Weight of the load-balancing loss ``E sum_e f_e P_e``.
    bias_rate : float
        What a step adds to the selection bias of an underloaded expert.
    sparsity : bool
        Whether an L1 loss whose weight adapts holds the number of experts at ``top_k``.
    """

    name: str
    rule: Callable[[], RoutingRouter] = TopKRouter
    n_experts: int = EXPERTS
    top_k: int = 1
    score_function: str = "softmax"
    renormalize: bool = False
    gate: Gate = "linear"
    key: Key = "token"
    table: Table | None = None
    aux: float = 0.0
    bias_rate: float = 0.0
    sparsity: bool = False

    @property
    def causal(self) -> bool:
        """Whether no token's experts depend on later tokens."""
        return self.rule().info.causal and self.key != "next"


class FixedTableRouter(RoutingRouter):
    """Look a token's expert up in a table that is given.

    Parameters
    ----------
    table : Tensor [V], int64
        Expert of each token id.
    """

    info = RouterInfo(
        name="table",
        family="literature",
        title="Table of token ids",
        summary="Each token id has the expert that a table says.",
        formula="e = table[token id];  w = 1",
        paper="2106.04426",
        needs=frozenset({"token_ids"}),
        weighing="own",
    )

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def _route(self, inputs: RouterInputs) -> Routing:
        ids = self.table[inputs.tensor("token_ids")].unsqueeze(-1)
        scores = torch.nn.functional.one_hot(ids[:, 0], inputs.n_experts).float()
        return Routing(scores, ids, torch.ones(ids.shape))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: a table is read."""
        return 0.0


def relu_rule() -> RoutingRouter:
    """Return ReMoE's rule: an expert is on where its logit is positive, and weighs as much."""
    rule = ReluRouter(weights="relu")
    rule.threshold_ = torch.zeros(())  # the model learns what is above it
    return rule


def make_table(kind: Table, stream: Ints, vocabulary: int, seed: int) -> torch.Tensor:
    """Make a table of experts from the token ids of the training text, [V] int64.

    Parameters
    ----------
    kind : {"balanced", "clusters", "dispersed"}
        Equal loads; ids of like surroundings together; or such ids apart.
    stream : array [N], int64
    vocabulary, seed : int
    """
    counts = np.bincount(stream, minlength=vocabulary).astype(np.float64)
    generator = np.random.default_rng(seed)
    if kind == "balanced":
        return torch.from_numpy(_deal(np.zeros(vocabulary, np.int64), counts, generator))
    # ids are alike if the same ids stand beside them: log counts of neighbours, few dimensions
    beside = np.zeros((vocabulary, vocabulary))
    np.add.at(beside, (stream[:-1], stream[1:]), 1.0)
    logs = np.log1p(np.concatenate([beside, beside.T], axis=1))
    logs /= np.linalg.norm(logs, axis=1, keepdims=True).clip(1e-9)
    left, values, _ = np.linalg.svd(logs - logs.mean(0), full_matrices=False)
    means = KMeans(EXPERTS, n_init=1, random_state=seed)
    clusters = means.fit_predict(left[:, :32] * values[:32]).astype(np.int64)
    if kind == "clusters":
        return torch.from_numpy(clusters)
    return torch.from_numpy(_deal(clusters, counts, generator))


def _deal(groups: Ints, counts: npt.NDArray[np.float64], generator: np.random.Generator) -> Ints:
    """Deal the ids of each group to all experts, the frequent ones first, to the least loaded."""
    table = np.zeros(len(groups), np.int64)
    load = np.zeros(EXPERTS)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        dealt = np.zeros(EXPERTS)  # of this group, so that each is spread on its own
        order = members[np.lexsort((generator.random(len(members)), -counts[members]))]
        for token in order:
            expert = int(np.lexsort((load, dealt))[0])
            table[token] = expert
            dealt[expert] += counts[token]
            load[expert] += counts[token]
    return table


def _capacity(factor: float) -> Callable[[], RoutingRouter]:
    return partial(CapacityByPositionRouter, capacity_factor=factor)


_HASH = Arm("hash", partial(HashRouter, k=1), gate="none")
_TOP_1 = Arm("top_1", aux=AUX)
_TOP_2 = Arm("top_2", top_k=2, renormalize=True, aux=AUX)
_SIGMOID = Arm("sigmoid_aux", top_k=2, score_function="sigmoid", aux=1e-3)
_SOFTMAX = replace(_SIGMOID, name="softmax_aux", score_function="softmax")

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        replace(_HASH, name="dense", n_experts=1),
        _TOP_1,
        replace(_TOP_1, name="switch_2.0", rule=_capacity(2.0)),
        replace(_TOP_1, name="switch_1.25", rule=_capacity(1.25)),
        replace(_TOP_1, name="switch_1.0", rule=_capacity(1.0)),
        Arm("remoe", relu_rule, sparsity=True),
        Arm("expert_choice_1", partial(ExpertChoiceRouter, experts_per_token=1)),
        _HASH,
        replace(_HASH, name="hash_balanced", table="balanced"),
        replace(_HASH, name="hash_dispersed", table="dispersed"),
        replace(_HASH, name="hash_clusters", table="clusters"),
        replace(_HASH, name="hash_previous", key="previous"),
        replace(_HASH, name="hash_bigram", key="bigram"),
        replace(_HASH, name="hash_position", key="position"),
        replace(_HASH, name="hash_next", key="next"),
        _TOP_2,
        # the source counts places by tokens, not by assignments: half as many for two experts
        replace(_TOP_2, name="top_2_cap_2.0", rule=_capacity(1.0)),
        replace(_TOP_2, name="top_2_cap_1.25", rule=_capacity(0.625)),
        replace(_TOP_2, name="top_2_cap_1.0", rule=_capacity(0.5)),
        replace(_TOP_2, name="yuan", gate="yuan"),
        Arm("expert_choice_2", partial(ExpertChoiceRouter, experts_per_token=2), top_k=2),
        _SIGMOID,
        replace(_SIGMOID, name="loss_free", aux=0.0, bias_rate=1e-3),
        _SOFTMAX,
        replace(_SOFTMAX, name="softmax_loss_free", aux=0.0, bias_rate=1e-3),
    )
}


class Claim(NamedTuple):
    """That one model is better than another, and where it was published.

    Attributes
    ----------
    source : str
    better, worse : str
        Names in ``ARMS``.
    published : str
        The two numbers, better first.
    quantity : {"loss", "max_violation"}
        In which less is better here.
    """

    source: str
    better: str
    worse: str
    published: str
    quantity: Quantity = "loss"


_SWITCH = "Switch, table 1 (negative log perplexity)"
_BIAS = "loss-free balancing, table 2"
_BIAS_SOFTMAX = "loss-free balancing, table 6"
_REMOE = "ReMoE, table 2 (accuracy %)"
_HASHES = "Hash layers (validation perplexity)"

CLAIMS: tuple[Claim, ...] = (
    Claim(_SWITCH, "top_2_cap_2.0", "switch_2.0", "-1.547, -1.554"),
    Claim(_SWITCH, "switch_1.25", "top_2_cap_1.25", "-1.553, -1.559"),
    Claim(_SWITCH, "switch_1.0", "top_2_cap_1.0", "-1.561, -1.572"),
    Claim(_SWITCH, "top_2_cap_2.0", "top_2_cap_1.0", "-1.547, -1.572"),
    Claim(_SWITCH, "switch_2.0", "switch_1.0", "-1.554, -1.561"),
    Claim(_SWITCH, "switch_1.0", "dense", "-1.561, -1.731"),
    Claim(_BIAS + " (perplexity)", "loss_free", "sigmoid_aux", "9.50, 9.56"),
    Claim(_BIAS + " (MaxVio)", "loss_free", "sigmoid_aux", "0.04, 0.72", "max_violation"),
    Claim(_BIAS_SOFTMAX + " (perplexity)", "softmax_loss_free", "softmax_aux", "9.599, 9.604"),
    Claim(
        _BIAS_SOFTMAX + " (MaxVio)",
        "softmax_loss_free",
        "softmax_aux",
        "0.027, 0.937",
        "max_violation",
    ),
    Claim(_BIAS_SOFTMAX + " (perplexity)", "loss_free", "softmax_loss_free", "9.50, 9.599"),
    Claim(_REMOE, "remoe", "top_1", "40.03, 39.67"),
    Claim(_REMOE, "top_1", "hash", "39.67, 38.79"),
    Claim(_REMOE, "hash", "expert_choice_1", "38.79, 38.53"),
    Claim(_REMOE, "expert_choice_1", "dense", "38.53, 38.20"),
    Claim("Yuan 2.0-M32, table 1 (loss)", "yuan", "top_2", "2.109, 2.117"),
    Claim("Expert choice, table 4 (score)", "expert_choice_2", "hash", "84.0, 81.3"),
    Claim(_HASHES, "hash_next", "hash_balanced", "1.97, 23.16"),
    Claim(_HASHES, "hash_balanced", "hash", "23.16, 23.22"),
    Claim(_HASHES, "hash_dispersed", "hash_clusters", "23.17, 23.90"),
    Claim(_HASHES, "hash", "hash_clusters", "23.22, 23.90"),
    Claim(_HASHES, "hash_clusters", "hash_previous", "23.90, 24.16"),
    Claim(_HASHES, "hash_previous", "hash_bigram", "24.16, 24.19"),
    Claim(_HASHES, "hash_bigram", "hash_position", "24.19, 25.07"),
    Claim(_HASHES + ", test", "hash_balanced", "switch_1.25", "23.23, 23.73"),
)


MET, NOT_MET, UNCLEAR = "met", "not met", "not told apart"
CERTAIN = 0.95  # of Student's t, two-sided: three seeds are few, and need 4.3 standard errors


def judge(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float, str]:
    """Judge a claim that one model has less of something than another.

    Parameters
    ----------
    better, worse : sequence of float
        Of the same seeds in the same order: a seed stands for the same windows and trunk.

    Returns
    -------
    difference : float
        Mean of better minus worse, below 0 as published.
    standard_error : float
        Of that mean, from the spread of the seeds; nan for a single one.
    verdict : str
        "met" or "not met" if the 95% interval of the difference leaves out 0, else "not told
        apart".
    """
    paired = np.asarray(better, np.float64) - np.asarray(worse, np.float64)
    mean = float(paired.mean())
    if len(paired) < 2:
        return mean, float("nan"), UNCLEAR
    error = float(paired.std(ddof=1) / np.sqrt(len(paired)))
    sure = abs(mean) > error * float(student_t.ppf((1 + CERTAIN) / 2, len(paired) - 1))
    return mean, error, UNCLEAR if not sure else MET if mean < 0 else NOT_MET


def arms_table(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row a model: means over seeds, the spread of the loss, and whether it is causal.

    Parameters
    ----------
    results : iterable of dict
        Of :func:`explorer.survey.from_scratch.train.trained`.
    """
    by_arm = pd.DataFrame(list(results)).groupby("arm")
    table = by_arm[["loss", "max_violation", "experts_per_token", "seconds"]].mean()
    table.insert(1, "loss_spread", by_arm["loss"].std())
    table["seeds"] = by_arm.size()
    table["causal"] = [ARMS[name].causal for name in table.index]
    return table.sort_values("loss").reset_index()


def claims_table(results: Iterable[Mapping[str, Any]], claims: Iterable[Claim]) -> pd.DataFrame:
    """Return one row a claim whose two models are both there."""
    table = pd.DataFrame(list(results))
    rows = []
    for claim in claims:
        found = table.pivot_table(index="seed", columns="arm", values=claim.quantity)
        if not {claim.better, claim.worse} <= set(found.columns):
            continue
        both = found[[claim.better, claim.worse]].dropna()
        if both.empty:
            continue
        difference, error, verdict = judge(both[claim.better].tolist(), both[claim.worse].tolist())
        rows.append(
            {
                "published": claim.source,
                "better": claim.better,
                "worse": claim.worse,
                "their numbers": claim.published,
                "in": claim.quantity,
                "difference": difference,
                "standard_error": error,
                "seeds": len(both),
                "verdict": verdict,
            }
        )
    return pd.DataFrame(rows)
