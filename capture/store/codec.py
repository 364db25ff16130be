"""Packing of routing rows into integers with numpy, and the SQL that unpacks them.

Each pair (``pack_*`` in numpy, ``sql_*`` as an expression) is one definition written twice; the
tests compare both on every code there is.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.errors import StoreError

# 6 exponent and 10 mantissa bits: relative error <= 2**-11 from 2**-55 up to 2**9; 0 stays 0
WEIGHT_MANTISSA = 10
WEIGHT_BIAS = 55
WEIGHT_LIMIT = 2.0**9
_FLOAT32_MANTISSA = 23
_FLOAT32_BIAS = 127
# three halves of the last step: what is larger would round to NO_WEIGHT
_LAST_STEP = 1.5 * 2.0 ** (8 - WEIGHT_MANTISSA)
_WEIGHT_SHIFT = _FLOAT32_MANTISSA - WEIGHT_MANTISSA
_WEIGHT_OFFSET = (_FLOAT32_BIAS - WEIGHT_BIAS) << WEIGHT_MANTISSA

# the largest code: a weight that is not known, NULL for readers; also what the gate makes of one
# that has no code (nan, negative, too large)
NO_WEIGHT = 2**16 - 1
HALF_LIMIT = float(np.finfo(np.float16).max)
WORD_BITS = 64
WEIGHT_BITS = 16

Words = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.uint16]


class Layout(NamedTuple):
    """How many bits and slots one packed row of this run has."""

    id_bits: int  # 8 or 16
    slots: int  # the largest top_k of the run's sites

    @property
    def empty(self) -> int:
        """Code of an empty slot: all ones."""
        return (1 << self.id_bits) - 1

    @property
    def id_words(self) -> int:
        """64-bit words that hold the ids of one row."""
        return -(-self.slots * self.id_bits // WORD_BITS)

    @property
    def weight_words(self) -> int:
        """64-bit words that hold the weights of one row."""
        return -(-self.slots * WEIGHT_BITS // WORD_BITS)


def layout_for(n_experts: int, slots: int) -> Layout:
    """Choose the layout of a run from its largest expert count and its largest top_k."""
    return Layout(id_bits=8 if n_experts <= 255 else 16, slots=slots)


def id_dtype(n_experts: int) -> "np.dtype[Any]":
    """Return the type of a packed expert id; its largest value marks an empty slot."""
    return np.dtype(np.uint8 if n_experts <= 255 else np.uint16)


def pack_ids(part: npt.NDArray[Any], layout: Layout) -> Words:
    """Pack id codes [R, K], K <= slots, uint8 or uint16, into words [R, id_words].

    Slots that the rows do not have become all ones.
    """
    dtype = np.dtype("<u1") if layout.id_bits == 8 else np.dtype("<u2")
    if part.dtype.itemsize < dtype.itemsize:
        empty = part == np.iinfo(part.dtype).max
        part = part.astype(dtype)
        part[empty] = layout.empty
    return _as_words(part.astype(dtype, copy=False), layout.id_words, layout.empty)


def _as_words(codes: npt.NDArray[Any], n_words: int, filler: int) -> Words:
    """View codes [R, K] as words [R, n_words]; a copy where the rows do not fill their words."""
    width = n_words * WORD_BITS // (8 * codes.dtype.itemsize)
    if codes.shape[1] < width or not codes.flags.c_contiguous:
        full = np.full((len(codes), width), filler, codes.dtype)
        full[:, : codes.shape[1]] = codes
        codes = full
    return codes.view(np.dtype("<u8")).astype(np.uint64, copy=False)


def unpack_ids(words: Words, layout: Layout) -> npt.NDArray[np.int32]:
    """Unpack words [R, id_words] into ids [R, slots], -1 = empty slot."""
    dtype = np.dtype("<u1") if layout.id_bits == 8 else np.dtype("<u2")
    codes = np.ascontiguousarray(words, np.dtype("<u8")).view(dtype)[:, : layout.slots]
    ids = codes.astype(np.int32)
    ids[ids == layout.empty] = -1
    return ids


def encode_weights(weights: npt.NDArray[np.float32]) -> Codes:
    """Round weights to the nearest 16-bit code, ties to even.

    Weights below the range of the code become 0.

    Raises
    ------
    StoreError
        If a weight is nan, infinite, negative or too large for the code.
    """
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    # as integers, every negative number, nan and infinity lies above every legal weight
    limit = int(np.float32(WEIGHT_LIMIT - _LAST_STEP).view(np.uint32))
    if bits.size and int(bits.max()) > limit:
        return encode_weights(_checked_weights(weights, limit))
    half = (bits >> np.uint32(_WEIGHT_SHIFT)) & np.uint32(1)
    half += bits
    half += np.uint32((1 << (_WEIGHT_SHIFT - 1)) - 1)
    half >>= np.uint32(_WEIGHT_SHIFT)
    np.maximum(half, np.uint32(_WEIGHT_OFFSET), out=half)
    half -= np.uint32(_WEIGHT_OFFSET)
    return half.astype(np.uint16)


def _checked_weights(weights: npt.NDArray[np.float32], limit: int) -> npt.NDArray[np.float32]:
    """Replace -0 by 0 and refuse what has no code."""
    values = np.asarray(weights, np.float32) + np.float32(0)
    wrong = ~(values >= 0) | (values.view(np.uint32) > limit)
    if wrong.any():
        raise StoreError(
            f"Combine weights must be finite and from 0 to {WEIGHT_LIMIT:g}, got "
            f"{values[wrong][0]}. Check the model's precision (dtype), or the site's adapter."
        )
    return values


def decode_weights(codes: Codes) -> npt.NDArray[np.float32]:
    """Return the weights that the codes stand for, exactly; nan where one is not known."""
    code = codes.astype(np.int64)
    mantissa = (code & ((1 << WEIGHT_MANTISSA) - 1)) + (1 << WEIGHT_MANTISSA)
    exponent = (code >> WEIGHT_MANTISSA) - WEIGHT_BIAS - WEIGHT_MANTISSA
    values = np.ldexp(mantissa.astype(np.float64), exponent.astype(np.int32))
    known = np.where(code == 0, 0.0, values)
    return np.where(code == NO_WEIGHT, np.nan, known).astype(np.float32)


def pack_weights(part: Codes, layout: Layout) -> Words:
    """Pack weight codes [R, K], K <= slots, into words [R, weight_words]."""
    return _as_words(part.astype(np.dtype("<u2"), copy=False), layout.weight_words, 0)


def encode_half(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round a statistic to float16; an infinite one stays infinite and has no value in the file.

    The margin of a token whose other experts were all ruled out is infinite.

    Raises
    ------
    StoreError
        If a value is nan, or finite and beyond the range of float16.
    """
    plain = np.ascontiguousarray(values, np.float32)
    finite = np.isfinite(plain)
    if np.isnan(plain).any():
        raise StoreError(
            f"The statistic {name} must be a number, got nan. Pass None where it is not known."
        )
    beyond = finite & (np.abs(plain) >= HALF_LIMIT)
    if beyond.any():
        raise StoreError(
            f"The statistic {name} must lie within +-{HALF_LIMIT:g}, got {plain[beyond][0]}. "
            "Check the model's precision (dtype)."
        )
    return plain.astype(np.float16)


