"""Prompts from lists, records and files (txt, csv, jsonl, parquet), checked; imports no model."""

import csv
import functools
import gzip
import importlib.resources
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capture.errors import PromptError, cut, first_line, quoted
from capture.paths import given_path

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
MAX_PROMPT = 16_000_000  # a million tokens take a quarter
MAX_DOMAIN = 1_000
MAX_SOURCE = 10_000
MAX_DOMAINS = 10_000

PromptSource: TypeAlias = "str | Path | Iterable[str | list[int] | Mapping[str, Any] | Prompt]"
DELIMITERS = (",", ";", "\t", "|")
MAX_FIELD = 2**31 - 1  # csv refuses fields above 128 KiB unless told
_SHOWN = 5  # names of columns in an error
_ROWS, _FEW_ROWS = 1_024, 16  # read at a time
_OBJECT = 100  # bytes that a row takes at least
_CHUNK = 2**20
_DICTIONARY = 2**28  # bytes that unpacking .xz may take for itself


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

    Raises
    ------
    PromptError
        As :func:`read_prompts`, or if the texts together come to more than ``most`` bytes.
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
        data = _unpacked(path, compression, MAX_BYTES)
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
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
    readers: dict[str, Callable[[str, bytes], list[Prompt]]] = {
        ".txt": read_txt,
        ".csv": read_csv,
        ".jsonl": read_jsonl,
        ".parquet": functools.partial(read_parquet, most=most),
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


def read_txt(name: str, data: bytes) -> list[Prompt]:
    """Read one prompt a line, or one a block when the file has blank lines between blocks."""
    text = decode(name, data).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    filled = [bool(line.strip()) for line in lines]
    first = filled.index(True) if any(filled) else 0
    if all(filled[first:]):
        return [
            to_prompt(line, where=f"{name}, line {number}", source=f"{name}:{number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    prompts: list[Prompt] = []
    start: int | None = None
    for number in range(len(lines) + 1):
        inside = number < len(lines) and filled[number]
        if inside and start is None:
            start = number
        elif not inside and start is not None:
            where = f"{name}, line {start + 1}"
            block = "\n".join(lines[start:number])
            prompts.append(to_prompt(block, where=where, source=f"{name}:{start + 1}"))
            start = None
    return prompts


def read_csv(name: str, data: bytes) -> list[Prompt]:
    """Read a table with a header line, a column ``text`` and perhaps ``domain`` and ``source``."""
    text = decode(name, data)
    csv.field_size_limit(MAX_FIELD)
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    prompts: list[Prompt] = []
    header: list[str] | None = None
    end = 0
    try:
        for row in reader:
            line, end = end + 1, reader.line_num
            if not row:
                continue
            if header is None:
                header = _header(name, row)
                continue
            if len(row) != len(header):
                raise PromptError(
                    f"{name}, line {line}: expected {len(header)} columns "
                    f"({_names(header)}), found {len(row)}. Put quotes around text that holds "
                    f"{delimiter!r} or a line break."
                )
            record = dict(zip(header, row, strict=True))
            prompts.append(_table_row(name, f"line {line}", line, record))
    except csv.Error as error:
        raise PromptError(
            f"{name}, line {reader.line_num}: not valid csv ({first_line(error)})."
        ) from None
    return prompts


def read_jsonl(name: str, data: bytes) -> list[Prompt]:
    """Read one JSON value a line: a record, a string or a list of token ids."""
    text = decode(name, data)
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for a number too long
            column = getattr(error, "colno", 1)
            reason = getattr(error, "msg", str(error))
            raise PromptError(
                f"{name}, line {number}, column {column}: not valid JSON ({cut(reason)}). Expected "
                'one value a line, such as {"text": "...", "domain": "..."}.'
            ) from None
        where = f"{name}, line {number}"
        prompts.append(to_prompt(value, where=where, source=f"{name}:{number}"))
    return prompts


def read_parquet(name: str, data: bytes, *, most: int = MAX_BYTES) -> list[Prompt]:
    """Read the columns ``text`` (or ``ids``), ``domain`` and ``source`` of a Parquet table.

    A value that is there often is stored once, so that the table is read in pieces whose values
    stay stored once until their size is known.
    """
    prompts: list[Prompt] = []
    left = most
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        columns = _known_columns(name, file.schema_arrow.names)
        _check_metadata(name, file.metadata, most)
        rows = _FEW_ROWS
        if not _may_repeat(file.metadata):
            strings = [column for column in columns if _is_string(file.schema_arrow, column)]
            file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=strings)
            rows = _ROWS
        for batch in file.iter_batches(rows, columns=columns):
            left -= _expanded_bytes(batch)
            if left < 0:
                raise too_large(name, most - left, most)
            values = [_column(name, batch, column) for column in columns]
            for row in zip(*values, strict=True):
                number = len(prompts) + 1
                record = dict(zip(columns, row, strict=True))
                prompts.append(_table_row(name, f"row {number}", number, record))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{name} is not a readable Parquet file: {first_line(error)}.") from None
    return prompts


def _is_string(schema: Any, column: str) -> bool:
    kind = schema.field(column).type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _check_metadata(name: str, metadata: Any, most: int) -> None:
    """Refuse a table that says itself that it is too large."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(n) for group in groups for n in range(group.num_columns)]
    size = max(
        sum(chunk.total_uncompressed_size for chunk in chunks),
        metadata.num_rows,
        max((chunk.num_values for chunk in chunks), default=0),
    )
    if size > most:
        raise too_large(name, size, most)


def _may_repeat(metadata: Any) -> bool:
    """Return whether a text may be stored as what it adds to the one before it.

    Such a column cannot be read with its values stored once; where the file says that there is
    none, and there is one, the reader refuses it.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return any(
        "DELTA_BYTE_ARRAY" in group.column(n).encodings
        for group in groups
        for n in range(group.num_columns)
    )


def _expanded_bytes(batch: Any) -> int:
    """Return what the values of a batch take when each stands for itself."""
    size = 0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            lengths = pc.binary_length(column.dictionary).cast(pa.int64())
            size += pc.sum(lengths.take(column.indices)).as_py() or 0
        else:
            size += column.nbytes
    return int(size + _OBJECT * batch.num_rows)


def _column(name: str, batch: Any, column: str) -> list[Any]:
    """Return the values of one column, or say of what type they should be."""
    wanted = pa.list_(pa.int64()) if column == "ids" else pa.string()
    values = batch.column(batch.schema.get_field_index(column))
    try:
        found: list[Any] = values.cast(wanted).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise PromptError(
            f"{name}, column {column!r}: expected {wanted}, found {cut(str(values.type))}."
        ) from None
    return found


def decode(name: str, data: bytes) -> str:
    """Decode UTF-8, with or without a byte-order mark, or say where the file stops being text."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise PromptError(
            f"{name}, line {line}, column {column}: byte 0x{data[error.start]:02x} is not UTF-8. "
            "Save the file as UTF-8 text."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PromptError(
            f"{name}, line {line}: a zero byte; the file is not text. Expected UTF-8 text."
        )
    return text


def _table_row(name: str, place: str, number: int, record: Mapping[str, object]) -> Prompt:
    where = f"{name}, {place}"
    given = {key: value for key, value in record.items() if value not in (None, "")}
    if "text" in record and "text" not in given and "ids" not in given:
        raise PromptError(f"{where}, column 'text': empty. Remove the row, or write a prompt.")
    return to_prompt(given, where=where, source=f"{name}:{number}")


def _delimiter(text: str) -> str:
    """Return the delimiter under which the header has a column ``text``."""
    header = next((line for line in re.split(r"[\r\n]", text) if line.strip()), "")
    for delimiter in DELIMITERS:
        row = next(csv.reader([header], delimiter=delimiter), [])
        if "text" in [cell.strip().lower() for cell in row]:
            return delimiter
    return ","


def _header(name: str, row: Sequence[str]) -> list[str]:
    header = [cell.strip().lower() for cell in row]
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise PromptError(f"{name}, line 1: the column {quoted(twice[0])} appears twice.")
    if "text" not in header:
        raise PromptError(
            f"{name}, line 1: expected a header with a column 'text' (and perhaps 'domain'), "
            f"found {_names(row)}. Rename the column or add a header line."
        )
    return ["" if column == "ids" else column for column in header]


def _names(columns: Sequence[str]) -> str:
    more = ", …" if len(columns) > _SHOWN else ""
    return ", ".join(quoted(column, 20) for column in columns[:_SHOWN]) + more


def _known_columns(name: str, columns: Iterable[str]) -> list[str]:
    found = list(columns)
    if "text" not in found and "ids" not in found:
        raise PromptError(
            f"{name}: expected a column 'text' (and perhaps 'domain'), found "
            f"{_names(found) or 'no column'}. Rename the column."
        )
    return [column for column in ("text", "ids", "domain", "source") if column in found]


def _unpacked(path: Path, compression: str, most: int) -> bytes:
    """Return what a file holds, unpacked; a few kilobytes can stand for gigabytes.

    Nothing is unpacked far beyond ``most`` bytes.
    """
    found = bytearray()
    for part in _parts(path, compression):
        found += part
        if len(found) > most:
            raise PromptError(
                f"{path.name} holds more than {most / 1e6:,.0f} MB when it is unpacked, and no "
                "more can be read. Divide it into several files."
            )
    return bytes(found)


def _parts(path: Path, compression: str) -> Iterator[bytes]:
    """Yield a file piece by piece, unpacked."""
    if compression != ".xz":
        with gzip.open(path) if compression else path.open("rb") as file:
            yield from iter(lambda: file.read(_CHUNK), b"")
        return
    # lzma.open has no limit for the dictionary
    with path.open("rb") as file:
        rest = file.read(_CHUNK)
        # one compressed stream may follow another
        while rest:
            stream = lzma.LZMADecompressor(memlimit=_DICTIONARY)
            while not stream.eof:
                yield stream.decompress(rest, _CHUNK)
                rest = b""
                if stream.needs_input and not stream.eof:
                    rest = file.read(_CHUNK)
                    if not rest:
                        raise EOFError("Compressed file ended before the end-of-stream marker")
            # zeros may fill it up
            rest = (stream.unused_data or file.read(_CHUNK)).lstrip(b"\0") or file.read(_CHUNK)
