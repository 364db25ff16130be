"""Batches are rectangles of real tokens; staging and the writer thread lose and mix nothing."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.errors import StoreError
from capture.model.forward import pad_batch, plan_batches
from capture.recorder.engine import CallResult
from capture.recorder.transfer import ALIGNMENT, NUMPY_TYPES, Staging, WriterThread, pack
from capture.store import SiteBlock


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 200), st.integers(0, 9)
)
def test_batches_hold_every_prompt_once_within_the_budget(lengths, budget, extra):
    batches = plan_batches(lengths, budget, extra)
    assert sorted(int(p) for batch in batches for p in batch) == list(range(len(lengths)))
    widths = [max(lengths[p] for p in batch) + extra for batch in batches]
    assert widths == sorted(widths, reverse=True)
    for batch, width in zip(batches, widths, strict=True):
        assert len(batch) == 1 or len(batch) * width <= budget
        assert list(batch) == sorted(batch)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(["left", "right"]))
def test_padding_can_be_taken_off_again(lengths, side):
    ids = [np.arange(length, dtype=np.int32) + 100 * i for i, length in enumerate(lengths)]
    batch = pad_batch(np.arange(len(ids)), ids, side=side, pad_id=7)
    assert batch.input_ids.reshape(-1)[batch.rows].tolist() == np.concatenate(ids).tolist()
    assert (batch.input_ids[batch.mask == 0] == 7).all()
    assert batch.mask.sum(axis=1).tolist() == lengths
    assert batch.position.tolist() == [i for length in lengths for i in range(length)]
    assert batch.mask[:, -1 if side == "left" else 0].all()


@settings(deadline=None)
@given(st.lists(st.sampled_from(list(NUMPY_TYPES)), min_size=1, max_size=6), st.data())
def test_packed_tensors_come_out_as_they_went_in(dtypes, data):
    shapes = [data.draw(st.lists(st.integers(0, 3), max_size=3)) for _ in dtypes]
    tensors = {
        i: (torch.rand(shape) * 9).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }
    block, segments = pack(tensors)
    for segment in segments:
        assert segment.start % ALIGNMENT == 0
        part = block.numpy()[segment.start : segment.start + segment.n_bytes]
        array = part.view(NUMPY_TYPES[segment.dtype]).reshape(segment.shape)
        assert np.array_equal(array, tensors[segment.number].numpy())


def test_a_record_comes_out_in_the_form_in_which_it_went_in():
    rows, vectors = np.array([0, 2]), [torch.ones(2, 3), torch.zeros(2, 3)]
    block = SiteBlock(
        (4, 7), torch.arange(6), torch.rand(2), None, margin=torch.ones(2), scores=(rows, vectors)
    )
    sent = CallResult([block], [], *(torch.arange(n) for n in range(5)))
    got = Staging().send({"step": sent}, stop=threading.Event()).open()["step"]
    assert [values.tolist() for values in got[2:7]] == [list(range(n)) for n in range(5)]
    assert all(isinstance(values, np.ndarray) for values in (*got[2:7], got.sites[0].margin))
    (back,) = got.sites
    assert (back.site_indices, back.prob_sum, back.entropy) == ((4, 7), None, None)
    assert back.scores[0] is rows
    for array, tensor in zip(back.scores[1], vectors, strict=True):
        assert np.shares_memory(array, tensor.numpy()) and array.shape == (2, 3)


def test_the_writer_thread_keeps_order_and_bounds_the_queue():
    seen, release = [], threading.Event()

    def slow(item):
        release.wait()
        seen.append(item)

    thread = WriterThread(slow, capacity=2)
    puts = []

    def produce():
        for item in range(6):
            thread.put(item)
            puts.append(item)

    producer = threading.Thread(target=produce)
    producer.start()
    time.sleep(0.3)
    assert len(puts) <= 3, "one being consumed, two waiting"
    release.set()
    producer.join()
    thread.close()
    assert seen == list(range(6))


def test_an_error_of_the_writer_thread_reaches_the_caller():
    def fail(item):
        raise StoreError(f"item {item}")

    thread = WriterThread(fail)
    with pytest.raises(StoreError, match="item 0"):
        for item in range(100):
            thread.put(item)
            time.sleep(0.01)
    with pytest.raises(StoreError, match="item 0"):
        thread.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_staging_copies_to_page_locked_memory_and_reuses_it():
    staging, stop = Staging(), threading.Event()
    sent = [torch.full((1000, n + 1), n, device="cuda") for n in range(9)]
    for n, tensor in enumerate(sent):
        parcel = staging.send({"a": tensor, "b": tensor.float().sum()}, stop=stop)
        arrays = parcel.open()
        assert (arrays["a"] == n).all() and arrays["a"].shape == (1000, n + 1)
        assert arrays["b"] == n * 1000 * (n + 1)
    assert staging._made <= 3
