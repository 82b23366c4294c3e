"""The program that judges methods on real calls, at tiny sizes: what it measures, and what it refuses."""

import sys
from pathlib import Path

import pytest
import torch
from eval_programs import load

pytest.importorskip("diffusers")

from videosparse.benchmark.rows import write_rows
from videosparse.layout import TokenLayout, VideoGrid

ROOT = Path(__file__).parents[2]
LAYOUT = TokenLayout(VideoGrid(4, 12, 15))


@pytest.fixture(scope="module")
def recall():
    return load("measure_recall")


@pytest.fixture(scope="module")
def rows(recall):
    """What an observer of ten steps of two layers finds, on random queries and keys."""
    observer = recall.Observer(10, [0.25, 1.0], {0.25: recall.RadialPolicy(block=(64, 64)).block_map(LAYOUT)})
    torch.manual_seed(0)
    for step in observer.watched:
        for layer in range(2):
            q, k, v = (2 * torch.randn(2, LAYOUT.length, 4, 16) for _ in range(3))
            observer.see(layer, step, q, k, v, LAYOUT)
    return list(recall.rows_of(observer, LAYOUT, 13, 10))


def test_steps_are_those_of_a_run(recall):
    for steps, search, refresh in ((50, 9, 29), (10, 1, 5), (4, 0, 2)):
        observer = recall.Observer(steps, [0.2], {})
        assert (observer.search, observer.refresh) == (search, refresh)
        assert {search, refresh} <= set(observer.watched)
    with pytest.raises(SystemExit, match="leave room for a search and a later refresh"):
        recall.Observer(1, [0.2], {})


def test_methods_are_ranked_as_they_must_be(rows):
    found = {(r["method"], r["block"], r["asked_density"]): r for r in rows if r["step"] == "all"}
    best, random = (float(found[name, "64x64", 0.25]["recall"]) for name in ("best", "random"))
    fresh, kept = (float(found[name, "64x64", 0.25]["recall"]) for name in ("adaspa, search now", "adaspa"))
    assert best >= fresh > max(kept, random) - 0.02
    assert fresh > random
    for (method, _, density), row in found.items():
        if density == 1.0:
            assert float(row["recall"]) == pytest.approx(1, abs=1e-4), method
            assert float(row["error"]) < 1e-4, method
        assert float(row["recall_low"]) <= float(row["recall"]) <= float(row["recall_high"])
    at_search = {r["method"]: r for r in rows if (r["step"], r["block"], r["asked_density"]) == ("2", "64x64", 0.25)}
    assert at_search["adaspa"]["recall"] == at_search["adaspa, search now"]["recall"]


def test_the_figure_is_drawn(recall, rows, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    plots = load("plot_recall")
    monkeypatch.setattr(plots, "DENSITY", "0.25")
    write_rows(tmp_path / "rows.csv", rows, recall.COLUMNS)
    assert plots.main(["--rows", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "recall.png")]) == 0
    assert (tmp_path / "recall.png").stat().st_size > 10_000


def test_parts_do_not_replace_the_published_rows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measure_recall", "--prompts", "1"])
    with pytest.raises(SystemExit):
        load("measure_recall").arguments()
    assert "would replace the rows of" in capsys.readouterr().err
