"""Recording in loops of every kind: hand-written decoding, training, wrappers, several models."""

import copy
import gc
import socket
import threading
import warnings

import accelerate
import processes
import pytest
import tiny_models
import torch
from own_loop import alone, assert_recorded, padded, texts

import capture
from capture.errors import CaptureError, ConfigError
from capture.recorder.own_loop.call import CannotFollow, read_call
from capture.store import check_run

pytestmark = pytest.mark.slow

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import peft

TEXTS = [[5, 6, 7, 9, 11], [8, 9], [20, 21, 22, 23]]
LONG = [5, 6, 7, 9, 11, 30, 31, 32]


def model(name="olmoe", **changes):
    return tiny_models.build(name, **changes)


def decoded(own, ids, steps, *, crop=0):
    """Decode greedily by hand, as people do who call the model themselves."""
    whole = ids.tolist()[0]
    with torch.no_grad():
        out = own(ids, use_cache=True)
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            whole.append(token.item())
            out = own(token, cache=out.cache)
        if crop:
            out.cache.crop(-crop)
            whole = whole[:-crop]
            out = own(torch.tensor([[33, 34]]), cache=out.cache)
            whole += [33, 34]
    return whole


def test_decoding_by_hand(tmp_path):
    own = model("deepseek_v3")
    with capture.recording(own, tmp_path / "a.duckdb"):
        first = decoded(own, torch.tensor([TEXTS[0]]), 3)
        gc.collect()
        second = decoded(own, torch.tensor([TEXTS[1]]), 4, crop=2)
    assert_recorded(own, tmp_path / "a.duckdb", [(first, 5), (second, 4)])


def test_rows_of_a_cache_that_are_chosen_and_repeated(tmp_path):
    own = model("mixtral")
    ids, mask = padded(TEXTS[:1] + TEXTS[2:], side="left")
    with torch.no_grad(), capture.recording(own, tmp_path / "a.duckdb"):
        cache = own(ids, attention_mask=mask).cache
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[:, 0] = 0
        own(torch.tensor([[40], [41]]), attention_mask=mask, cache=cache)
    whole = [([*TEXTS[2], 40], 4), ([*TEXTS[2], 41], 4)]
    assert_recorded(own, tmp_path / "a.duckdb", whole)


def test_a_chat_that_keeps_its_cache(tmp_path):
    from transformers import DynamicCache

    own = model("qwen3_moe")
    own.generation_config.eos_token_id = None
    with capture.recording(own, tmp_path / "a.duckdb") as run:
        cache = DynamicCache(config=own.config)
        given = {"cache": cache, "max_new_tokens": 3, "do_sample": False}
        first = own.generate(torch.tensor([TEXTS[0]]), **given)
        again = torch.cat([first, torch.tensor([[50, 51]])], dim=1)
        second = own.generate(again, **given)
    assert run.error is None
    (text,) = texts(tmp_path / "a.duckdb")
    assert text.tokens == second[0, :-1].tolist()
    # the last token of the first answer is read with what follows it
    assert text.given == 5 + 3


def test_samples_of_one_prompt_are_texts_of_their_own(tmp_path):
    own = model()
    own.generation_config.eos_token_id = None
    torch.manual_seed(0)
    with capture.recording(own, tmp_path / "a.duckdb", level="scores") as run:
        run.prompts(["one"])
        out = own.generate(
            torch.tensor([TEXTS[0]]), max_new_tokens=4, do_sample=True, num_return_sequences=3
        )
    assert_recorded(own, tmp_path / "a.duckdb", [(row[:-1].tolist(), 5) for row in out])
    with capture.store.RunReader.open(tmp_path / "a.duckdb") as run:
        assert {row["text"] for row in run.query("SELECT text FROM prompts").to_pylist()} == {"one"}
        counts = run.query("SELECT count(*) AS n FROM scores").to_pylist()
    assert counts == [{"n": 3 * 8 * 3}]


