"""Stand around the calls of a model, its ``generate`` and its caches, and change none of them."""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Inner = Callable[..., Any]
Around = Callable[[nn.Module, Inner, tuple[Any, ...], dict[str, Any]], Any]
# what a cache can do to its rows and columns besides growing
CHANGES = (
    "reorder_cache", "crop", "batch_select_indices", "batch_repeat_interleave", "reset",
)  # fmt: skip
Changed = Callable[[object, str, tuple[Any, ...]], None]


def not_compiled() -> None:
    """Tell compilers to leave what stands around a module alone, and to go on inside of it."""
    if not _left_alone:
        torch._dynamo.trace_rules.add(__package__)
        _left_alone.append(__package__)


_left_alone: list[str] = []
_lock = threading.RLock()
_watchers: list[Changed] = []
_patched: dict[type, dict[str, Any]] = {}


@contextmanager
def calls_of(module: nn.Module, around: Around) -> Iterator[None]:
    """Let every call of a module go through ``around``, compiled or not.

    A compiler skips what stands around the module and compiles the module's own code, as it does
    with hooks. Compiled in place meanwhile (``module.compile()``), it is called so from then on.
    """
    before = vars(module).get("_compiled_call_impl")
    compile_before = vars(module).get("compile")
    inside: list[Inner] = [before or module._call_impl]

    def call(*args: Any, **kwargs: Any) -> Any:
        return around(module, inside[0], args, kwargs)

    def compile_inside(*args: Any, **kwargs: Any) -> None:
        inside[0] = torch.compile(module._call_impl, *args, **kwargs)

    vars(module)["_compiled_call_impl"] = call
    vars(module)["compile"] = compile_inside
    try:
        yield
    finally:
        _restore(module, "compile", compile_before)
        compiled = inside[0] if inside[0] != module._call_impl else None
        _restore(module, "_compiled_call_impl", compiled)


@contextmanager
def method_of(module: nn.Module, name: str, around: Around) -> Iterator[None]:
    """Let every call of a method go through ``around``."""
    inner = getattr(module, name, None)
    if not callable(inner):
        yield
        return
    before = vars(module).get(name)

    @functools.wraps(inner)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(module, inner, args, kwargs)

    vars(module)[name] = method
    try:
        yield
    finally:
        _restore(module, name, before)


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = before


@contextmanager
def watched_caches(changed: Changed) -> Iterator[None]:
    """Tell of changes of caches, after they happened; only of classes given to :func:`watch`.

    Classes are changed, not caches: a cache that is copied stays a cache like any other.
    """
    with _lock:
        _watchers.append(changed)
    try:
        yield
    finally:
        with _lock:
            _watchers.remove(changed)
            if not _watchers:
                for kind, methods in _patched.items():
                    for name, method in methods.items():
                        setattr(kind, name, method)
                _patched.clear()


def watch(cache: object) -> None:
    """Have the class of a cache tell of changes."""
    with _lock:
        for name in CHANGES:
            owner = next((kind for kind in type(cache).__mro__ if name in vars(kind)), None)
            if owner is None or name in _patched.get(owner, {}):
                continue
            method = vars(owner)[name]
            _patched.setdefault(owner, {})[name] = method
            setattr(owner, name, _telling(name, method))


def _telling(name: str, method: Any) -> Any:
    @functools.wraps(method)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        for changed in tuple(_watchers):
            changed(self, name, (*args, *kwargs.values()))
        return result

    return told


class Known:
    """What is known of one cache.

    Attributes
    ----------
    key : int
    columns : int
        Read so far, padding included.
    last : object
        What the last call put out at its last column, where it was kept.
    """

    def __init__(self, key: int, columns: int) -> None:
        self.key = key
        self.columns = columns
        self.last: Any = None


class Caches:
    """Caches that were seen, by identity, for as long as they live.

    Attributes
    ----------
    gone : list of int
        Keys of caches that were thrown away since they were last asked for.
    """

    def __init__(self) -> None:
        self.gone: list[int] = []
        self._known: dict[int, tuple[weakref.ref[Any], Known]] = {}
        self._count = 0

    def find(self, cache: object) -> Known | None:
        """Return what is known of a cache; None where it was not seen before."""
        reference, known = self._known.get(id(cache), (None, None))
        return known if reference is not None and reference() is cache else None

    def add(self, cache: object, columns: int) -> Known:
        """Know a new cache."""
        known = Known(self._count, columns)
        self._count += 1
        place, gone, all_known = id(cache), self.gone, self._known

        def forget(dead: object) -> None:
            gone.append(known.key)
            if all_known.get(place, (None,))[0] is dead:  # a new one may lie in its place
                del all_known[place]

        self._known[place] = (weakref.ref(cache, forget), known)
        watch(cache)
        return known

    def new_key(self, known: Known) -> int:
        """Let what is read into an emptied cache from now on be new texts; return the old key."""
        old = known.key
        self._count += 1
        known.key, known.columns = self._count - 1, 0
        return old


def modules_called(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model and its parts that are given token ids: any of them may be what is called."""
    seen: list[nn.Module] = []
    for name in ("", "base_model", "get_decoder"):
        found = getattr(model, name, None) if name else model
        if name == "get_decoder" and callable(found):
            found = found()
        if isinstance(found, nn.Module) and all(found is not one for one in seen):
            seen.append(found)
            yield found
