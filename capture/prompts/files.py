"""Readers of the four prompt file formats; each prompt knows its file and line."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capture.errors import PromptError
from capture.prompts.records import MAX_BYTES, Prompt, to_prompt, too_large
from capture.quoting import cut, first_line, quoted

DELIMITERS = (",", ";", "\t", "|")
MAX_FIELD = 2**31 - 1  # csv refuses fields above 128 KiB unless told
_SHOWN = 5  # names of columns in an error
_ROWS, _FEW_ROWS = 1_024, 16  # read at a time
_OBJECT = 100  # bytes that a row takes at least


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
    import pyarrow as pa
    import pyarrow.parquet as pq

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
    import pyarrow as pa

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
    import pyarrow as pa
    import pyarrow.compute as pc

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
    import pyarrow as pa

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