def sql_slots(layout: Layout) -> str:
    """Write the rows (slot, id_word, id_shift, weight_word, weight_shift) of a list of slots."""
    rows = []
    for slot in range(layout.slots):
        id_word, id_shift = divmod(slot * layout.id_bits, WORD_BITS)
        weight_word, weight_shift = divmod(slot * WEIGHT_BITS, WORD_BITS)
        ids = f"{id_word}, {id_shift}::UBIGINT"
        rows.append(f"({slot}, {ids}, {weight_word}, {weight_shift}::UBIGINT)")
    return ", ".join(rows)


def _sql_field(words: str, n_words: int, word: str, shift: str, mask: int) -> str:
    """Write the expression for the bits at ``shift`` of column ``words`` + the number ``word``."""
    column = f"{words}0"
    if n_words > 1:
        cases = " ".join(f"WHEN {index} THEN {words}{index}" for index in range(n_words))
        column = f"(CASE {word} {cases} END)"
    return f"(({column} >> {shift}) & {mask})"


def sql_id_code(words: str, layout: Layout) -> str:
    """Write the expression for the id code at (id_word, id_shift); ``layout.empty`` = empty.

    ``words`` is what the names of the packed columns begin with; a number follows.
    """
    return _sql_field(words, layout.id_words, "id_word", "id_shift", layout.empty)


def sql_weight_code(words: str, layout: Layout) -> str:
    """Write the expression for the weight code at (weight_word, weight_shift)."""
    mask = (1 << WEIGHT_BITS) - 1
    return _sql_field(words, layout.weight_words, "weight_word", "weight_shift", mask)


def sql_count_filled(words: str, layout: Layout) -> str:
    """Write the expression for the number of filled slots of a packed row."""
    terms = []
    for slot in range(layout.slots):
        word, shift = divmod(slot * layout.id_bits, WORD_BITS)
        code = f"(({words}{word} >> {shift}) & {layout.empty})"
        terms.append(f"({code} <> {layout.empty})::INTEGER")
    return " + ".join(terms)


def sql_weight(code: str) -> str:
    """Write the expression for the weight of a 16-bit code; NULL stays NULL.

    The power of two is a shift, which is exact and several times faster than ``pow``.
    """
    one = 1 << WEIGHT_MANTISSA
    scale = 2.0 ** -(WEIGHT_BIAS + WEIGHT_MANTISSA)
    return (
        f"(CASE WHEN {code} = 0 THEN 0 ELSE ({one} + ({code} & {one - 1}))::DOUBLE"
        f" * (1::UBIGINT << ({code} >> {WEIGHT_MANTISSA}))::DOUBLE * {scale!r}::DOUBLE END)::FLOAT"
    )


def sql_half(code: str) -> str:
    """Write the expression for the number with these float16 bits; NULL stays NULL."""
    magnitude = (
        f"CASE WHEN ({code} & 31744) = 0 THEN ({code} & 1023)::DOUBLE * {2.0**-24!r}::DOUBLE"
        f" ELSE (1024 + ({code} & 1023))::DOUBLE"
        f" * (1::UBIGINT << (({code} >> 10) & 31))::DOUBLE * {2.0**-25!r}::DOUBLE END"
    )
    sign = f"CASE WHEN {code} >= 32768 THEN -1 ELSE 1 END"
    return f"(({sign}) * ({magnitude}))::FLOAT"
