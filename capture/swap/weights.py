"""How many weights a model has, how many a token uses, and how many a decode step reads."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from capture.model.flops import MATRIX, Key, expert_elements
from capture.model.inputs import embedding_weight
from capture.model.sites import Site
from capture.swap.inject import n_computing

# Han et al. 2015, arXiv:1506.02626, figure 1 (45 nm, after Horowitz): one 32 bit float addition
# and multiplication, and 32 bit read from DRAM
PICOJOULES_ADD, PICOJOULES_MULTIPLY, PICOJOULES_DRAM = 0.9, 3.7, 640.0
DRAM_BYTES = 4


class Weights(NamedTuple):
    """Elements of the matrices; norms and biases are left out, as in published counts.

    Attributes
    ----------
    total : int
        Input and output embeddings included, once where they are the same.
    active : float
        What one token uses: all but the experts it does not visit.
    """

    total: int
    active: float


def count_weights(model: nn.Module, sites: Sequence[Site]) -> Weights:
    """Count a model's weights; it may live on the meta device, which takes no memory.

    Parameters
    ----------
    model : PreTrainedModel
    sites : sequence of Site
        All sites, from :func:`capture.model.sites.find_sites`.
    """
    total = sum(p.numel() for p in model.parameters() if p.ndim >= MATRIX)
    idle = sum(
        expert_elements(site) * (n_computing(site) - min(site.info.top_k, n_computing(site)))
        for site in sites
    )
    return Weights(total, total - idle)


def distinct_experts(n_experts: int, top_k: float, batch: int) -> float:
    r"""Return how many different experts ``batch`` tokens read, were they routed evenly.

    .. math:: E\,(1 - (1 - k/E)^B)

    Skewed routing reads fewer; ``Swapped.distinct_experts`` has the measured number.
    """
    return n_experts * (1.0 - (1.0 - top_k / n_experts) ** batch)


def bytes_read(
    model: nn.Module, sites: Sequence[Site], distinct: Mapping[Key, float], *, batch: int
) -> float:
    """Return the bytes of weights that one decode step reads for ``batch`` sequences.

    Everything but experts and the input embedding is read once, whatever the batch; activations
    and the cache are left out.

    Parameters
    ----------
    model : PreTrainedModel
    sites : sequence of Site
    distinct : mapping of (layer, site) to float
        Different experts that run in the step.
    batch : int
        Sequences, one token each.
    """
    embedding = embedding_weight(model)
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and getattr(head, "weight", None) is embedding
    size = embedding.element_size()
    once = sum(p.numel() * p.element_size() for p in model.parameters())
    if not tied:
        once -= (embedding.numel() - batch * embedding.shape[1]) * size
    total = float(once)
    for site in sites:
        width = next(p.element_size() for p in site.experts.parameters())
        idle = n_computing(site) - distinct[site.info.layer, site.info.site]
        total -= expert_elements(site) * idle * width
    return total


def energy_proxy(flops: float, n_bytes: float) -> float:
    """Return picojoules for operations and bytes at published costs of 45 nm hardware.

    Only ratios between rules mean anything: no machine of today has these costs.

    Parameters
    ----------
    flops : float
        Half of them additions, half multiplications, 32 bit.
    n_bytes : float
        Read from DRAM.
    """
    operation = (PICOJOULES_ADD + PICOJOULES_MULTIPLY) / 2
    return flops * operation + n_bytes / DRAM_BYTES * PICOJOULES_DRAM
