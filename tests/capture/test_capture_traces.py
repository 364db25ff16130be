"""Traces of other programs: every format against the rows it was made from, and the traps."""

import base64
import io
import json
from types import SimpleNamespace

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from capture.__main__ import main
from capture.demo import WEIGHTS
from capture.errors import StoreError, TraceError
from capture.traces import import_routing
from capture.traces.sequences import is_choice, top_k_of
from explorer.run import open_run

pytestmark = pytest.mark.slow

EXPERTS, TOP_K, LAYERS = 12, 3, 4


def routing(random, n_tokens, layers=LAYERS):
    """Draw ids [T, L, K] in no order of weight, and weights that do not sum to 1."""
    ids = np.argsort(random.random((n_tokens, layers, EXPERTS)), axis=-1)[..., :TOP_K]
    return ids.astype(np.int32), random.random((n_tokens, layers, TOP_K), np.float32) / 4


def stored(path):
    """Read a run file with plain DuckDB: {(prompt, position, layer): {expert: weight}}."""
    with duckdb.connect(str(path), read_only=True) as connection:
        rows = connection.execute(
            "SELECT prompt_id, position, layer, expert_id, weight, slot FROM assignments"
            " JOIN tokens USING (token_id) ORDER BY ALL"
        ).fetchall()
    found = {}
    for prompt, position, layer, expert, weight, _ in sorted(rows, key=lambda row: row[-1]):
        found.setdefault((prompt, position, layer), {})[expert] = weight
    return found


def expected(sequences, layers=None):
    """The same of ids and weights, a sequence each."""
    found = {}
    for number, (ids, weights, *first) in enumerate(sequences):
        for token, at in np.ndindex(*ids.shape[:2]):
            key = (number, token + (first[0] if first else 0), layers[at] if layers else at)
            values = weights[token, at] if weights is not None else [None] * ids.shape[2]
            found[key] = {
                int(expert): weight for expert, weight in zip(ids[token, at], values, strict=True)
            }
    return found


def same(path, sequences, layers=None):
    found, wanted = stored(path), expected(sequences, layers)
    assert found.keys() == wanted.keys()
    for key, experts in wanted.items():
        assert found[key].keys() == experts.keys(), key
        for expert, weight in experts.items():
            if weight is None:
                assert found[key][expert] is None
            else:
                assert found[key][expert] == pytest.approx(weight, rel=2**-10)
        if None not in experts.values():  # slots fall by weight
            assert list(found[key].values()) == sorted(found[key].values(), reverse=True)


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.duckdb"


# --- engines --------------------------------------------------------------------------------------


def npy64(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_responses_of_vllm(random, out, tmp_path):
    first, second = (routing(random, n)[0] for n in (7, 4))
    first[:, 0] = second[:, 0] = 0  # a dense layer reads as zeros
    lines = [
        {"model": "some/moe", "choices": [{"index": 0, "routed_experts": npy64(first.astype("u1")),
         "prompt_token_ids": [5, 6, 7, 8, 9], "token_ids": [1, 2, 3], "text": "so"}]},
        # two tokens of a cached prefix have no rows
        {"usage": {"prompt_tokens": 5, "completion_tokens": 2},
         "choices": [{"index": 0, "routed_experts": npy64(second.astype("u1"))}]},
    ]  # fmt: skip
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    made = import_routing(path, out, n_experts=EXPERTS)
    same(out, [(first[:, 1:], None), (second[:, 1:], None, 2)], [1, 2, 3])
    assert (made.format, made.layers, made.weighted) == ("vLLM responses", 3, False)
    # the last token of the first request, and of the second its prefix and its last
    assert (made.rows, made.tokens, made.missing) == (11, 8 + 6, (1 + 2) * 3)
    with open_run(out) as run:
        assert run.info["model"] == "some/moe"
        tokens = run.query("SELECT position, phase, token FROM tokens WHERE prompt_id = 0")
        assert tokens["token"].tolist() == [5, 6, 7, 8, 9, 1, 2, 3]
        assert tokens["phase"].tolist() == ["prompt"] * 5 + ["generated"] * 3
        assert run.query("SELECT count(*) AS n FROM tokens WHERE token IS NULL")["n"][0] == 6
        assert run.query("SELECT count(weight_sum) AS n FROM expert_load")["n"][0] == 0
        assert run.notes["import"]["slots_by_weight"] is False


def test_outputs_of_vllm_in_memory(random, out):
    ids = routing(random, 6)[0]
    now = SimpleNamespace(prompt="Hello", prompt_token_ids=[3, 4, 5], outputs=[
        SimpleNamespace(index=0, token_ids=[1, 2, 3, 4], routed_experts=ids)])  # fmt: skip
    older = SimpleNamespace(prompt="Hi", prompt_token_ids=[3, 4], prompt_routed_experts=ids[:2],
        outputs=[SimpleNamespace(index=0, token_ids=[1, 2], routed_experts=ids[2:3])])  # fmt: skip
    made = import_routing([now, older], out)
    same(out, [(ids, None), (ids[:3], None)])
    assert made.tokens == 7 + 4
    with pytest.raises(TraceError, match="enable_return_routed_experts=True"):
        import_routing(
            [SimpleNamespace(outputs=[SimpleNamespace(index=0)])], out.with_name("b.duckdb")
        )


def sglang(ids, n_prompt):
    flat = np.ascontiguousarray(ids, "<i4").tobytes()
    about = {"prompt_tokens": n_prompt, "completion_tokens": len(ids) + 1 - n_prompt}
    return {"text": "so", "meta_info": about | {"routed_experts": base64.b64encode(flat).decode()}}


def test_responses_of_sglang(random, out, tmp_path):
    sequences = [routing(random, n)[0] for n in (60, 80)]
    for ids in sequences:
        ids[:, 0] = 0
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(json.dumps(sglang(ids, 40)) for ids in sequences))
    made = import_routing(path, out)
    same(out, [(ids[:, 1:], None) for ids in sequences], [1, 2, 3])
    assert made.top_k == TOP_K  # found out: no expert stands twice in a group
    short = tmp_path / "short.json"
    short.write_text(json.dumps(sglang(sequences[0][:2], 1)))
    with pytest.raises(TraceError, match="--top-k"):
        import_routing(short, tmp_path / "short.duckdb")
    assert import_routing(short, tmp_path / "short.duckdb", top_k=3).rows == 2


