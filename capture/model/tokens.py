"""Tokens of prompts, and the text of each token, such that the texts join to the prompt."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.errors import PromptError, first_line
from capture.model.token_text import (
    PieceEnds,
    can_decode,
    decode_pieces,
    ends_of,
    has_offsets,
    piece_ends,
)
from capture.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenizedPrompt", "decode_pieces", "has_offsets", "piece_ends", "tokenize"]

ENCODE_CHUNK = 512  # prompts handed to the tokenizer at once: enough for its own threads


class TokenizedPrompt(NamedTuple):
    """The tokens of one prompt as they will be fed to the model.

    Attributes
    ----------
    ids : array [n], int32
    text : str or None
        The whole prompt, cut-off part included; None without a tokenizer.
    ends : array [n], int32, characters, or None
        Where the text of each token ends in ``text``; None when it is not known.
    truncated : int, tokens
        Cut off at the end.
    domain, source : str or None
    spelled : int, tokens
        Special ones that the text spells out, so that they were not added once more.
    """

    ids: npt.NDArray[np.int32]
    text: str | None
    ends: npt.NDArray[np.int32] | None
    truncated: int
    domain: str | None
    source: str | None
    spelled: int = 0

    def pieces(self) -> list[str] | None:
        """Return the text of each token; they join to the prompt, or to the part that was kept."""
        if self.ends is None or self.text is None:
            return None
        ends = self.ends.tolist()
        return [self.text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def tokenize(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    vocab_size: int,
    max_length: int | None,
    chat_template: str | None = None,
    answers: bool = False,
) -> list[TokenizedPrompt]:
    """Turn prompts into tokens; special tokens are added only as the tokenizer does by itself.

    Those that a text spells out at its start or end are not added once more. A conversation gets
    the tokens of ``apply_chat_template``.

    Parameters
    ----------
    prompts : sequence of Prompt
    tokenizer : tokenizer or None
        None suffices for prompts given as token ids; their text is then unknown.
    vocab_size : int
        Rows of the model's embedding; larger ids are refused.
    max_length : int or None, tokens
        Longer prompts are cut at the end.
    chat_template : str, optional
        Jinja, for conversations; by default the tokenizer's own.
    answers : bool
        Whether the model goes on: a conversation that does not end with the assistant then ends
        with the beginning of its answer.

    Raises
    ------
    PromptError
        If a prompt needs a tokenizer or a chat template, gives no token, or holds an id the model
        does not have.
    """
    prompts = [
        prompt
        if prompt.messages is None
        else prompt._replace(text=_rendered(prompt, number, tokenizer, chat_template, answers))
        for number, prompt in enumerate(prompts, start=1)
    ]
    result: list[TokenizedPrompt] = []
    for start in range(0, len(prompts), ENCODE_CHUNK):
        chunk = prompts[start : start + ENCODE_CHUNK]
        encoded = _encode_texts(chunk, start, tokenizer)
        for offset, prompt in enumerate(chunk):
            if prompt.text is not None:
                ids, ends, spelled = encoded[offset]
                text: str | None = prompt.text
            else:
                ids = np.array(prompt.ids, dtype=np.int64)
                text, ends, spelled = None, None, 0
            _check_ids(ids, start + offset + 1, prompt, vocab_size)
            if prompt.text is None and tokenizer is not None and can_decode(tokenizer):
                pieces = decode_pieces(tokenizer, ids.tolist())
                text, ends = "".join(pieces), ends_of(pieces)
            result.append(_cut(ids, text, ends, prompt, max_length)._replace(spelled=spelled))
    return result


def _rendered(
    prompt: Prompt,
    number: int,
    tokenizer: "PreTrainedTokenizerBase | None",
    chat_template: str | None,
    answers: bool,
) -> str:
    """Return the text of a conversation."""
    where = f"Prompt {number} ({prompt.source})"
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if tokenizer is None or template is None:
        missing = "no tokenizer" if tokenizer is None else "a tokenizer without a chat template"
        raise PromptError(
            f"{where} is a conversation, but the model has {missing}. Give one with "
            "--chat-template FILE (in Python chat_template=...), or give texts."
        )
    messages = [dict(message) for message in prompt.messages or ()]
    goes_on = answers and messages[-1]["role"] != "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=goes_on
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise PromptError(
            f"{where}: the chat template cannot write this conversation: {first_line(error)}. "
            "Change its messages, or give another template with --chat-template FILE."
        ) from error
    return str(text)


class _Encoded(NamedTuple):
    """The tokens of one text, as in :class:`TokenizedPrompt`."""

    ids: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int32] | None
    spelled: int


def _encode_texts(
    prompts: Sequence[Prompt], first: int, tokenizer: "PreTrainedTokenizerBase | None"
) -> dict[int, _Encoded]:
    """Return the tokens of the prompts that are text, by their place in ``prompts``."""
    places = [i for i, prompt in enumerate(prompts) if prompt.text is not None]
    if not places:
        return {}
    if tokenizer is None:
        raise PromptError(
            f"Prompt {first + places[0] + 1} is text, but the model has no tokenizer. "
            "Give token ids, or a model folder that holds a tokenizer."
        )
    texts = [prompts[i].text or "" for i in places]
    # a chat template writes every special token itself
    written = [prompts[i].messages is not None for i in places]
    tokens = [] if all(written) else _tokens_of(tokenizer, texts)
    if any(written):
        bare = _tokens_of(tokenizer, texts, add_special_tokens=False)
        tokens = [bare[n] if is_chat else tokens[n] for n, is_chat in enumerate(written)]
    special = tuple(getattr(tokenizer, "all_special_tokens", ()))
    piece_ends = PieceEnds(tokenizer)
    result: dict[int, _Encoded] = {}
    for place, text, found, is_chat in zip(places, texts, tokens, written, strict=True):
        spelled = 0
        if not is_chat and (text.startswith(special) or text.endswith(special)):
            (plain,) = _tokens_of(tokenizer, [text], add_special_tokens=False)
            found, spelled = _without_repeated(found, plain, len(text))
        ends = None
        if found.offsets is not None and found.ids:
            ends = piece_ends.by_offsets(text, found.ids, found.offsets, found.is_added)
        elif found.ids and can_decode(tokenizer):
            ends = piece_ends.by_decoding(text, found.ids)
        result[place] = _Encoded(np.array(found.ids, dtype=np.int64), ends, spelled)
    return result


class _Tokens(NamedTuple):
    """What a tokenizer gave for one text: ids, spans, and whether it added them by itself."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None
    is_added: list[bool]


