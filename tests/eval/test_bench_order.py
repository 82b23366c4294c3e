"""The benchmark of token orders on a small case without a GPU: its checks, its sum, its rows."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from videosparse.layout import TokenLayout, VideoGrid


@pytest.fixture
def bench(monkeypatch):
    path = Path(__file__).parents[2] / "eval/bench_order.py"
    spec = importlib.util.spec_from_file_location("bench_order", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_order", module)
    spec.loader.exec_module(module)

    def small(family, text):
        model = SimpleNamespace(heads=6, head_dim=16, family=family)
        return SimpleNamespace(model=model, layout=lambda: TokenLayout(VideoGrid(3, 9, 10), text))

    monkeypatch.setattr(module, "CASES", {"wan": small("wan", 0), "joint": small("hunyuan_video", 20)})
    return module


@pytest.mark.parametrize("name", ["wan", "joint"])
def test_rows(bench, monkeypatch, name):
    milliseconds = {
        ("norm", "raster"): 1.0, ("norm", "ordered"): 1.5, ("values", "ordered"): 0.5, ("values", "raster"): 0.25,
        ("attention", "raster"): 10.0, ("attention", "ordered"): 10.25,
    }  # fmt: skip
    times = lambda calls, rounds: {key: [milliseconds.get(key, 3.0)] * rounds for key in calls}  # noqa: E731
    monkeypatch.setattr(bench, "shuffled", times)
    with torch.no_grad():
        rows = {(r["part"], r["form"]): r for r in bench.run(name, 0.5, 3, torch.device("cpu"))}
    assert not any("note" in row for row in rows.values())
    assert rows["norm", "ordered"]["error"] == rows["attention", "ordered"]["error"] == "0"
    assert rows["sum", "ordered"]["percent"] == {"wan": "12.50", "joint": "10.00"}[name]
    assert all(set(row) <= set(bench.COLUMNS) for row in rows.values())
    assert "% of attention" in bench.line(rows["sum", "ordered"])


def test_other_bits_are_not_timed(bench, monkeypatch):
    monkeypatch.setattr(bench, "shuffled", lambda calls, rounds: {key: [1.0] * rounds for key in calls})
    monkeypatch.setattr(bench, "reorder", lambda x, *a, **k: x)
    with torch.no_grad():
        rows = {(r["part"], r["form"]): r for r in bench.run("wan", 0.5, 3, torch.device("cpu"))}
    assert rows["values", "ordered"] | {"note": "not the same bits: not timed"} == rows["values", "ordered"]
    assert "p50_ms" not in rows["values", "ordered"]
    assert rows["sum", "ordered"]["note"] == "a part is missing"
