"""Listen to a model's attention: queries and keys as its own attention function gets them.

Every attention module asks ``AttentionInterface.get_interface`` for the function that its model
was set to (sdpa, eager, flash, ...) and calls it. While a listener is open, the function handed
out first does exactly what it does otherwise, mask included, and then shows what it was given.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from capture.errors import SiteError
from capture.model.load import transformers_library


class AttentionCall(NamedTuple):
    """One call of a model's attention function.

    Attributes
    ----------
    query : Tensor [B, H, T, D]
    key : Tensor [B, Hkv, S, D]
    value : Tensor [B, Hkv, S, Dv]
    mask : Tensor or None
        As the function got it; what it means depends on the implementation.
    output : Tensor [B, T, H, Dv]
    options : mapping
        The other arguments.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    output: Any
    options: Mapping[str, Any]


Listener = Callable[[AttentionCall], None]

_lock = threading.Lock()
_listeners: "WeakKeyDictionary[nn.Module, Listener]" = WeakKeyDictionary()
_open = 0


@contextmanager
def listen(listeners: Mapping[nn.Module, Listener]) -> Iterator[None]:
    """Call the listener of a module after every call of its attention function.

    Modules without a listener, of this and of other models, compute as ever. What transformers
    hands out is as before once no listener is open.

    Raises
    ------
    SiteError
        If a module is listened to already.
    """
    taken = [module for module in listeners if module in _listeners]
    if taken:
        raise SiteError(
            f"The attention of {type(taken[0]).__name__} is recorded already: one capture of a "
            "model at a time. Wait for the other one."
        )
    with _lock:
        _install()
        _listeners.update(listeners)
    try:
        yield
    finally:
        with _lock:
            for module in listeners:
                _listeners.pop(module, None)
            _remove()


_plain_get_interface: Callable[..., Any] | None = None


def _install() -> None:
    """Put our word in front of what transformers hands out, once for all open listeners."""
    global _open, _plain_get_interface
    if _open == 0:
        interface = transformers_library().modeling_utils.AttentionInterface
        plain = interface.get_interface

        def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _heard(plain(self, *args, **kwargs))

        _plain_get_interface = plain
        interface.get_interface = get_interface
    _open += 1


def _remove() -> None:
    global _open, _plain_get_interface
    _open -= 1
    if _open == 0 and _plain_get_interface is not None:
        interface = transformers_library().modeling_utils.AttentionInterface
        interface.get_interface = _plain_get_interface
        _plain_get_interface = None


def _heard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap one attention function; results and arguments pass unchanged."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = function(module, *args, **kwargs)
        listener = _listeners.get(module)
        if listener is not None:
            names = ("query", "key", "value", "attention_mask")
            given = dict(zip(names, args, strict=False)) | kwargs
            query, key, value, mask = (given.pop(name, None) for name in names)
            if query is not None and key is not None and value is not None:
                listener(AttentionCall(query, key, value, mask, result[0], given))
        return result

    return call
