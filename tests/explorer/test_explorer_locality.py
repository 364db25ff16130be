"""Repetition of experts from a token to the next: by hand, against chance, and from a run file."""

import numpy as np
import pytest
from synthetic import write_run

from explorer.metrics.agreement import chance_any_repeat
from explorer.metrics.coactivation import repetition
from explorer.run import open_run
from explorer.survey.locality import locality, main


def test_by_hand():
    #           a        a        a       | b        b        b
    ids = [[0, 1], [0, 2], [2, 0], [2, 0], [2, 3], [-1, -1]]
    found = repetition(np.array(ids), np.array([7, 7, 7, 8, 8, 8]))
    # pairs: 01-02, 02-20, 20-23, 23-none; the texts' border is none of them
    assert found.pairs == 4
    assert found.first == 2 / 4  # 0-0 and 2-2
    assert found.any == 3 / 4
    # heaviest of the later tokens: 0, 2, 2
    assert found.first_chance == pytest.approx((1 / 3) ** 2 + (2 / 3) ** 2)


def test_independent_tokens_repeat_by_chance():
    """With Mixtral's 8 experts, 2 a token: 12.5% and 46.4%, the paper's own anchors."""
    random = np.random.default_rng(0)
    ids = random.random((40_000, 8)).argsort(axis=1)[:, :2]
    found = repetition(ids, np.zeros(len(ids), np.int64))
    for value in (found.first, found.first_chance):
        assert value == pytest.approx(0.125, abs=0.006)
    assert chance_any_repeat(8, 2) == pytest.approx(0.464, abs=5e-4)
    for value in (found.any, found.any_chance):
        assert value == pytest.approx(0.464, abs=0.01)


def test_unequal_loads_raise_chance_and_what_sticks_exceeds_it():
    random = np.random.default_rng(1)
    ids = random.choice(4, p=[0.7, 0.1, 0.1, 0.1], size=(30_000, 1))
    uneven = repetition(ids, np.zeros(len(ids), np.int64))
    assert uneven.first_chance == pytest.approx(0.52, abs=0.01)
    assert uneven.first == pytest.approx(uneven.first_chance, abs=0.01)
    assert uneven.any_chance == pytest.approx(uneven.first_chance, abs=0.02)  # one expert a token
    sticky = repetition(np.repeat(ids, 2, axis=0), np.zeros(2 * len(ids), np.int64))
    assert sticky.first == pytest.approx((1 + 0.52) / 2, abs=0.01)
    assert sticky.first_chance == pytest.approx(0.52, abs=0.01)


def test_no_pair_is_no_number():
    alone = repetition(np.array([[0], [0]]), np.array([1, 2]))
    assert alone.pairs == 0 and np.isnan(alone.first) and np.isnan(alone.any_chance)


def test_the_table_of_a_run_is_what_its_rows_say(tmp_path, capsys):
    path = write_run(tmp_path / "a.duckdb").path
    with open_run(path) as run:
        table = locality(run)
        rows = run.query(
            "SELECT prompt_id, position, layer, site, slot, expert_id, domain FROM assignments "
            "JOIN tokens USING (token_id) JOIN prompts USING (prompt_id) WHERE phase = 'prompt'"
        )
        lengths = run.query(
            "SELECT prompt_id, domain, count(*) AS n FROM tokens JOIN prompts USING (prompt_id) "
            "WHERE phase = 'prompt' GROUP BY ALL"
        )
    assert len(table) == 3 * (1 + lengths["domain"].nunique())
    for found in table.itertuples():
        here = lengths[lengths["domain"] == found.domain] if found.domain else lengths
        assert found.pairs == (here["n"] - 1).sum()
        part = rows[(rows["layer"] == found.layer) & (rows["site"] == found.site)]
        chosen = {k: set(v["expert_id"]) for k, v in part.groupby(["prompt_id", "position"])}
        first = {
            (row.prompt_id, row.position): row.expert_id
            for row in part[part["slot"] == 0].itertuples()
        }
        same = common = 0
        for text in here.itertuples():
            for at in range(1, text.n):
                now, then = (text.prompt_id, at), (text.prompt_id, at - 1)
                same += now in first and first[now] == first.get(then)
                common += bool(chosen.get(now, set()) & chosen.get(then, set()))
        assert found.first == pytest.approx(same / found.pairs)
        assert found.any == pytest.approx(common / found.pairs)
    assert set(table["first_even"]) == {1 / 6, 1 / 4}
    assert main([str(path)]) == 0
    assert "first_chance" in capsys.readouterr().out
    assert main([str(tmp_path / "none.duckdb")]) == 2
    assert "none.duckdb" in capsys.readouterr().err
    (tmp_path / "broken.duckdb").write_bytes(b"this is not a database" * 100)
    assert main([str(tmp_path / "broken.duckdb")]) == 2
    assert "broken.duckdb" in capsys.readouterr().err
