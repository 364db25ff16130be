"""How each kind of MoE block is recognised and listened to; the first match counts.

An adapter of one's own is put before the others: ``ADAPTERS.insert(0, Mine())``.
"""

from capture.model.adapters.base import Adapter, Channel, Parts, Rows
from capture.model.adapters.jetmoe import SortedTokensAdapter
from capture.model.adapters.llama4 import ScaledInputAdapter
from capture.model.adapters.standard import StandardAdapter
from capture.model.adapters.zaya import SkipExpertAdapter

__all__ = ["ADAPTERS", "Adapter", "Channel", "Parts", "Rows"]

ADAPTERS: list[Adapter] = [
    SkipExpertAdapter(),
    ScaledInputAdapter(),
    SortedTokensAdapter(),
    StandardAdapter(),
]
