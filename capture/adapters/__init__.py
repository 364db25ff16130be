"""How each kind of MoE block is recognised and listened to; the standard kind comes last."""

from capture.adapters.base import Adapter, Channel, Parts, Rows
from capture.adapters.standard import StandardAdapter

__all__ = ["ADAPTERS", "Adapter", "Channel", "Parts", "Rows"]

ADAPTERS: tuple[Adapter, ...] = (StandardAdapter(),)
