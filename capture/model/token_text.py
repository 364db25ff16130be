"""The text of tokens: which characters of a prompt each of them stands for."""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# a character has at most four bytes: if none was completed for so many tokens, none will be
MAX_OPEN_TOKENS = 4
MAX_CHAIN = 64  # tokens that each end a character and begin another
CONTEXT_TOKENS = 8  # a decoder may add or drop a space at the start of what it is given
REPLACEMENT = "\ufffd"
META = "\u2581"  # stands for a space in the pieces of SentencePiece
BLANKS = f" {META}"
WINDOW = 64  # characters that a token without text of its own may stand for
SHARED_TEXTS = 4096  # groups of tokens whose texts are remembered while one chunk is encoded


def has_offsets(tokenizer: "PreTrainedTokenizerBase | None") -> bool:
    """Whether the tokenizer can say which characters each token stands for."""
    return tokenizer is not None and bool(tokenizer.is_fast)


def can_decode(tokenizer: "PreTrainedTokenizerBase | None") -> bool:
    """Whether the tokenizer can turn tokens into text, with or without offsets."""
    return callable(getattr(tokenizer, "decode", None))


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


class PieceEnds:
    """Finds where the text of each token of a prompt ends, with one tokenizer.

    Offsets say it, but for tokens that share a span: bytes of one character, a piece that the
    tokenizer put before a word by itself, characters of which a normaliser made several. Those are
    decoded, and each character stands on the token that holds its first byte.

    Parameters
    ----------
    tokenizer : tokenizer
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._shared = lru_cache(SHARED_TEXTS)(
            lambda before, ids: decode_pieces(tokenizer, ids, before)
        )

    def by_offsets(
        self,
        text: str,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        is_special: Sequence[bool],
    ) -> npt.NDArray[np.int32]:
        """Return where each token's text ends, such that the texts join to ``text``.

        Parameters
        ----------
        text : str
        ids, offsets, is_special : sequence [n]
            As in :func:`piece_ends`.
        """
        ends = piece_ends(offsets, len(text), is_special)
        _keep_marks(text, ends, [start for start, _ in offsets], is_special)
        for group in _sharing(offsets, is_special):
            first, last = group[0], group[-1]
            start = int(ends[first - 1]) if first else 0
            shared = text[start : int(ends[last])]
            before = tuple(ids[i] for i in range(first)[-1:])
            pieces = self._shared(before, tuple(ids[i] for i in group))
            sizes = _sizes(shared, pieces)
            cursor = start
            for place, i in enumerate(group):
                if sizes is not None:
                    cursor += sizes[place]
                elif pieces[place].strip(BLANKS) or shared[:1] == " " or cursor > start:
                    cursor = max(cursor, min(offsets[i][1], int(ends[last])))
                ends[i : group[place + 1] if i != last else i + 1] = cursor
            ends[last] = start + len(shared)
        return ends

    def by_decoding(self, text: str, ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """Return the same from decoded tokens alone, where a tokenizer gives no offsets.

        Tokens that decode to something else than the text has (unknown words, other case) stand
        for what lies between their neighbours.
        """
        pieces = decode_pieces(self._tokenizer, ids)
        if "".join(pieces) == text:
            return ends_of(pieces)
        special = set(self._tokenizer.all_special_ids)
        named = self._tokenizer.convert_ids_to_tokens(list(ids))
        # a special token that the prompt spells out has characters of its own
        wanted = [
            name if i in special else piece
            for i, name, piece in zip(ids, named, pieces, strict=True)
        ]
        added = special - {self._tokenizer.unk_token_id}
        return _found_in_turn(text, wanted, [i in added for i in ids])


def _keep_marks(
    text: str, ends: npt.NDArray[np.int32], starts: Sequence[int], is_special: Sequence[bool]
) -> None:
    """Leave combining marks that no token claims with the character that they change."""
    if text.isascii():
        return
    following = len(text)
    for i in reversed(range(len(ends))):
        if is_special[i]:
            continue
        end = int(ends[i])
        while end < following and _is_mark(text, end):
            end += 1
        ends[i], following = end, max(starts[i], 0)


def _sharing(offsets: Sequence[tuple[int, int]], is_special: Sequence[bool]) -> Iterator[list[int]]:
    """Yield the places of tokens whose spans overlap, or are empty and so belong to the next."""
    group: list[int] = []
    reach, empty = 0, False
    for i, (start, end) in enumerate(offsets):
        if is_special[i]:
            continue
        if group and (start < reach or empty):
            group.append(i)
        else:
            if len(group) > 1:
                yield group
            group, reach = [i], 0
        reach, empty = max(reach, end), start == end
    if len(group) > 1:
        yield group


def _sizes(text: str, pieces: Sequence[str]) -> list[int] | None:
    """Return how many characters of ``text`` each decoded piece has, or None if they differ.

    What a tokenizer added stands before the text, as blanks; characters that no token has stand
    before the first that has any.
    """
    if META not in text:
        pieces = [piece.replace(META, " ") for piece in pieces]
    joined = "".join(pieces)
    added, left = len(joined) - len(text), len(text) - len(joined)
    if added >= 0 and joined.endswith(text) and not joined[:added].strip():
        sizes = []
        for piece in pieces:
            cut = min(added, len(piece))
            added -= cut
            sizes.append(len(piece) - cut)
        return sizes
    if left > 0 and joined and text.endswith(joined) and not text[:left].strip():
        sizes = [len(piece) for piece in pieces]
        sizes[next(i for i, size in enumerate(sizes) if size)] += left
        return sizes
    return None


def _found_in_turn(
    text: str, pieces: Sequence[str], is_special: Sequence[bool]
) -> npt.NDArray[np.int32]:
    """Return where each piece ends in ``text``, looking for one after the other."""
    folded = "".join(_folded(character) for character in text)
    ends = np.zeros(len(pieces), dtype=np.int32)
    cursor, unknown = 0, None
    for i, piece in enumerate(pieces):
        core = "".join(_folded(character) for character in piece.strip())
        if not core:
            cursor += len(piece) if piece and text.startswith(piece, cursor) else 0
        else:
            window = len(core) if is_special[i] else len(core) + WINDOW
            at = folded.find(core, cursor, cursor + window)
            if at >= 0:
                if unknown is not None:
                    ends[unknown:i] = max(cursor, len(text[:at].rstrip()))
                cursor, unknown = at + len(core), None
                then = pieces[i + 1][:1] if i + 1 < len(pieces) else ""
                while _is_mark(text, cursor) and text[cursor] != then:
                    cursor += 1
            elif not is_special[i] and unknown is None:
                unknown = i
        ends[i] = cursor
    own = [
        i for i, special in enumerate(is_special) if not special or ends[i] > (i and ends[i - 1])
    ]
    ends[(own[-1] if own else len(pieces) - 1) if unknown is None else unknown :] = len(text)
    return ends


def _is_mark(text: str, place: int) -> bool:
    """Whether a combining mark stands there, with a character before it to change."""
    return 0 < place < len(text) and bool(unicodedata.combining(text[place]))


def _folded(character: str) -> str:
    """Return a character without case and accents, always as one character."""
    base = unicodedata.normalize("NFKD", character)[:1].lower()
    return base if len(base) == 1 else character


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
        before = decode(tokenizer, tokens[anchor:done])
        stop, settled, waited = done, len(before), 0
        while True:
            stop += 1
            now = decode(tokenizer, tokens[anchor:stop])
            stable = len(now.rstrip(REPLACEMENT))
            waited = 0 if stable > settled else waited + 1
            settled = max(settled, stable)
            is_open = now.endswith(REPLACEMENT) and waited < MAX_OPEN_TOKENS
            if stop == len(tokens) or not is_open or stop - done == MAX_CHAIN:
                break
        added = now[len(before) :]
        starts = [decode(tokenizer, tokens[anchor:i])[len(before) :] for i in range(done, stop)]
        ends = [*(_settled(part, added) for part in starts[1:]), len(added)]
        cursor = 0
        for end in ends:
            pieces.append(added[cursor : max(cursor, end)])
            cursor = max(cursor, end)
        if added or done - anchor >= CONTEXT_TOKENS:
            anchor = done  # not after special tokens alone: what follows would lose its space
        done = stop
    return pieces if tokenizer.is_fast else _on_first_bytes(tokenizer, tokens, pieces)


def _on_first_bytes(
    tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], pieces: list[str]
) -> list[str]:
    """Move characters to the token that they begin in.

    Some tokenizers decode the first bytes of a character to nothing, not to U+FFFD, so that it
    seems to begin where it ends. It begins earlier if it is not there without the tokens before.

    Parameters
    ----------
    tokens : sequence
        Context and pieces.
    pieces : list
        Of the last tokens; changed in place.
    """
    special, first = set(tokenizer.all_special_ids), len(tokens) - len(pieces)
    run = 0  # tokens before this one that decode to nothing
    for place, piece in enumerate(pieces):
        if not piece:
            run = 0 if tokens[first + place] in special else run + 1
            continue
        own, run = min(run, MAX_OPEN_TOKENS), 0
        here = first + place
        context = tokens[max(0, here - own - CONTEXT_TOKENS) : here - own]
        known = len(decode(tokenizer, context))
        for fewer in range(own):
            alone = decode(tokenizer, [*context, *tokens[here - fewer : here + 1]])[known:]
            if alone == piece:
                break
        else:
            fewer = own
        if fewer:
            pieces[place - fewer], pieces[place] = piece[:1], piece[1:]
    return pieces


def _settled(part: str, whole: str) -> int:
    """Return how many characters of ``whole`` the decoded prefix ``part`` has begun."""
    stable = len(part.rstrip(REPLACEMENT))
    open_marks = len(part) - stable
    kept = 0
    while kept < open_marks and whole[stable + kept : stable + kept + 1] == REPLACEMENT:
        kept += 1
    return min(stable + kept + (kept < open_marks), len(whole))


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Return the text of token ids as it is, without special tokens."""
    if not tokenizer.is_fast:  # those in Python fail on rows of an embedding that have no token
        ids = [i for i in ids if i < len(tokenizer)]
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
