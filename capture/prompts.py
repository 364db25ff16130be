"""Prompts from lists, records, conversations, tables and files, checked; imports no model."""

import functools
import glob
import importlib.resources
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from capture.errors import PromptError, cut, quoted
from capture.paths import given_path
from capture.prompt_rows import (
    CONVERSATIONS,
    FORMATS,
    IDS,
    MAX_BYTES,
    TABLES,
    PromptFile,
    Row,
    known_encoding,
    names_of,
    read_rows,
    recognised,
    rows_of_table,
    suffixes,
    unpack,
)

DEMO_SETS = {
    "demo": "prompts.jsonl",
    "demo-sample": "sample.jsonl",
    "demo-fit": "fit.jsonl.xz",
    "demo-heldout": "heldout.jsonl.xz",
}
STANDARD_INPUT = "-"
MAX_TOKEN = 2**31 - 1  # what a run file holds; no vocabulary is nearly as large
# bytes of UTF-8 that a run file holds
MAX_PROMPT = 16_000_000  # a million tokens take a quarter
MAX_DOMAIN = 1_000
MAX_SOURCE = 10_000
MAX_DOMAINS = 10_000

PromptSource: TypeAlias = (
    "str | Path | Iterable[str | list[int] | Mapping[str, Any] | Prompt] | Any"
)

