"""How each kind of MoE block is recognised and listened to; the first match counts."""

from capture.model.adapters.base import Adapter, Channel, Parts, Rows
from capture.model.adapters.jetmoe import SortedTokensAdapter
from capture.model.adapters.llama4 import ScaledInputAdapter
from capture.model.adapters.standard import StandardAdapter
from capture.model.adapters.zaya import SkipExpertAdapter

__all__ = ["ADAPTERS", "Adapter", "Channel", "Parts", "Rows"]

ADAPTERS: tuple[Adapter, ...] = (
    SkipExpertAdapter(),
    ScaledInputAdapter(),
    SortedTokensAdapter(),
    StandardAdapter(),
)
