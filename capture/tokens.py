"""Tokens of prompts, and the text of each token, such that the texts join to the prompt."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.errors import PromptError
from capture.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODE_CHUNK = 512  # prompts handed to the tokenizer at once: enough for its own threads
# a character has at most four bytes: if none was completed for so many tokens, none will be
MAX_OPEN_TOKENS = 4
MAX_CHAIN = 64  # tokens that each end a character and begin another
CONTEXT_TOKENS = 8  # a decoder may add or drop a space at the start of what it is given
REPLACEMENT = "\ufffd"


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
    """

    ids: npt.NDArray[np.int32]
    text: str | None
    ends: npt.NDArray[np.int32] | None
    truncated: int
    domain: str | None
    source: str | None

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
) -> list[TokenizedPrompt]:
    """Turn prompts into tokens; special tokens are added only as the tokenizer does by itself.

    Parameters
    ----------
    prompts : sequence of Prompt
    tokenizer : tokenizer or None
        None suffices for prompts given as token ids; their text is then unknown.
    vocab_size : int
        Rows of the model's embedding; larger ids are refused.
    max_length : int or None, tokens
        Longer prompts are cut at the end.

    Raises
    ------
    PromptError
        If a prompt needs a tokenizer, gives no token, or holds an id the model does not have.
    """
    result: list[TokenizedPrompt] = []
    for start in range(0, len(prompts), ENCODE_CHUNK):
        chunk = prompts[start : start + ENCODE_CHUNK]
        encoded = _encode_texts(chunk, start, tokenizer)
        for offset, prompt in enumerate(chunk):
            if prompt.text is not None:
                ids, ends = encoded[offset]
                text: str | None = prompt.text
            else:
                ids = np.array(prompt.ids, dtype=np.int64)
                text, ends = None, None
            _check_ids(ids, start + offset + 1, prompt, vocab_size)
            if prompt.text is None and tokenizer is not None and has_offsets(tokenizer):
                pieces = decode_pieces(tokenizer, ids.tolist())
                text, ends = "".join(pieces), ends_of(pieces)
            result.append(_cut(ids, text, ends, prompt, max_length))
    return result


def has_offsets(tokenizer: "PreTrainedTokenizerBase | None") -> bool:
    """Whether the tokenizer can say which characters each token stands for."""
    return tokenizer is not None and bool(tokenizer.is_fast)


def piece_ends(
    offsets: Sequence[tuple[int, int]], length: int, is_special: Sequence[bool]
) -> npt.NDArray[np.int32]:
    """Return where each token's text ends, such that the texts join to the prompt.

    A character that several tokens share belongs to the first of them. Characters that no token
    claims (a stripped space) go to the next token, at the end to the last.

    Parameters
    ----------
    offsets : sequence [n] of (start, end), characters
    length : int, characters
    is_special : sequence [n] of bool
        True for tokens the tokenizer added by itself; they have no text.
    """
    ends = np.zeros(len(offsets), dtype=np.int32)
    cursor, last = 0, None
    for i, (_, end) in enumerate(offsets):
        if not is_special[i]:
            cursor = max(cursor, min(end, length))
            last = i
        ends[i] = cursor
    # without any token of its own the text has nowhere to go but the last special token
    ends[(len(offsets) - 1 if last is None else last) :] = length
    return ends


def ends_of(pieces: Sequence[str]) -> npt.NDArray[np.int32]:
    """Return where each piece ends in their join."""
    return np.cumsum([len(piece) for piece in pieces], dtype=np.int32)


def decode_pieces(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], context: Sequence[int] = ()
) -> list[str]:
    """Return the text of each token id, decoded in the light of the tokens before it.

    A character spread over several tokens is the text of the first of them; special tokens have
    ``''``. Incomplete characters read as U+FFFD, as the tokenizer decodes them.

    Parameters
    ----------
    tokenizer : tokenizer
    ids : sequence of int
    context : sequence of int
        Tokens that come before; they get no text.
    """
    tokens = [*context[-CONTEXT_TOKENS:], *ids]
    first = len(tokens) - len(ids)
    anchor, done = 0, first
    pieces: list[str] = []
    while done < len(tokens):
        before = _decode(tokenizer, tokens[anchor:done])
        stop, settled, waited = done, len(before), 0
        while True:
            stop += 1
            now = _decode(tokenizer, tokens[anchor:stop])
            stable = len(now.rstrip(REPLACEMENT))
            waited = 0 if stable > settled else waited + 1
            settled = max(settled, stable)
            is_open = now.endswith(REPLACEMENT) and waited < MAX_OPEN_TOKENS
            if stop == len(tokens) or not is_open or stop - done == MAX_CHAIN:
                break
        added = now[len(before) :]
        starts = [_decode(tokenizer, tokens[anchor:i])[len(before) :] for i in range(done, stop)]
        ends = [*(_settled(part, added) for part in starts[1:]), len(added)]
        cursor = 0
        for end in ends:
            pieces.append(added[cursor : max(cursor, end)])
            cursor = max(cursor, end)
        if added or done - anchor >= CONTEXT_TOKENS:
            anchor = done  # not after special tokens alone: what follows would lose its space
        done = stop
    return pieces


def _settled(part: str, whole: str) -> int:
    """Return how many characters of ``whole`` the decoded prefix ``part`` has begun."""
    stable = len(part.rstrip(REPLACEMENT))
    open_marks = len(part) - stable
    kept = 0
    while kept < open_marks and whole[stable + kept : stable + kept + 1] == REPLACEMENT:
        kept += 1
    return min(stable + kept + (kept < open_marks), len(whole))


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def _encode_texts(
    prompts: Sequence[Prompt], first: int, tokenizer: "PreTrainedTokenizerBase | None"
) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int32] | None]]:
    """Return ids and piece ends of the prompts that are text, by their place in ``prompts``."""
    places = [i for i, prompt in enumerate(prompts) if prompt.text is not None]
    if not places:
        return {}
    if tokenizer is None:
        raise PromptError(
            f"Prompt {first + places[0] + 1} is text, but the model has no tokenizer. "
            "Give token ids, or a model folder that holds a tokenizer."
        )
    with_offsets = has_offsets(tokenizer)
    texts = [prompts[i].text or "" for i in places]
    encoded = tokenizer(
        texts,
        return_offsets_mapping=with_offsets,
        return_special_tokens_mask=with_offsets,
        return_attention_mask=False,
        verbose=False,
    )
    result: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int32] | None]] = {}
    for row, (place, text) in enumerate(zip(places, texts, strict=True)):
        ids = np.array(encoded["input_ids"][row], dtype=np.int64)
        ends = None
        if with_offsets and len(ids):
            offsets = encoded["offset_mapping"][row]
            # a special token that the prompt spells out has characters of its own
            added = [
                bool(mask) and start == end
                for mask, (start, end) in zip(
                    encoded["special_tokens_mask"][row], offsets, strict=True
                )
            ]
            ends = piece_ends(offsets, len(text), added)
        result[place] = (ids, ends)
    return result


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
