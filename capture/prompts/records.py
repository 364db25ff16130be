"""Prompts from lists, records and files, checked and numbered."""

import functools
import importlib.resources
import lzma
import zlib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from capture.errors import PromptError
from capture.paths import given_path
from capture.prompts.decompress import unpacked
from capture.quoting import cut, first_line, quoted

DEMO_SETS = {
    "demo": "prompts.jsonl",
    "demo-fit": "fit.jsonl.xz",
    "demo-heldout": "heldout.jsonl.xz",
}
FORMATS = (".txt", ".csv", ".jsonl", ".parquet")
MAX_TOKEN = 2**31 - 1  # what a run file holds; no vocabulary is nearly as large
COMPRESSIONS = (".xz", ".gz")
# what a file of prompts may come to, whatever it takes on disk
MAX_BYTES = 2**30
# bytes of UTF-8 that a run file holds
MAX_PROMPT = 16_000_000
MAX_DOMAIN = 1_000
MAX_SOURCE = 10_000
MAX_DOMAINS = 10_000

PromptSource: TypeAlias = "str | Path | Iterable[str | list[int] | Mapping[str, Any] | Prompt]"


class Prompt(NamedTuple):
    """One prompt: text, or token ids, and where it comes from."""

    text: str | None
    ids: tuple[int, ...] | None
    domain: str | None
    source: str | None  # file and line, what the record says, or "given"


def read_prompts(source: PromptSource) -> list[Prompt]:
    """Read prompts from a known name, a file or a sequence.

    Parameters
    ----------
    source : str, Path or iterable
        ``"demo"``, ``"demo-fit"``, ``"demo-heldout"``; or a .txt, .csv, .jsonl or .parquet file,
        the first three possibly compressed (.xz, .gz), or a folder of them; or an iterable of
        strings, token-id lists and records with ``text`` (or ``ids``) and optionally ``domain``
        and ``source``.

    Raises
    ------
    PromptError
        With the file, line and column, or the number of the prompt, and what was expected.
    """
    if isinstance(source, (str, Path)):
        return _read_named(source)
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise PromptError(
            f"prompts must be a list of strings, token-id lists or records, or a file name; "
            f"got {type(source).__name__}. Put a single prompt into a list."
        )
    if hasattr(source, "columns"):  # iterating over a table gives the names of its columns
        raise PromptError(
            f"prompts must be a list, got a table ({type(source).__name__}). Pass its rows as "
            "records: [{'text': ..., 'domain': ...}, ...]."
        )
    prompts = [
        item if isinstance(item, Prompt) else to_prompt(item, where=f"prompt {number}")
        for number, item in enumerate(source, start=1)
    ]
    return _not_empty(prompts, "the list")


def read_prompts_bytes(name: str, data: bytes, *, most: int = MAX_BYTES) -> list[Prompt]:
    """Read an uploaded file: its name says the format, compressed files are refused.

    Parameters
    ----------
    name : str
    data : bytes
    most : int, bytes
        The texts together may come to so much.

    Raises
    ------
    PromptError
        As :func:`read_prompts`.
    """
    suffix = Path(name).suffix.lower()
    if suffix in COMPRESSIONS:
        raise PromptError(f"{name}: unpack the file first; expected {_listed(FORMATS)}.")
    return _parse(Path(name).name, suffix, data, most)


def to_prompt(item: object, *, where: str, source: str = "given") -> Prompt:
    """Turn a string, a token-id list or a record into a checked prompt."""
    if isinstance(item, str):
        return Prompt(_checked_text(item, where), None, None, source)
    if isinstance(item, Mapping):
        return _from_record(item, where, source)
    if isinstance(item, Iterable) and not isinstance(item, bytes):
        return Prompt(None, _checked_ids(item, where), None, source)
    raise PromptError(
        f"{where}: expected a string, a list of token ids or a record with 'text', "
        f"got {type(item).__name__}."
    )


def _from_record(record: Mapping[str, Any], where: str, source: str) -> Prompt:
    known = {"text", "ids", "domain", "source"}
    text, ids = record.get("text"), record.get("ids")
    if (text is None) == (ids is None):
        found = "both" if text is not None else f"the fields {_fields(record)}"
        raise PromptError(
            f"{where}: expected a record with either 'text' (a string) or 'ids' (token ids), "
            f"found {found}. Known fields are {_listed(sorted(known))}."
        )
    domain = record.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise PromptError(f"{where}: 'domain' must be a string or null, got {quoted(domain)}.")
    named = record.get("source")
    said = source if named is None else str(named)[:MAX_SOURCE]
    if domain is not None:
        domain = (
            _valid_unicode(domain, f"{where}, 'domain'", MAX_DOMAIN) if domain.strip() else None
        )
    if ids is not None:
        return Prompt(None, _checked_ids(ids, where), domain, said)
    return Prompt(_checked_text(text, where), None, domain, said)


