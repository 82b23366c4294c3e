"""The benchmark of changed scores on a small case without a GPU: its check, its rows."""

from types import SimpleNamespace

import pytest
import torch
from eval_programs import load

from videosparse.blocks import BlockMap
from videosparse.layout import TokenLayout, VideoGrid


@pytest.fixture
def bench(monkeypatch):
    module = load("bench_far")
    layout = TokenLayout(VideoGrid(6, 8, 8))
    case = SimpleNamespace(model=SimpleNamespace(head_dim=16), layout=lambda: layout)
    monkeypatch.setattr(module, "CASES", {"small": case})
    monkeypatch.setattr(module, "TRAINED", {"small": 2})
    monkeypatch.setattr(
        module, "interleave", lambda calls, rounds, _: {key: [4.0 if key == "far" else 2.0] * rounds for key in calls}
    )
    return module, layout


@pytest.mark.parametrize("attention", ["dense", "radial"])
def test_rows(bench, attention):
    module, layout = bench
    block_map = None if attention == "dense" else BlockMap.full(layout, (64, 64))
    rows = {row["scores"]: row for row in module.run("small", attention, block_map, 3, torch.device("cpu"))}
    assert float(rows["far"]["error"]) <= float(rows["far"]["allowed"])
    assert rows["far"]["over_best"] == "2.000"
    assert rows["best"]["over_best"] == rows["portable"]["over_best"] == "1.000"
    assert all(set(row) <= set(module.COLUMNS) for row in rows.values())


def test_wrong_scores_are_not_timed(bench, monkeypatch):
    module, _ = bench
    attend = module.attend
    monkeypatch.setattr(module, "attend", lambda *a, options, **k: attend(*a, **k))  # scores as they are
    rows = {row["scores"]: row for row in module.run("small", "dense", None, 3, torch.device("cpu"))}
    assert "p50_ms" not in rows["far"]
    assert "above allowed" in rows["far"]["note"]


def test_the_table_sets_calls_side_by_side():
    from videosparse.benchmark.kernel_tables import far

    times = {"best": ("10", "1.000"), "portable": ("19", "1.900"), "far": ("24.04", "2.404")}
    rows = [
        {"case": "a", "attention": "dense", "density": "1.0000", "scores": scores, "p50_ms": ms, "over_best": ratio}
        for scores, (ms, ratio) in times.items()
    ]
    assert far(rows)[1] == [["a", "dense", "1.00", "10.0 ms", "19.0 ms (1.90x)", "24.0 ms (2.40x)"]]
