"""How each kind of MoE block is recognised, listened to and told another choice.

The first adapter that recognises a block counts.

An adapter of one's own is put before the others: ``ADAPTERS.insert(0, Mine())``.
"""

from capture.model.adapters.base import (
    Adapter,
    Channel,
    Choice,
    Decider,
    Parts,
    Replacing,
    Rows,
    Seat,
)
from capture.model.adapters.expert_list import ExpertListAdapter
from capture.model.adapters.jetmoe import SortedTokensAdapter
from capture.model.adapters.llama4 import ScaledInputAdapter
from capture.model.adapters.product_keys import ProductKeyAdapter
from capture.model.adapters.standard import StandardAdapter
from capture.model.adapters.zaya import SkipExpertAdapter

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Channel",
    "Choice",
    "Decider",
    "Parts",
    "Replacing",
    "Rows",
    "Seat",
]

ADAPTERS: list[Adapter] = [
    SkipExpertAdapter(),
    ScaledInputAdapter(),
    SortedTokensAdapter(),
    ProductKeyAdapter(),
    StandardAdapter(),
    ExpertListAdapter(),
]