# what a record may hold its prompt in, the first of them first
_ALPACA = ("input", "context", "output", "response")
_SHAPES = ("text", *IDS, *CONVERSATIONS, "prompt", "instruction")
_BESIDE = ("attention_mask", "completion", *_ALPACA)
_PLACES = ("domain", "source")
# names under which texts are found where no shape is
_EVIDENT = (
    *("content", "document", "body", "article", "passage", "sentence", "question", "query", "code"),
)
# ShareGPT's names for who speaks
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
# https://github.com/tatsu-lab/stanford_alpaca#data-release
_ALPACA_HEAD = "Below is an instruction that describes a task"
_ALPACA_INPUT = (
    _ALPACA_HEAD + ", paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n"
    "{input}\n\n### Response:\n{output}"
)
_ALPACA_NO_INPUT = (
    _ALPACA_HEAD + ". Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)


class Prompt(NamedTuple):
    """One prompt: text, token ids or a conversation, and where it comes from.

    Attributes
    ----------
    text : str or None
    ids : tuple of int or None
    domain, source : str or None
        The source is a file and line, what the record says, or "given".
    messages : tuple of dict or None
        A conversation, each message with ``role`` and ``content``; the model's chat template makes
        a text of it.
    """

    text: str | None
    ids: tuple[int, ...] | None
    domain: str | None
    source: str | None
    messages: tuple[dict[str, Any], ...] | None = None


class PromptList(list[Prompt]):
    """Prompts, with ``notes``: lines that say what was left out or chosen when they were read."""

    def __init__(self, prompts: Iterable[Prompt] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(prompts)
        self.notes = list(notes)

    def add(self, others: "PromptList") -> None:
        """Append other prompts with their notes."""
        self += others
        self.notes += others.notes


class Columns(NamedTuple):
    """How a file or table is read where it does not say so itself.

    Attributes
    ----------
    text, domain : str or None
        The columns, or fields of a record, that hold them.
    encoding : str or None
        Of text files; None is UTF-8.
    """

    text: str | None = None
    domain: str | None = None
    encoding: str | None = None


def read_prompts(
    source: PromptSource,
    *,
    text_column: str | None = None,
    domain_column: str | None = None,
    encoding: str | None = None,
) -> PromptList:
    """Read prompts from a known name, files, a table or a sequence.

    Parameters
    ----------
    source : str, Path, table or iterable
        ``"demo"``, ``"demo-sample"``, ``"demo-fit"``, ``"demo-heldout"``; or a file of
        ``FORMATS``, possibly compressed (.xz, .gz, .zst), a folder of them, a pattern such as
        ``"data/*.jsonl"``, or ``"-"`` for standard input; or a DataFrame, a ``datasets.Dataset``,
        a pyarrow table, a ``BatchEncoding`` or columns as a dict; or an iterable of strings,
        token-id lists, lists of messages, files (``Path``) and records: with ``text``, ``ids`` or
        ``input_ids``, ``messages`` or ``conversations`` (also ShareGPT's ``from`` and ``value``),
        ``prompt`` and maybe ``completion``, or ``instruction``, ``input`` and ``output`` (Alpaca);
        and optionally ``domain`` and ``source``.
    text_column, domain_column : str, optional
        The field of records, or column of tables, that holds them under another name.
    encoding : str, optional
        Of text files, by default UTF-8.

    Returns
    -------
    PromptList
        Empty rows of files and tables are left out, and counted in its ``notes``.

    Raises
    ------
    PromptError
        With the file, line and column, or the number of the prompt, and what was expected.
    """
    columns = Columns(text_column, domain_column, known_encoding(encoding))
    if isinstance(source, (str, Path)):
        return _read_named(source, columns)
    rows = rows_of_table(source, functools.partial(_choose, columns))
    if rows is not None:
        return _read("the table", rows, columns)
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise PromptError(
            f"prompts must be a list of strings, token-id lists or records, or a file name; "
            f"got {type(source).__name__}. Put a single prompt into a list."
        )
    found = PromptList()
    given = _Reader(columns, "the list", skips=False)
    for number, item in enumerate(source, start=1):
        if isinstance(item, Prompt):
            found.append(item)
        elif isinstance(item, Path):
            found.add(_read_named(item, columns))
        elif (prompt := given.prompt(item, f"prompt {number}", "given")) is not None:
            found.append(prompt)
    found.notes += given.notes()
    return _checked(found, "the list")


def read_prompts_bytes(
    name: str,
    data: bytes,
    *,
    most: int = MAX_BYTES,
    text_column: str | None = None,
    domain_column: str | None = None,
    encoding: str | None = None,
) -> PromptList:
    """Read an uploaded file, whose name says the format and the compression.

    Raises
    ------
    PromptError
        As :func:`read_prompts`, or if the texts together come to more than ``most`` bytes.
    """
    columns = Columns(text_column, domain_column, known_encoding(encoding))
    return _parse(unpack(Path(name).name, io.BytesIO(data), most), columns, most)


class _Reader:
    """Turns the rows of one source into prompts.

    Parameters
    ----------
    columns : Columns
    name : str
        Of the source, for notes.
    skips : bool
        Whether empty rows are left out and counted, or refused.
    """

    def __init__(self, columns: Columns, name: str, *, skips: bool) -> None:
        self._columns = columns
        self._name = name
        self._skips = skips
        self._text = columns.text
        self._skipped = 0

    def notes(self) -> list[str]:
        """Say what was left out and chosen."""
        notes = []
        if self._text != self._columns.text:
            notes.append(f"{self._name}: the prompts are the column {quoted(self._text, 40)}.")
        if self._skipped:
            rows = "1 empty row was" if self._skipped == 1 else f"{self._skipped:,} empty rows were"
            notes.append(f"{self._name}: {rows} left out.")
        return notes

    def prompt(self, item: object, where: str, source: str) -> Prompt | None:
        """Return the prompt of a row, or None where it is empty and empty ones are left out."""
        domain: str | None = None
        value = item
        if isinstance(item, Mapping):
            domain, source = self._place(item, where, source)
            field, value = self._value(item, where)
            where = f"{where}, {field!r}"
            if isinstance(value, bytes):  # as Parquet keeps strings that it is not told of
                value = value.decode("utf-8", "surrogateescape")
        if _is_blank(value):
            if self._skips:
                self._skipped += 1
                return None
            raise PromptError(f"{where} is empty. Remove it, or write at least one character.")
        return _prompt_of(value, where, domain, source)

    def _place(self, record: Mapping[str, Any], where: str, source: str) -> tuple[str | None, str]:
        name = self._columns.domain or "domain"
        if self._columns.domain is not None and name not in record:
            raise _no_column(where, "domain", name, list(map(str, record)))
        domain = record.get(name)
        if isinstance(domain, int) and not isinstance(domain, bool):
            domain = str(domain)
        if _is_blank(domain):
            domain = None
        elif not isinstance(domain, str):
            raise PromptError(f"{where}: {name!r} must be a string or null, got {quoted(domain)}.")
        else:
            domain = (
                _valid_unicode(domain, f"{where}, {name!r}", MAX_DOMAIN) if domain.strip() else None
            )
        named = record.get("source")
        return domain, source if _is_blank(named) else str(named)[:MAX_SOURCE]

    def _value(self, record: Mapping[str, Any], where: str) -> tuple[str, Any]:
        """Return the name of the field that holds the prompt, and the prompt."""
        if self._text is not None:
            if self._text not in record:
                raise _no_column(where, "text", self._text, list(map(str, record)))
            return self._text, record[self._text]
        filled = [name for name in _SHAPES if name in record and not _is_blank(record[name])]
        if "text" in filled and "ids" in filled:
            raise PromptError(
                f"{where}: expected a record with either 'text' (a string) or 'ids' (token ids), "
                "found both. Leave one of them out."
            )
        if filled:
            return filled[0], _shaped(filled[0], record, where)
        shapes = [name for name in _SHAPES if name in record]
        if shapes:
            return shapes[0], None
        if set(record) in ({"role", "content"}, {"from", "value"}):
            raise PromptError(
                f"{where}: this is one message of a conversation, and a conversation is a list of "
                "messages. Put it into a list: [[{'role': ..., 'content': ...}, ...]]."
            )
        strings = [str(n) for n, value in record.items() if value is None or isinstance(value, str)]
        self._text = _evident(where, list(map(str, record)), strings)
        return self._text, record[self._text]


def _shaped(name: str, record: Mapping[str, Any], where: str) -> Any:
    """Return the prompt of a record whose field ``name`` says what it is."""
    value = record[name]
    is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    if name == "text" and not isinstance(value, str | bytes):
        raise PromptError(f"{where}: 'text' must be a string, got {type(value).__name__}.")
    if name in IDS and not is_list:
        raise PromptError(
            f"{where}: {name!r} must be a list of whole numbers, got {quoted(value)}."
        )
    if name in CONVERSATIONS and not (is_list and isinstance(_plain(value)[0], Mapping)):
        raise PromptError(
            f"{where}: {name!r} must be a list of messages such as {{'role': 'user', 'content': "
            f"'...'}}, got {quoted(value, 40)}."
        )
    if name == "input_ids" and record.get("attention_mask") is not None:
        ids, mask = _plain(value), _plain(record["attention_mask"])
        if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
            raise PromptError(
                f"{where}: 'input_ids' and 'attention_mask' must be lists of one length. Leave the "
                "mask out where nothing is padding."
            )
        return [token for token, is_kept in zip(ids, mask, strict=True) if is_kept]
    if name == "prompt" and not _is_blank(record.get("completion")):
        completion = record["completion"]
        if isinstance(value, str) and isinstance(completion, str):
            return value + completion
        if isinstance(value, str) or isinstance(completion, str):
            raise PromptError(
                f"{where}: 'prompt' and 'completion' must both be strings or both be lists of "
                f"messages, got {type(value).__name__} and {type(completion).__name__}."
            )
        return [*_plain(value), *_plain(completion)]
    if name == "instruction":
        given, answer = (
            next((record[n] for n in names if not _is_blank(record.get(n))), "")
            for names in (_ALPACA[:2], _ALPACA[2:])
        )
        for field, text in (("instruction", value), ("input", given), ("output", answer)):
            if not isinstance(text, str):
                raise PromptError(
                    f"{where}, field {field!r}: must be a string, got {type(text).__name__}."
                )
        template = _ALPACA_INPUT if given else _ALPACA_NO_INPUT
        return template.format(instruction=value, input=given, output=answer)
    return value


def _evident(where: str, names: list[str], strings: list[str]) -> str:
    """Return the column that must hold the texts, or ask which."""
    candidates = [name for name in strings if name.lower() not in _PLACES]
    named = [name for name in candidates if name.lower() in _EVIDENT]
    if len(named) == 1 or (not named and len(candidates) == 1):
        return (named or candidates)[0]
    shown = f"the fields {names_of(names)}" if names else "no field"
    example = (named or candidates or ["NAME"])[0]
    raise PromptError(
        f"{where}: expected a column 'text' (and perhaps 'domain'), or a record with 'text', "
        f"'ids', 'messages', 'prompt' or 'instruction'; found {shown}. Choose the column "
        f"of the prompts (--text-column {cut(example, 40)}, in Python text_column=...)."
    )


def _no_column(where: str, what: str, name: str, names: list[str]) -> PromptError:
    return PromptError(
        f"{where}: there is no column {quoted(name, 40)}, which was to hold the {what}; there are "
        f"{names_of(names) or 'none'}. Give one of these as --{what}-column."
    )


def _prompt_of(value: Any, where: str, domain: str | None, source: str) -> Prompt:
    """Check the text, token ids or messages of a prompt."""
    if isinstance(value, str):
        return Prompt(_valid_unicode(value, where, MAX_PROMPT), None, domain, source)
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise PromptError(
            f"{where}: expected a string, a list of token ids, a list of messages or a record with "
            f"'text', got {type(value).__name__}."
        )
    values = _plain(value)
    if isinstance(values[0], Mapping):
        return Prompt(None, None, domain, source, _messages(values, where))
    return Prompt(None, _checked_ids(values, where), domain, source)


def _messages(given: Sequence[Any], where: str) -> tuple[dict[str, Any], ...]:
    """Return a conversation with ``role`` and ``content`` as strings."""
    messages = []
    for number, message in enumerate(given, start=1):
        here = f"{where}, message {number}"
        if not isinstance(message, Mapping):
            raise PromptError(
                f"{here}: expected {{'role': 'user', 'content': '...'}}, got {quoted(message, 40)}."
            )
        known = {str(name): value for name, value in message.items() if value is not None}
        if "role" not in known and "from" in known:
            known["role"], known["content"] = known.pop("from"), known.pop("value", None)
        role, content = known.get("role"), known.get("content")
        if not isinstance(role, str) or not role:
            raise PromptError(
                f"{here}: expected a 'role' such as 'user' or 'assistant' (or ShareGPT's 'from'), "
                f"found the fields {names_of(list(map(str, message))) or 'none'}."
            )
        if isinstance(content, list | tuple):
            content = "".join(_part(part, here) for part in content)
        if content is None and ("tool_calls" in known or "function_call" in known):
            content = ""
        if not isinstance(content, str):
            raise PromptError(
                f"{here}: 'content' must be a string (or ShareGPT's 'value'), got "
                f"{type(content).__name__}. Leave the message out, or write its text."
            )
        _valid_unicode(content, here, MAX_PROMPT)
        messages.append(known | {"role": _ROLES.get(role, role), "content": content})
    try:
        size = len(json.dumps(messages))
    except (TypeError, ValueError):
        raise PromptError(f"{where}: messages must be plain JSON values.") from None
    if size > MAX_PROMPT:
        raise PromptError(f"{where}: expected up to {MAX_PROMPT:,} bytes, got {size:,}. Divide it.")
    return tuple(messages)


def _part(part: Any, where: str) -> str:
    """Return the text of one part of a message."""
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise PromptError(
        f"{where}: a part of type {quoted(kind, 30)} is not text, and text is all that is read. "
        "Leave the part out."
    )


def _plain(value: Any) -> list[Any]:
    """Return what a list, an array or a tensor holds, inner arrays too, as a list."""
    values = value.tolist() if hasattr(value, "tolist") else value
    return [v.tolist() if hasattr(v, "tolist") else v for v in values]


def _is_blank(value: Any) -> bool:
    """Whether a cell is empty: null, nan and the like of a DataFrame, or of no length."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return type(value).__name__ == "NAType" or (hasattr(value, "__len__") and len(value) == 0)


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


def _checked_ids(values: Sequence[Any], where: str) -> tuple[int, ...]:
    for position, value in enumerate(values):
        is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if not is_whole or not 0 <= value <= MAX_TOKEN:
            raise PromptError(
                f"{where}, position {position}: a token id is a whole number from 0 to "
                f"{MAX_TOKEN}, got {quoted(value, 40)}."
            )
    return tuple(map(int, values))


def _choose(
    columns: Columns, where: str, names: Sequence[str], strings: Sequence[str]
) -> Sequence[str]:
    """Return the columns of a table that are read."""
    beside = [name for name in names if name in (*_PLACES, columns.domain)]
    for what, name in (("text", columns.text), ("domain", columns.domain)):
        if name is not None and name not in names:
            raise _no_column(where, what, name, list(names))
    if columns.text is not None:
        return list(dict.fromkeys([columns.text, *beside]))
    if any(name in _SHAPES for name in names):
        return [name for name in names if name in (*_SHAPES, *_BESIDE) or name in beside]
    return list(dict.fromkeys([_evident(where, list(names), list(strings)), *beside]))


def _read_named(source: str | Path, columns: Columns) -> PromptList:
    path = given_path(source, "the prompts", PromptError)
    if source == STANDARD_INPUT:
        return _parse(recognised("standard input", sys.stdin.buffer, MAX_BYTES), columns, MAX_BYTES)
    if isinstance(source, str) and source in DEMO_SETS:
        folder = importlib.resources.files("capture.demo")
        path = Path(str(folder)) / DEMO_SETS[source]
        if not path.is_file():
            raise PromptError(
                f"The prompt set {source!r} is not in this copy of the project: {path.name} is "
                "missing from capture/demo. Restore it from version control."
            )
        columns = Columns()
    try:
        is_folder, is_pipe, exists = path.is_dir(), path.is_fifo(), path.exists()
    except OSError:  # a whole text is too long for the name of a file
        is_folder = is_pipe = exists = False
    if is_folder:
        return _read_files(_files_of(path), columns)
    if not exists and (found := _matches(path)):
        return _read_files(found, columns)
    if not exists:
        shown = quoted(str(source))
        raise PromptError(
            f"There is no prompt file {shown}. Expected {', '.join(DEMO_SETS)}, or a "
            f"{', '.join(FORMATS)} file, or a folder of them; put a prompt of your own into a "
            f"list: [{shown}]."
        )
    try:
        with path.open("rb") as file:
            name = path.name
            opened = recognised(name, file, MAX_BYTES) if is_pipe else unpack(name, file, MAX_BYTES)
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}.") from None
    return _parse(opened, columns, MAX_BYTES)


def _matches(path: Path) -> list[Path]:
    """Return the files that a pattern names, in the order of their names."""
    if not glob.has_magic(str(path)):
        return []
    try:
        return sorted(
            file for name in glob.glob(str(path), recursive=True) if (file := Path(name)).is_file()
        )
    except OSError:
        return []


def _files_of(folder: Path) -> list[Path]:
    """Return the files of prompts in a folder; .json, which may be anything, if it has no other."""
    try:
        files = [p for p in sorted(folder.iterdir()) if suffixes(p.name)[0] in FORMATS]
        files = [p for p in files if p.is_file()]
    except OSError as error:
        raise PromptError(f"{folder} cannot be read: {error.strerror}.") from None
    files = [p for p in files if suffixes(p.name)[0] != ".json"] or files
    if not files:
        raise PromptError(f"{folder} is a folder without a {', '.join(FORMATS)} file.")
    return files


def _read_files(files: Iterable[Path], columns: Columns) -> PromptList:
    found = PromptList()
    for file in files:
        found.add(_read_named(file, columns))
    return _checked(found, "the files")


def _parse(opened: PromptFile, columns: Columns, most: int) -> PromptList:
    is_csv = opened.ending in TABLES
    if is_csv:  # whose header is read in lower case
        text, domain = (name and name.lower() for name in columns[:2])
        columns = columns._replace(text=text, domain=domain)

    def choose(where: str, names: Sequence[str], strings: Sequence[str]) -> Sequence[str]:
        # no list stands in a cell
        given = [name for name in names if not (is_csv and name in (*IDS, *CONVERSATIONS))]
        return _choose(columns, where, given, strings)

    rows = read_rows(opened, most=most, encoding=columns.encoding, choose=choose)
    return _read(opened.name, rows, columns)


def _read(name: str, rows: Iterable[Row], columns: Columns) -> PromptList:
    reader = _Reader(columns, name, skips=True)
    found = PromptList()
    for row in rows:
        prompt = reader.prompt(row.value, f"{name}, {row.place}", f"{name}:{row.number}")
        if prompt is not None:
            found.append(prompt)
    found.notes += reader.notes()
    return _checked(found, name)


def _checked(prompts: PromptList, where: str) -> PromptList:
    if not prompts:
        more = f" ({' '.join(prompts.notes)})" if prompts.notes else ""
        raise PromptError(f"{where} holds no prompt{more}. Expected at least one.")
    domains = {prompt.domain for prompt in prompts}
    if len(domains) > MAX_DOMAINS:
        raise PromptError(
            f"{where} holds prompts of {len(domains):,} domains, and a run has up to "
            f"{MAX_DOMAINS:,}. Group them into fewer."
        )
    return prompts