@pytest.mark.parametrize("level", ["stats", "ids"])
def test_sums_are_of_what_is_kept(tmp_path, level):
    """Of what generate() read, only the kept rows count in sums of weights and probabilities."""
    own = model("mixtral")
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    own.generation_config.eos_token_id = None
    with capture.recording(own, tmp_path / "a.duckdb", level=level):
        out = own.generate(ids, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3)
    with torch.no_grad(), capture.recording(own, tmp_path / "b.duckdb", level=level):
        own(out[:, :-1])
    sums = []
    for name in ("a", "b"):
        with capture.store.RunReader.open(tmp_path / f"{name}.duckdb") as run:
            sums.append(
                run.query(
                    "SELECT assignments, weight_sum, prob_sum FROM expert_load"
                    " ORDER BY layer, site, expert_id"
                ).to_pylist()
            )
            pairs = run.query("SELECT sum(tokens) AS n FROM coactivation").to_pylist()
            assert pairs == [{"n": 3 * 15 * 9}]
    for mine, theirs in zip(*sums, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("name", "reentrant"), [("olmoe", True), ("phimoe", False)])
def test_training_counts_every_token_once(tmp_path, name, reentrant):
    ids, mask = padded(TEXTS)
    results = []
    for recorded in (False, True):
        own = model(name).train()
        own.activation_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        told = []
        handle = own.model.layers[0].mlp.experts.register_forward_pre_hook(
            lambda _, args, told=told: told.append(args[1].tolist())
        )
        torch.manual_seed(0)

        def step(own=own, optimizer=optimizer):
            own(ids, attention_mask=mask, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        if recorded:
            with capture.recording(own, tmp_path / "a.duckdb"):
                step()
                step()
        else:
            step()
            step()
        handle.remove()
        assert own.training
        told = told[-4:]  # of two steps; a test of the routers came before
        results.append([p.detach().clone() for p in own.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "training is the same"
    found = texts(tmp_path / "a.duckdb")
    assert [text.tokens for text in found] == TEXTS * 2
    # what the experts were told in the passes, not when they ran again
    passes = told[::2]
    rows = [n for n, real in enumerate(mask.flatten().tolist()) if real]
    chosen = [set(token) for text in found for token in text.experts[0]]
    assert chosen == [set(one[n]) for one in passes for n in rows]


def test_two_models_at_once(tmp_path):
    one, other = model(), model("mixtral")
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad(), capture.recording(one, tmp_path / "a.duckdb"):
        with capture.recording(other, tmp_path / "b.duckdb"):
            one(ids)
            decoded(other, torch.tensor([TEXTS[1]]), 2)
        one(torch.tensor([TEXTS[2]]))
    assert_recorded(one, tmp_path / "a.duckdb", [(TEXTS[0], 5), (TEXTS[2], 4)])
    assert [text.given for text in texts(tmp_path / "b.duckdb")] == [2]


def test_adapters_around_a_model(tmp_path):
    own = model("mixtral")
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj"],
        modules_to_save=["gate"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in an old way
        wrapped = peft.get_peft_model(own, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter))
    own.generation_config.eos_token_id = None
    with capture.recording(wrapped, tmp_path / "a.duckdb"):
        with torch.no_grad():
            wrapped(input_ids=torch.tensor([TEXTS[0]]))
        out = wrapped.generate(input_ids=torch.tensor([TEXTS[1]]), max_new_tokens=3)
    assert_recorded(own, tmp_path / "a.duckdb", [(TEXTS[0], 5), (out[0, :-1].tolist(), 2)])


def test_routers_and_experts_that_are_adapted(tmp_path):
    own = model("mixtral")
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj"],
        target_parameters=["gate.weight", "experts.gate_up_proj"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(own, config).train()
    ids, told = torch.tensor([TEXTS[0]]), []
    for name, module in own.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda _, args: told.append(args[1].tolist()))
    with capture.recording(wrapped, tmp_path / "a.duckdb"):
        told.clear()
        wrapped(input_ids=ids, labels=ids).loss.backward()
    (text,) = texts(tmp_path / "a.duckdb")
    assert text.tokens == TEXTS[0]
    for layer, rows in enumerate(told):
        assert [set(experts) for experts in text.experts[layer]] == [set(row) for row in rows]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"read_index": [[0, 1]]}, "continuous batching"),  # as generate_batch() calls a model
        ({"attention_mask": torch.ones(1, 2)}, "5 or 8 columns"),
        ({"attention_mask": torch.ones(1, 1, 5, 6)}, r"\[B, 1, 5, 8\]"),
        ({"attention_mask": "blocks"}, "got a str"),
        ({"input_ids": None}, "input_ids"),
    ],
)
def test_calls_that_do_not_tell_what_their_rows_are(given, message):
    with pytest.raises(CannotFollow, match=message):
        read_call({"input_ids": torch.tensor([TEXTS[0]]), **given}, 3)


