"""What a model does with each text alone, by plain hooks, and what a run file says of it."""

from typing import NamedTuple

import duckdb
import pytest
import torch

from capture.store import check_run

STORED = 2**-10  # weights have ten bits


class Told(NamedTuple):
    """One recorded text: its tokens, how many were given, and its experts by layer and token."""

    tokens: list
    given: int
    experts: dict


def alone(model, ids):
    """Return {layer: [{expert: weight} of each token]} of one text, read from its start."""
    seen = {}
    handles = []
    for number, layer in enumerate(model.model.layers):
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:
            handles.append(
                experts.register_forward_pre_hook(
                    lambda _, args, at=number: seen.__setitem__(at, (args[1], args[2]))
                )
            )
    training = model.training
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    model.train(training)
    for handle in handles:
        handle.remove()
    return {
        layer: [dict(zip(*row, strict=True)) for row in zip(i.tolist(), w.tolist(), strict=True)]
        for layer, (i, w) in seen.items()
    }


def texts(path):
    """Return the recorded texts in their order; a file that contradicts itself is refused."""
    check_run(path)
    with duckdb.connect(str(path), read_only=True) as run:
        tokens = run.sql(
            "SELECT prompt_id, position, phase, token, token_id FROM tokens"
            " ORDER BY prompt_id, position"
        ).fetchall()
        rows = run.sql("SELECT token_id, layer, expert_id, weight FROM assignments").fetchall()
        sums = run.sql("SELECT sum(assignments) FROM expert_load").fetchall()[0][0]
    assert sums == len(rows), "totals count the rows"
    chosen = {}
    for token_id, layer, expert, weight in rows:
        chosen.setdefault((token_id, layer), {})[expert] = weight
    found = {}
    for prompt, position, phase, token, token_id in tokens:
        text = found.setdefault(prompt, Told([], 0, {}))
        assert position == len(text.tokens)
        text.tokens.append(token)
        found[prompt] = text._replace(given=text.given + (phase == "prompt"))
        for (at, layer), experts in ((k, v) for k, v in chosen.items() if k[0] == token_id):
            assert at == token_id
            text.experts.setdefault(layer, []).append(experts)
    return [found[prompt] for prompt in sorted(found)]


def assert_recorded(model, path, expected):
    """Check that a run holds these texts [(tokens, how many were given)] and their routing."""
    told = texts(path)
    assert [(text.tokens, text.given) for text in told] == [(list(t), n) for t, n in expected]
    for text in told:
        for layer, tokens in alone(model, text.tokens).items():
            assert len(text.experts[layer]) == len(tokens)
            for mine, theirs in zip(text.experts[layer], tokens, strict=True):
                assert mine == pytest.approx(theirs, rel=STORED, abs=1e-4)


def padded(rows, *, side="right", pad=0):
    """Return ids [B, S] and mask [B, S] of lists of tokens."""
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    masks = [[0] * (width - len(row)) for row in rows]
    if side == "right":
        ids = [row + more for row, more in zip(rows, fill, strict=True)]
        mask = [[1] * len(row) + more for row, more in zip(rows, masks, strict=True)]
    else:
        ids = [more + row for row, more in zip(rows, fill, strict=True)]
        mask = [more + [1] * len(row) for row, more in zip(rows, masks, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)
