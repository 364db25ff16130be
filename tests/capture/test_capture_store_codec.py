import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.errors import StoreError
from capture.store import codec
from capture.store.codec import Layout

ALL_CODES = np.arange(2**16, dtype=np.uint16)
# half of one unit in the last of 10 mantissa bits
RELATIVE_ERROR = 2.0**-11


def decode_half(codes):
    """Return the numbers whose float16 bits these are."""
    return np.asarray(codes, np.uint16).view(np.float16).astype(np.float32)


def unpack_weights(words, layout):
    """Unpack words [R, weight_words] into weights [R, slots]."""
    codes = np.ascontiguousarray(words, np.dtype("<u8")).view(np.dtype("<u2"))
    return codec.decode_weights(codes[:, : layout.slots].astype(np.uint16))


@pytest.fixture(scope="module")
def database():
    connection = duckdb.connect()
    yield connection
    connection.close()


def test_every_weight_code_means_the_same_in_sql_and_numpy(database):
    database.register("codes", pa.table({"code": ALL_CODES.astype(np.uint64)}))
    found = database.sql(
        f"SELECT {codec.sql_weight(f'nullif(code, {codec.NO_WEIGHT})')} AS weight FROM codes"
    )
    weights = found.to_arrow_table()["weight"].to_numpy()
    assert np.array_equal(weights, codec.decode_weights(ALL_CODES), equal_nan=True)
    assert np.flatnonzero(np.isnan(weights)).tolist() == [codec.NO_WEIGHT]


def test_every_weight_code_survives_decoding_and_encoding():
    codes = ALL_CODES[ALL_CODES != codec.NO_WEIGHT]
    weights = codec.decode_weights(codes)
    assert np.array_equal(codec.encode_weights(weights), codes)
    assert (np.diff(weights) > 0).all()


def test_weights_worked_out_by_hand():
    # 1.0 = 2**0 * (1 + 0/1024): exponent 0 is field 55
    assert codec.encode_weights(np.float32([0, 1, 0.5, 1.5])).tolist() == [
        0,
        55 * 1024,
        54 * 1024,
        55 * 1024 + 512,
    ]
    assert codec.decode_weights(np.uint16([55 * 1024 + 1])).tolist() == [1 + 1 / 1024]


@given(st.lists(st.floats(2.0**-54, 511.0, width=32), min_size=1))
def test_weights_are_within_the_stated_error(weights):
    weights = np.float32(weights)
    stored = codec.decode_weights(codec.encode_weights(weights))
    assert (np.abs(stored - weights) <= RELATIVE_ERROR * weights).all()


def test_a_weight_below_the_range_is_nearly_zero_and_minus_zero_is_zero():
    tiny = np.float32([1e-38, 2.0**-57, -0.0])
    assert codec.decode_weights(codec.encode_weights(tiny)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, -1e-9, 512.0, 511.7])
def test_weights_that_cannot_be_stored_are_refused(weight):
    with pytest.raises(StoreError, match="Combine weights must be finite and from 0 to 512, got"):
        codec.encode_weights(np.float32([0.25, weight, 0.0]))


def test_every_statistic_code_means_the_same_in_sql_and_numpy(database):
    # exponent 31 is infinity and nan, which the writer never stores
    finite = ALL_CODES[(ALL_CODES >> 10) & 31 != 31]
    database.register("halves", pa.table({"code": finite}))
    found = database.sql(f"SELECT {codec.sql_half('code')} AS x FROM halves").to_arrow_table()
    assert np.array_equal(found["x"].to_numpy(), decode_half(finite))
    assert decode_half(np.uint16([0x3C00, 0xC000, 0x0001])).tolist() == [1, -2, 2.0**-24]


def test_a_missing_statistic_stays_missing_in_sql(database):
    assert database.sql(f"SELECT {codec.sql_half('NULL::USMALLINT')}").fetchall() == [(None,)]


@given(st.lists(st.floats(-60_000, 60_000, width=32), min_size=1))
def test_statistics_are_within_the_stated_error(values):
    values = np.float32(values)
    stored = codec.encode_half("entropy", values).astype(np.float32)
    # below 2**-14 float16 has a fixed step of 2**-24
    assert (np.abs(stored - values) <= np.maximum(RELATIVE_ERROR * np.abs(values), 2.0**-25)).all()


def test_an_infinite_statistic_stays_infinite_and_nan_is_refused():
    infinite = [1, np.inf, -np.inf]
    assert codec.encode_half("margin", np.float32(infinite)).tolist() == infinite
    with pytest.raises(StoreError, match="The statistic margin must be a number, got nan"):
        codec.encode_half("margin", np.float32([1, np.nan]))
    with pytest.raises(StoreError, match="The statistic logsumexp must lie within"):
        codec.encode_half("logsumexp", np.float32([1, -70_000]))


@given(st.data())
def test_ids_and_weights_survive_packing(data):
    n_experts = data.draw(st.sampled_from([1, 2, 8, 60, 254, 255, 256, 257, 384, 4096, 65535]))
    slots = data.draw(st.integers(1, min(n_experts, 24)))
    layout = codec.layout_for(n_experts, slots)
    shape = (data.draw(st.integers(0, 5)), data.draw(st.integers(1, slots)))
    # a site with few experts in a run whose largest site needs 16 bits
    few = data.draw(st.sampled_from([n_experts, min(n_experts, 255)]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = random.integers(-1, few, shape).astype(np.int32)
    codes = random.integers(0, 2**16, shape).astype(np.uint16)
    pads = [(0, 0), (0, slots - shape[1])]

    packed = codec.pack_ids(ids.astype(codec.id_dtype(few)), layout)
    unpacked = codec.unpack_ids(packed, layout)
    assert np.array_equal(unpacked, np.pad(ids, pads, constant_values=-1))

    unpacked = unpack_weights(codec.pack_weights(codes, layout), layout)
    assert np.array_equal(unpacked, np.pad(codec.decode_weights(codes), pads))


def test_the_width_of_an_id_leaves_a_code_for_an_empty_slot():
    assert codec.layout_for(255, 8) == Layout(8, 8)
    assert codec.layout_for(256, 8) == Layout(16, 8)
    assert (Layout(8, 8).id_words, Layout(8, 9).id_words, Layout(16, 9).id_words) == (1, 2, 3)
    assert (Layout(8, 8).weight_words, Layout(8, 22).weight_words) == (2, 6)