def test_offloaded_weights_and_embeddings(tmp_path):
    plain, own = model("mixtral"), model("mixtral")
    accelerate.cpu_offload(own, offload_buffers=True)
    with torch.no_grad(), capture.recording(own, tmp_path / "a.duckdb"):
        own(torch.tensor([TEXTS[0]]))
    assert_recorded(plain, tmp_path / "a.duckdb", [(TEXTS[0], 5)])


def test_the_part_below_the_head_may_be_called(tmp_path):
    own = model()
    with torch.no_grad(), capture.recording(own, tmp_path / "a.duckdb"):
        own.model(input_ids=torch.tensor([TEXTS[0]]))
    assert_recorded(own, tmp_path / "a.duckdb", [(TEXTS[0], 5)])


def test_embeddings_have_no_token_ids(tmp_path):
    own = model()
    embeds = own.get_input_embeddings()(torch.tensor([TEXTS[0]]))
    own.generation_config.eos_token_id = None
    with torch.no_grad(), capture.recording(own, tmp_path / "a.duckdb"):
        own(inputs_embeds=embeds)
        out = own.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
    found = texts(tmp_path / "a.duckdb")
    assert [text.tokens for text in found] == [[None] * 5, [None] * 5 + out[0, :-1].tolist()]


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("when", ["wrapper", "inside, in place"])
def test_compiled_models(tmp_path, when):
    plain, own = (model("mixtral", num_hidden_layers=1) for _ in range(2))
    ids, mask = padded(TEXTS)

    def compiled():
        if "in place" in when:
            own.compile(backend="eager")
            return own
        return torch.compile(own, backend="eager", fullgraph=True)

    called = own if "inside" in when else compiled()
    with torch.no_grad():
        called(ids, attention_mask=mask, use_cache=False)
        with capture.recording(called, tmp_path / "a.duckdb"):
            if "inside" in when:
                called = compiled()
            for _ in range(2):
                called(ids, attention_mask=mask, use_cache=False)
        called(ids, attention_mask=mask, use_cache=False)
    torch._dynamo.reset()
    assert_recorded(plain, tmp_path / "a.duckdb", [(text, len(text)) for text in TEXTS * 2])


def test_parallel_wrappers_and_ranks(tmp_path, monkeypatch):
    own = model()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    wrapped = DistributedDataParallel(own)
    with torch.no_grad(), capture.recording(wrapped, tmp_path / "a.duckdb") as run:
        wrapped(torch.tensor([TEXTS[0]]))
    assert run.path == tmp_path / "a-rank1.duckdb"
    assert_recorded(own, run.path, [(TEXTS[0], 5)])

    class FullyShardedDataParallel(DistributedDataParallel):
        pass

    refused = pytest.raises(ConfigError, match=r"got FSDP1 .*Shard it with FSDP2")
    with refused, capture.recording(FullyShardedDataParallel(own), tmp_path / "b.duckdb"):
        pass