# --- training and logs ----------------------------------------------------------------------------


def test_router_traces_of_megatron(random, out, tmp_path):
    steps = [np.sort(routing(random, 5)[0], axis=-1) for _ in range(3)]
    for rank in (0, 1):  # ranks of a tensor-parallel group hold the same tokens
        lines = [
            {"step": step, "stage": at // 2, "block": 0, "layer": at, "rank": rank,
             "num_tokens": 5, "topk": TOP_K, "top_indices": ids[:, at].tolist()}
            for step, ids in enumerate(steps) for at in range(LAYERS)
        ]  # fmt: skip
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = sorted(tmp_path.glob("*.jsonl"))
    made = import_routing(files, out)
    same(out, [(ids, None) for ids in steps])
    assert (made.sequences, made.format) == (3, "Megatron router trace")


def token_log(path, sequences, warm_up=0):
    lines = [{"type": "meta", "model_id": "some/moe", "top_k": TOP_K, "num_experts": EXPERTS}]
    for _ in range(warm_up):  # profiling: one token again and again under the first request
        lines += [{"type": "route", "req_id": "r0", "token_idx": 0, "layer": layer,
                   "topk_ids": [0, 1, 2], "topk_weights": [0.3, 0.2, 0.1]}
                  for layer in range(LAYERS)]  # fmt: skip
    # requests are decoded together: their lines alternate
    for token in range(max(len(ids) for ids, _ in sequences)):
        for number, (ids, weights) in enumerate(sequences):
            if token < len(ids):
                lines += [{"type": "route", "req_id": f"r{number}", "token_idx": token,
                           "layer": layer, "topk_ids": ids[token, layer].tolist(),
                           "topk_weights": weights[token, layer].tolist()}
                          for layer in range(LAYERS)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))


def test_a_log_of_tokens_and_its_warm_up(random, out, tmp_path):
    sequences = [routing(random, n) for n in (9, 5)]
    path = tmp_path / "log.jsonl"
    token_log(path, sequences, warm_up=200)
    made = import_routing(path, out)
    same(out, sequences)
    assert (made.warm_up, made.rows) == (200, 214)
    with open_run(out) as run:
        note = run.notes["import"]
    assert note["warm_up"] == 200 and note["weight_sum"] == pytest.approx(3 / 8, abs=0.05)
    kept = import_routing(path, tmp_path / "kept.duckdb", keep_warm_up=True)
    assert (kept.warm_up, kept.tokens) == (0, 214)


