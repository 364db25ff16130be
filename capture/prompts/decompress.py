"""Files that may be compressed, read up to a size: a few kilobytes can stand for gigabytes."""

import lzma
import zlib
from pathlib import Path

from capture.errors import PromptError

_CHUNK = 2**20
_GZIP = 16 + zlib.MAX_WBITS  # with the header of gzip
_DICTIONARY = 2**28  # bytes that unpacking .xz may take for itself


def unpacked(path: Path, compression: str, most: int) -> bytes:
    """Return what a file holds, unpacked if ``compression`` is ``.gz`` or ``.xz``.

    Nothing is unpacked beyond ``most`` bytes.

    Raises
    ------
    PromptError
        If there is more.
    OSError, EOFError, lzma.LZMAError, zlib.error
        If it cannot be read, ends too early or is damaged.
    """
    found = bytearray()
    with path.open("rb") as file:
        if not compression:
            found += file.read(most + 1)
            _refuse_beyond(path, found, most)
            return bytes(found)
        rest = file.read(_CHUNK)
        # one compressed stream may follow another
        while rest:
            stream = _Stream(compression)
            while not stream.eof:
                found += stream.unpack(rest, most + 1 - len(found))
                _refuse_beyond(path, found, most)
                rest = b""
                if not stream.eof and stream.needs_input:
                    rest = file.read(_CHUNK)
                    if not rest:
                        raise EOFError("it ends in the middle")
            # zeros may fill it up
            rest = (stream.unused or file.read(_CHUNK)).lstrip(b"\0") or file.read(_CHUNK)
    return bytes(found)


class _Stream:
    """One compressed stream, with the same methods for both formats."""

    def __init__(self, compression: str) -> None:
        self._lzma = lzma.LZMADecompressor(memlimit=_DICTIONARY) if compression == ".xz" else None
        self._zlib = zlib.decompressobj(_GZIP)

    @property
    def eof(self) -> bool:
        return self._zlib.eof if self._lzma is None else self._lzma.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail if self._lzma is None else self._lzma.needs_input

    @property
    def unused(self) -> bytes:
        return self._zlib.unused_data if self._lzma is None else self._lzma.unused_data

    def unpack(self, data: bytes, most: int) -> bytes:
        """Return up to ``most`` bytes of what comes next."""
        if self._lzma is None:
            return self._zlib.decompress(self._zlib.unconsumed_tail + data, most)
        return self._lzma.decompress(data, most)


def _refuse_beyond(path: Path, found: bytearray, most: int) -> None:
    if len(found) > most:
        raise PromptError(
            f"{path.name} holds more than {most / 1e6:,.0f} MB when it is unpacked, and no more "
            "can be read. Divide it into several files."
        )