# two processes train on texts of their own, plainly and recorded
PARALLEL = """
import sys, pathlib, torch, capture, tiny_models
from own_loop import padded
from torch.distributed.fsdp import fully_shard
torch.distributed.init_process_group("gloo")
rank, out = torch.distributed.get_rank(), pathlib.Path(sys.argv[1])
ids, mask = padded([[5, 6, 7, 9, 11], [8, 9]] if rank == 0 else [[20, 21, 22], [30]])

def train(how, recorded):
    own = tiny_models.build("mixtral", num_hidden_layers=2).train()
    if how == "fsdp":
        own = [fully_shard(one) for one in (*own.model.layers, own)][-1]
    else:
        own = torch.nn.parallel.DistributedDataParallel(own, find_unused_parameters=True)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)

    def steps():
        for _ in range(2):
            own(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    if recorded:
        with capture.recording(own, out / f"{how}.duckdb"):
            steps()
    else:
        steps()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in own.parameters()]

for how in ("ddp", "fsdp"):
    assert all(map(torch.equal, train(how, False), train(how, True))), how
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow(seconds=5)
def test_processes_that_train_together(tmp_path):
    """Gradients that are averaged, and weights that are sharded: a part each, training the same."""
    with socket.create_server(("localhost", 0)) as free:
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    started = [
        processes.start(
            tmp_path, [tmp_path], code=PARALLEL, RANK=str(rank), WORLD_SIZE="2", **group
        )
        for rank in range(2)
    ]
    assert not any([process.wait() for process in started]), [one.stderr for one in started]
    own = model("mixtral", num_hidden_layers=2)
    for how in ("ddp", "fsdp"):
        for rank, rows in enumerate(([[5, 6, 7, 9, 11], [8, 9]], [[20, 21, 22], [30]])):
            told = texts(tmp_path / f"{how}-rank{rank}.duckdb")
            assert [text.tokens for text in told] == rows * 2
            for text in told[:2]:  # before the first step the model is as it was built
                for layer, expected in alone(own, text.tokens).items():
                    assert [set(e) for e in text.experts[layer]] == [set(e) for e in expected]


def test_an_error_of_the_loop_is_the_loops(tmp_path):
    own = model()
    with pytest.raises(ZeroDivisionError), capture.recording(own, tmp_path / "a.duckdb"):
        with torch.no_grad():
            own(torch.tensor([TEXTS[0]]))
        raise ZeroDivisionError
    with capture.store.RunReader.open(tmp_path / "a.duckdb") as run:
        assert not run.info["complete"]
    assert_recorded(own, tmp_path / "a.duckdb", [(TEXTS[0], 5)])
    assert "generate" not in vars(own) and own._compiled_call_impl is None


def test_a_call_that_fails_is_no_text(tmp_path):
    own = model()
    with torch.no_grad(), capture.recording(own, tmp_path / "a.duckdb") as run:
        with pytest.raises(IndexError):
            own(torch.tensor([[1_000]]))
        own(torch.tensor([TEXTS[0]]))
    assert run.error is None
    assert_recorded(own, tmp_path / "a.duckdb", [(TEXTS[0], 5)])


def test_what_goes_past_the_calls_is_told(tmp_path):
    own = model()
    ids = torch.tensor([TEXTS[0]])
    past = capture.recording(own, tmp_path / "a.duckdb")
    with torch.no_grad(), pytest.raises(CaptureError, match="router ran without"), past:
        own(ids)
        own.forward(ids)  # calls the decoder
        own.model.forward(ids)
        own(ids)
    assert_recorded(own, tmp_path / "a.duckdb", [(TEXTS[0], 5)] * 2)


@pytest.mark.parametrize("how", ["copy", "layers"])
def test_what_is_refused_computes_what_it_computes_without(tmp_path, how):
    own = model("mixtral")
    own.generation_config.eos_token_id = None
    ids = torch.tensor([TEXTS[0]])

    def loop():
        if how == "layers":
            return own.generate(ids, max_new_tokens=6, do_sample=False, assistant_early_exit=2)
        cache = own(ids).cache
        return own(torch.tensor([[30]]), cache=copy.deepcopy(cache)).logits

    refused = capture.recording(own, tmp_path / "a.duckdb")
    with torch.no_grad():
        expected = loop()
        with pytest.raises(CaptureError), refused as run:
            found = loop()
            assert run.error is not None
    assert torch.equal(found, expected)


def test_strict_raises_where_it_happens(tmp_path):
    own = model()
    with torch.no_grad():
        cache = own(torch.tensor([LONG])).cache
        with pytest.raises(CaptureError), capture.recording(
            own, tmp_path / "a.duckdb", strict=True
        ):  # fmt: skip
            own(torch.tensor([[3]]), cache=cache)
            raise AssertionError("not reached")
    assert not (tmp_path / "a.duckdb").exists()


def test_two_threads_at_once_are_refused(tmp_path):
    own = model()
    inside, go = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go.wait(20)

    def call():
        with torch.no_grad():
            own(torch.tensor([TEXTS[0]]))

    with pytest.raises(CaptureError, match="two threads"), capture.recording(
        own, tmp_path / "a.duckdb"
    ):  # fmt: skip
        call()
        handle = own.model.layers[1].register_forward_pre_hook(wait)
        thread = threading.Thread(target=call)
        thread.start()
        inside.wait(20)
        handle.remove()
        call()
        go.set()
        thread.join()
    assert_recorded(own, tmp_path / "a.duckdb", [(TEXTS[0], 5)])


@pytest.mark.parametrize(("option", "value"), [("level", "maps"), ("generate", 3)])
def test_what_the_loop_settles_is_no_option(tmp_path, option, value):
    of_option = capture.recording(model(), tmp_path / "a.duckdb", **{option: value})
    with pytest.raises(CaptureError, match=f"{option} must be one of|got '{option}'"), of_option:
        pass


def test_level_attention_is_what_a_capture_of_the_texts_records(tmp_path):
    """Scores, losses, router inputs and attention of somebody's call are those of a capture."""
    own = model("mixtral")
    ids, mask = padded(TEXTS)
    with torch.no_grad():
        expected = own(ids, attention_mask=mask).logits
        with capture.recording(
            own, tmp_path / "a.duckdb", level="attention", sample_tokens=6, attention_prompts=2
        ):
            assert torch.equal(own(ids, attention_mask=mask).logits, expected)
    capture.record(
        own, TEXTS, tmp_path / "b.duckdb", level="attention", sample_tokens=11, batch_tokens=15,
        progress=False,
    )  # fmt: skip
    assert check_run(tmp_path / "a.duckdb") is None
    with (
        capture.store.RunReader.open(tmp_path / "a.duckdb") as a,
        capture.store.RunReader.open(tmp_path / "b.duckdb") as b,
    ):
        for what in (
            "token_id, loss FROM tokens", "* FROM scores", "* FROM gates",
            "* FROM hidden WHERE token_id < 6", "* FROM attention_stats WHERE prompt_id < 2",
            "prompt_id, layer, head, map FROM attention_maps WHERE prompt_id < 2",
            "* FROM attention_top_keys WHERE token_id < 7",
        ):  # fmt: skip
            rows = a.query(f"SELECT {what} ORDER BY ALL").to_pylist()
            assert rows and rows == b.query(f"SELECT {what} ORDER BY ALL").to_pylist(), what
        counts = [a.query(f"SELECT count(*) AS n FROM {v}") for v in ("hidden", "attention_stats")]
        assert [one.to_pylist()[0]["n"] for one in counts] == [6 * 3, 2 * 3 * 4]