def test_lines_of_moe_policylang(random, out, tmp_path):
    ids, weights = routing(random, 6)
    lines = [{"policy": "x", "version": 1}] + [
        {"p": token, "t": token, "l": layer, "e": ids[token, layer].tolist(),
         "s": weights[token, layer].tolist()}
        for token in range(6) for layer in range(LAYERS)
    ]  # fmt: skip
    path = tmp_path / "policy.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert import_routing(path, out).format == "moe-policylang log"
    same(out, [(ids, weights)])


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_tables_of_choices(random, out, tmp_path, kind):
    sequences = [routing(random, n) for n in (6, 3)]
    rows = pd.DataFrame([
        {"prompt_id": number, "token_idx": token, "layer": 2 * layer + 1, "slot": slot,
         "expert_id": ids[token, layer, slot], "weight": weights[token, layer, slot]}
        for number, (ids, weights) in enumerate(sequences)
        for token, layer, slot in np.ndindex(*ids.shape)
    ]).sample(frac=1, random_state=0)  # fmt: skip
    rows = rows.sort_values("prompt_id", kind="stable")
    path = tmp_path / f"choices.{kind}"
    if kind == "csv":
        rows.to_csv(path, index=False)
    elif kind == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=True)
    made = import_routing(path, out)
    same(out, sequences, [1, 3, 5, 7])
    assert made.weighted and made.missing == 0


# --- arrays and published files -------------------------------------------------------------------


def test_an_npz_of_one_prompt_without_its_pickle(random, out, tmp_path):
    ids, weights = routing(random, 6)
    path = tmp_path / "trace.npz"
    np.savez(path, scores=random.random((6, LAYERS, EXPERTS)), topk_indices=ids,
             topk_weights=weights, token_ids=np.arange(7), moe_layer_indices=[1, 3, 6, 8],
             text=np.array(["a", None], object))  # fmt: skip
    made = import_routing(path, out)
    same(out, [(ids, weights)], [1, 3, 6, 8])
    assert (made.n_experts, made.tokens, made.missing) == (EXPERTS, 7, LAYERS)
    with open_run(out) as run:
        assert run.notes["import"]["not_readable"] == ["text"]


def test_rollouts_whose_padding_is_zeros(random, out):
    batch = np.zeros((2, 9, LAYERS, TOP_K), np.int16)
    first, second = (routing(random, n)[0] for n in (5, 6))
    batch[0, 4:] = first  # padded at the left
    batch[1, :6] = second  # and at the right
    batch[1, 2] = 0  # a row that is missing in the middle
    made = import_routing(batch, out)
    found = stored(out)
    assert (made.sequences, made.tokens, made.missing) == (2, 11, LAYERS)
    assert (1, 2, 0) not in found and len(found) == 10 * LAYERS
    second = np.delete(second, 2, 0)
    assert set(found[1, 3, 0]) == set(second[2, 0].tolist())
    assert set(found[0, 0, 0]) == set(first[0, 0].tolist())


def test_rollouts_of_slime_whose_padding_is_fake_experts(random, out, tmp_path):
    """Its samples come with their tokens; ``arange % E`` at the end is no choice."""
    real = [routing(random, n)[0] for n in (11, 7)]
    fakes = np.arange(5 * LAYERS * TOP_K).reshape(5, LAYERS, TOP_K) % EXPERTS
    samples = [
        {"tokens": list(range(40, 40 + len(ids) + 1)), "response_length": 4}
        | {"rollout_routed_experts": torch.tensor(np.concatenate([ids, fakes]))}
        for ids in real
    ]
    samples[1]["tokens"] += [0] * 5  # tokens are padded, too
    torch.save({"rollout_id": 3, "samples": samples}, tmp_path / "rollout.pt")
    made = import_routing(tmp_path / "rollout.pt", out)
    same(out, [(ids, None) for ids in real])
    assert (made.format, made.sequences, made.tokens) == ("slime rollouts", 2, 12 + 13)
    other = tmp_path / "other.duckdb"
    padded = np.stack([np.concatenate([one, fakes[: 12 - len(one)]]) for one in real])
    import_routing(padded, other)
    same(other, [(ids, None) for ids in real])


def test_esft_files(random, out, tmp_path):
    folder = tmp_path / "scores"
    folder.mkdir()
    texts = [routing(random, n, layers=2) for n in (70, 30)]
    for at, layer in enumerate((1, 13)):
        lines = [
            "\t".join(map(str, ids[:, at].ravel())) + "\t\t"
            + "\t".join(f"{w:.9f}" for w in weights[:, at].ravel())
            for ids, weights in texts
        ]  # fmt: skip
        (folder / f"expert_weights_{layer}.txt").write_text("\n".join(lines))
    made = import_routing(folder, out)
    same(out, texts, [1, 13])
    assert (made.top_k, made.sequences) == (TOP_K, 2)


# --- traps and refusals ---------------------------------------------------------------------------


