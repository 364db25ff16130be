"""How each kind of MoE block is recognised and listened to; the first match counts."""

from capture.adapters.base import Adapter, Channel, Parts, Rows
from capture.adapters.jetmoe import SortedTokensAdapter
from capture.adapters.llama4 import ScaledInputAdapter
from capture.adapters.standard import StandardAdapter
from capture.adapters.zaya import SkipExpertAdapter

__all__ = ["ADAPTERS", "Adapter", "Channel", "Parts", "Rows"]

ADAPTERS: tuple[Adapter, ...] = (
    SkipExpertAdapter(),
    ScaledInputAdapter(),
    SortedTokensAdapter(),
    StandardAdapter(),
)