def test_losses_are_of_the_next_token_of_each_text(tmp_path):
    """By hand, by beams and in training; NULL where the prompt ends and where nothing tells."""
    own = model()
    own.generation_config.eos_token_id = None
    ids, mask = padded(TEXTS, side="left")
    with capture.recording(own, tmp_path / "a.duckdb"):
        decoded(own, torch.tensor([TEXTS[0]]), 3)
        own.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, num_beams=3, do_sample=False
        )
        own.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    own.eval()
    with capture.store.RunReader.open(tmp_path / "a.duckdb") as run:
        rows = run.query(
            "SELECT prompt_id, phase, token, loss FROM tokens ORDER BY prompt_id, position"
        ).to_pylist()
    known = []
    for number in range(7):
        text = [row for row in rows if row["prompt_id"] == number]
        with torch.no_grad():
            logits = own(torch.tensor([[row["token"] for row in text]])).logits[0]
        for row, following, scores in zip(text, text[1:], logits.log_softmax(-1), strict=False):
            if row["loss"] is not None:
                assert row["loss"] == pytest.approx(-float(scores[following["token"]]), abs=1e-4)
        known.append([row["loss"] is not None for row in text])
    own_prompts = [[True] * (len(text) - 1) + [False] for text in TEXTS]
    beams = [[False] * len(text) + [True] * 3 + [False] for text in TEXTS]
    assert known == [own_prompts[0] + [True] * 2 + [False], *beams, *own_prompts]


def test_a_block_without_a_call_leaves_no_file(tmp_path):
    of_nothing = capture.recording(model(), tmp_path / "a.duckdb")
    with pytest.raises(CaptureError, match="Nothing was recorded"), of_nothing:
        pass
    assert list(tmp_path.iterdir()) == []
