"""Routers made by name, with arguments where they differ from the defaults; users' own files."""

import hashlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import CodeType
from typing import Any

from capture.errors import cut, first_line, quoted
from explorer.errors import RouterError
from explorer.router_cards import RouterSpec, SelectorCall
from explorer.routers import ROUTERS, Router, Threshold, TopK, TopP


def make_router(spec: RouterSpec, *, seed: int | None = None) -> Router:
    """Make a router.

    Parameters
    ----------
    spec : RouterSpec
    seed : int, optional
        For routers that take one and were not given one.

    Raises
    ------
    UnknownNameError
        If no router has the name.
    RouterError
        If it takes no such argument, or not with this value.
    """
    selectors = {"TopK": TopK, "Threshold": Threshold, "TopP": TopP}
    factory = ROUTERS[spec.name]
    known = arguments_of(factory)
    options = dict(spec.options)
    if seed is not None and "seed" in known:
        options.setdefault("seed", seed)
    for name in options:
        if name not in known:
            raise RouterError(
                f"Router {quoted(spec.name)} takes no argument {quoted(name)}. "
                f"It takes: {', '.join(known) or 'none'}."
            )
    try:
        made = {
            name: selectors[value.name](**value.options)
            if isinstance(value, SelectorCall)
            else value
            for name, value in options.items()
        }
        return factory(**made)
    except TypeError as error:
        raise RouterError(f"{cut(spec.label)} cannot be made: {first_line(error)}.") from None


def takes_seed(spec: RouterSpec) -> bool:
    """Whether a router is stochastic, so that it is worth running with several seeds."""
    return "seed" in arguments_of(ROUTERS[spec.name]) and "seed" not in spec.options


def arguments_of(factory: Any) -> dict[str, Any]:
    """Return the arguments of a router's constructor with their defaults.

    Those that it hands on to the class below, as ``**options``, are among them.
    """
    found: dict[str, Any] = {}
    for owner in getattr(factory, "__mro__", (factory,)):
        if owner is object or (isinstance(owner, type) and "__init__" not in vars(owner)):
            continue
        parameters = inspect.signature(owner).parameters.values()
        for one in parameters:
            if one.kind is not inspect.Parameter.VAR_KEYWORD:
                found.setdefault(one.name, one.default)
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters):
            break
    return found


_loaded: dict[Path, tuple[str, list[str]]] = {}


class _AsItIsNow(importlib.machinery.SourceFileLoader):
    """Compiles a file each time: Python's cache takes one of the same size and second for it."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_router_file(path: str | Path) -> list[str]:
    """Run a Python file that adds routers to ``ROUTERS``, and return their names.

    Only for files that you trust: the code runs. A file that changed is run again, and its
    routers replace those of before.

    Raises
    ------
    RouterError
        If there is no such file, it fails, or it adds no router.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise RouterError(f"Expected a Python file with routers at {path}, there is none.")
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    before = _loaded.get(path)
    if before is not None and before[0] == content:
        return before[1]
    for old in before[1] if before else ():
        ROUTERS.discard(old)
    known = set(ROUTERS)
    # a name that shadows no other module, so that its classes can be pickled
    name = f"router_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if path.suffix != ".py":
        raise RouterError(f"Expected a file that ends in .py, got {path.name}.")
    loader = _AsItIsNow(name, str(path))
    found = importlib.util.spec_from_loader(name, loader)
    assert found is not None, "a loader was given"
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        loader.exec_module(module)
    except Exception as error:
        for added_before in set(ROUTERS) - known:
            ROUTERS.discard(added_before)
        raise RouterError(f"{path.name} failed: {type(error).__name__}: {error}") from error
    added = [one for one in ROUTERS if one not in known]
    if not added:
        raise RouterError(
            f"{path.name} adds no router. Put @ROUTERS.add('my_router') above its class, with "
            "`from explorer.routers import ROUTERS`."
        )
    _loaded[path] = content, added
    return added


def content_of(names: Iterable[str]) -> str:
    """Return a short name for the code of routers from users' own files among ``names``."""
    wanted = set(names)
    parts = [content for content, added in _loaded.values() if wanted & set(added)]
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:16] if parts else ""
