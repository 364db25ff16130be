"""A dictionary that explains itself when a name is missing."""

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from capture.errors import quoted
from explorer.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries, in the order they were added.

    Parameters
    ----------
    kind : str
        What an entry is called in messages, such as ``"load metric"``.
    entries
        The first ones, by their names.
    """

    def __init__(self, kind: str, **entries: T) -> None:
        self.kind = kind
        self._entries: dict[str, T] = entries

    def add(self, name: str) -> Callable[[T], T]:
        """Return a decorator that stores its argument as ``name``."""

        def store(entry: T) -> T:
            if name in self._entries:
                raise ValueError(
                    f"A {self.kind} named {quoted(name)} already exists; names are unique."
                )
            self._entries[name] = entry
            return entry

        return store

    def discard(self, name: str) -> None:
        """Forget an entry, if there is one."""
        self._entries.pop(name, None)

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            close = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(self)}."
            raise UnknownNameError(f"No {self.kind} is named {quoted(name)}. {hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