def test_what_is_a_choice_and_how_many_experts_a_token_has(random):
    assert is_choice(np.array([[0, 0], [0, 1], [-1, -1], [2, -1]])).tolist() == [
        *(False, True, False, True),
    ]
    ids = routing(random, 300)[0]
    assert top_k_of(ids.ravel()) == TOP_K
    assert top_k_of(ids.ravel(), LAYERS * TOP_K) == TOP_K
    with pytest.raises(TraceError, match="--top-k"):
        top_k_of(ids[:3].ravel())


def refused(source, out, **more):
    with pytest.raises((TraceError, StoreError)) as caught:
        import_routing(source, out, **more)
    assert not list(out.parent.glob("run.duckdb*"))
    return str(caught.value)


def test_what_cannot_be_read_is_refused_and_leaves_nothing(random, out, tmp_path):
    ids = routing(random, 6)[0]
    assert "physical ids" in refused(ids, out, n_experts=5)
    assert "[tokens, layers, top k]" in refused(ids[0], out)
    assert "no choice of experts" in refused(np.zeros((4, 2, 2), int), out)
    assert "one model" in refused([ids, ids[:, :2]], out)
    assert "ids are 0 or more" in refused(ids - 2 * (ids == 0), out)
    assert "The source is empty" in refused([], out)
    assert "no such file" in refused(tmp_path / "gone.jsonl", out)
    files = {
        "count.json": ('{"logical_count": [[1, 2]]}', "Say it with --top-k"),
        "other.json": ('{"a": 1}', "of no trace that is known"),
        "plain.txt": ("hello", "is no trace that is known"),
        "bad.jsonl": ('{"choices": []}\n{"choices"', "line 2 is not JSON"),
        "empty.jsonl": ('{"choices": [{"index": 0}]}', "--enable-return-routed-experts"),
        "wrong.jsonl": ('{"choices": [{"routed_experts": "AAAA"}]}', "base64 of a .npy file"),
        "lacks.jsonl": ('{"top_indices": [[0, 1]], "step": 0}', "a record lacks the key 'stage'"),
        "rows.csv": ("token,layer,expert\n0,0,\n", "without a token, a layer or experts"),
        "text.csv": ("token,layer,expert\n0,x,1\n", "could not be read"),
        "twice.csv": ("token,layer,expert\n" + "0,0,1\n0,0,2\n" * 2, "names an expert twice"),
        "part.csv": ("token,layer,expert,weight\n0,0,1,-2\n", "from 0 to 512"),
    }
    for name, (text, said) in files.items():
        (tmp_path / name).write_text(text)
        assert said in refused(tmp_path / name, out), name
    with (tmp_path / "pickled.npy").open("wb") as file:
        np.save(file, np.array([{}], object), allow_pickle=True)
    assert "could not be read" in refused(tmp_path / "pickled.npy", out)


def test_an_existing_run_is_kept(random, out):
    out.write_text("mine")
    with pytest.raises(StoreError, match="exists"):
        import_routing(routing(random, 3)[0], out)
    assert out.read_text() == "mine"


def test_the_command(random, out, tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    token_log(path, [routing(random, 5)])
    assert main(["import", str(path), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: per-token log, 5 tokens of 1 sequences, 4 layers, 3 of 12")
    assert main(["import", str(path), "--out", str(out)]) == 2
    assert main(["import", str(path), "--format", "x", "--out", str(tmp_path / "a.duckdb")]) == 2
    assert "The format must be one of vllm, sglang" in capsys.readouterr().err


def test_a_tokenizer_gives_ids_their_text(random, out, tmp_path):
    text = "The court held that the contract was void.\n"
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    tokens = tokenizer(text)["input_ids"]
    ids = routing(random, len(tokens) - 1)[0]
    np.savez(tmp_path / "trace.npz", topk_indices=ids, token_ids=tokens)
    import_routing(tmp_path / "trace.npz", out, tokenizer=WEIGHTS)
    with duckdb.connect(str(out), read_only=True) as connection:
        pieces = connection.sql("SELECT text FROM tokens ORDER BY position").fetchall()
        assert connection.sql("SELECT text FROM prompts").fetchall() == [(text,)]
    assert "".join(piece for (piece,) in pieces) == text and len(pieces) == len(tokens)
    other = tmp_path / "other" / "run.duckdb"
    other.parent.mkdir()
    assert "carries no ids of tokens" in refused(ids, other, tokenizer=tokenizer)
    np.savez(tmp_path / "trace.npz", topk_indices=ids, token_ids=np.array(tokens) + 10**6)
    assert "the tokenizer knows" in refused(tmp_path / "trace.npz", other, tokenizer=tokenizer)
    assert "No tokenizer could be read" in refused(ids, other, tokenizer=tmp_path)