def _tokens_of(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], **options: Any
) -> list[_Tokens]:
    with_offsets = has_offsets(tokenizer)
    encoded = tokenizer(
        list(texts),
        return_offsets_mapping=with_offsets,
        return_special_tokens_mask=with_offsets,
        return_attention_mask=False,
        verbose=False,
        **options,
    )
    tokens = []
    for row, ids in enumerate(encoded["input_ids"]):
        if not with_offsets:
            tokens.append(_Tokens(list(ids), None, []))
            continue
        offsets = list(encoded["offset_mapping"][row])
        # a special token that the prompt spells out has characters of its own
        masks = zip(encoded["special_tokens_mask"][row], offsets, strict=True)
        is_added = [bool(mask) and start == end for mask, (start, end) in masks]
        tokens.append(_Tokens(list(ids), offsets, is_added))
    return tokens


def _without_repeated(whole: _Tokens, plain: _Tokens, length: int) -> tuple[_Tokens, int]:
    """Leave out special tokens that a text spells out and its tokenizer added once more.

    A text made with a chat template begins with the token that begins a text; models never saw
    it twice.

    Parameters
    ----------
    whole, plain : _Tokens
        With what the tokenizer adds by itself, and without.
    length : int, characters
        Of the text.

    Returns
    -------
    tokens, count
        The tokens, and how many special ones were left out.
    """
    n = len(plain.ids)
    found = []
    for at in range(len(whole.ids) - n + 1 if n else 0):
        if whole.ids[at : at + n] == plain.ids:
            before, after = whole.ids[:at], whole.ids[at + n :]
            again = plain.ids[: len(before)] == before, plain.ids[-len(after) :] == after
            found.append(([] if again[0] else before, [] if again[1] else after))
    if not found:
        return whole, 0
    kept_before, kept_after = min(found, key=lambda kept: len(kept[0]) + len(kept[1]))
    count = len(whole.ids) - len(kept_before) - n - len(kept_after)
    if not count:
        return whole, 0
    offsets = None
    if plain.offsets is not None:
        offsets = [
            *((0, 0) for _ in kept_before),
            *plain.offsets,
            *((length, length) for _ in kept_after),
        ]
    added = [*(True for _ in kept_before), *plain.is_added, *(True for _ in kept_after)]
    return _Tokens([*kept_before, *plain.ids, *kept_after], offsets, added), count


def _check_ids(ids: npt.NDArray[np.int64], number: int, prompt: Prompt, vocab_size: int) -> None:
    where = f"Prompt {number} ({prompt.source})"
    if not len(ids):
        raise PromptError(f"{where} gives no token. Remove it, or write more text.")
    if int(ids.max()) >= vocab_size:
        position = int(np.argmax(ids >= vocab_size))
        raise PromptError(
            f"{where}, position {position}: token id {int(ids[position])} is not in the model's "
            f"vocabulary of {vocab_size}. Use the tokenizer that belongs to the model."
        )


def _cut(
    ids: npt.NDArray[np.int64],
    text: str | None,
    ends: npt.NDArray[np.int32] | None,
    prompt: Prompt,
    max_length: int | None,
) -> TokenizedPrompt:
    kept = len(ids) if max_length is None else min(len(ids), max_length)
    return TokenizedPrompt(
        ids=ids[:kept].astype(np.int32),
        text=text,
        ends=None if ends is None else ends[:kept],
        truncated=len(ids) - kept,
        domain=prompt.domain,
        source=prompt.source,
    )