def _checked_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise PromptError(f"{where}: 'text' must be a string, got {type(text).__name__}.")
    if not text:
        raise PromptError(f"{where} is empty. Remove it, or write at least one character.")
    return _valid_unicode(text, where, MAX_PROMPT)


def _fields(record: Mapping[str, Any]) -> str:
    return _listed(cut(str(name), 20) for name in islice(record, 5)) or "none"


def _valid_unicode(text: str, where: str, most: int) -> str:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}, character {error.start + 1}: half of a surrogate pair "
            f"({text[error.start]!r}) is not text. Write the whole character."
        ) from None
    if size > most:
        raise PromptError(
            f"{where}: expected up to {most:,} bytes of text, got {size:,}. Divide it, or cut it."
        )
    return text


def _checked_ids(ids: Any, where: str) -> tuple[int, ...]:
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise PromptError(
            f"{where}: token ids must be a list of whole numbers, got {quoted(values)}."
        )
    found = tuple(values)
    if not found:
        raise PromptError(f"{where} is empty. Remove it, or give at least one token id.")
    for position, value in enumerate(found):
        is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if not is_whole or not 0 <= value <= MAX_TOKEN:
            raise PromptError(
                f"{where}, position {position}: a token id is a whole number from 0 to "
                f"{MAX_TOKEN}, got {quoted(value, 40)}."
            )
    return tuple(map(int, found))


def _read_folder(folder: Path) -> list[Prompt]:
    """Read all files of prompts in a folder, in the order of their names."""
    try:
        files = [p for p in sorted(folder.iterdir()) if p.is_file() and _suffixes(p)[0] in FORMATS]
    except OSError as error:
        raise PromptError(f"{folder} cannot be read: {error.strerror}.") from None
    if not files:
        raise PromptError(f"{folder} is a folder without a {_listed(FORMATS)} file.")
    return [prompt for path in files for prompt in _read_named(path)]


def _read_named(source: str | Path) -> list[Prompt]:
    path = given_path(source, "the prompts", PromptError)
    if isinstance(source, str) and source in DEMO_SETS:
        folder = importlib.resources.files("capture.demo")
        path = Path(str(folder)) / DEMO_SETS[source]
        if not path.is_file():
            raise PromptError(
                f"The prompt set {source!r} is not in this copy of the project: {path.name} is "
                "missing from capture/demo. Restore it from version control."
            )
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:  # a whole text is too long for the name of a file
        is_folder = is_file = False
    if is_folder:
        return _read_folder(path)
    if not is_file:
        shown = quoted(str(source))
        raise PromptError(
            f"There is no prompt file {shown}. Expected {_listed(DEMO_SETS)}, or a "
            f"{_listed(FORMATS)} file, or a folder of them; put a prompt of your own into a list: "
            f"[{shown}]."
        )
    ending, compression = _suffixes(path)
    try:
        data = unpacked(path, compression, MAX_BYTES)
    except (lzma.LZMAError, zlib.error, EOFError) as error:
        raise PromptError(f"{path} cannot be unpacked: {first_line(error)}.") from None
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}.") from None
    return _parse(path.name, ending, data, MAX_BYTES)


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the ending that says the format, and that of the compression around it."""
    suffixes = ["", *(suffix.lower() for suffix in path.suffixes)]
    compression = suffixes.pop() if suffixes[-1] in COMPRESSIONS else ""
    return suffixes[-1], compression


def _parse(name: str, suffix: str, data: bytes, most: int) -> list[Prompt]:
    from capture.prompts import files as prompt_files

    readers: dict[str, Callable[[str, bytes], list[Prompt]]] = {
        ".txt": prompt_files.read_txt,
        ".csv": prompt_files.read_csv,
        ".jsonl": prompt_files.read_jsonl,
        ".parquet": functools.partial(prompt_files.read_parquet, most=most),
    }
    if suffix not in readers:
        raise PromptError(
            f"{name}: the ending {cut(suffix, 20) or '(none)'} is not a prompt format. "
            f"Expected {_listed(FORMATS)}."
        )
    if len(data) > most:
        raise too_large(name, len(data), most)
    return _not_empty(readers[suffix](name, data), name)


def too_large(name: str, size: int, most: int) -> PromptError:
    """Make the error for a file whose prompts come to more than can be held."""
    return PromptError(
        f"{name} holds {size / 1e6:,.0f} MB of prompts or more, and up to {most / 1e6:,.0f} MB can "
        "be read. Divide it into several files."
    )


def _not_empty(prompts: list[Prompt], where: str) -> list[Prompt]:
    if not prompts:
        raise PromptError(f"{where} holds no prompt. Expected at least one.")
    domains = {prompt.domain for prompt in prompts}
    if len(domains) > MAX_DOMAINS:
        raise PromptError(
            f"{where} holds prompts of {len(domains):,} domains, and a run has up to "
            f"{MAX_DOMAINS:,}. Group them into fewer."
        )
    return prompts


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
