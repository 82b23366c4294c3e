"""The benchmark of training steps: what it extrapolates, and that it runs."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_training", ROOT / "eval" / "bench_training.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_training"] = module  # its dataclasses look here
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_training"]


def test_whole_models_are_layers_and_the_rest(bench):
    """Rest 1 s, a sparse layer 2 s, a dense one 5 s, a dual-stream one half a second more, by which one begins."""
    wan, hunyuan = bench.CASES[0], bench.CASES[2]
    one = {"radial": 3.0, "cudnn": 6.0}
    seconds = bench.whole_model(wan, one, 5.0, None)
    assert seconds("radial") == pytest.approx(1 + 40 * 2)
    assert seconds("cudnn") == pytest.approx(1 + 40 * 5)
    seconds = bench.whole_model(hunyuan, {"radial": 3.5, "cudnn": 6.5}, 5.5, 6.0)
    assert seconds("radial") == pytest.approx(1 + 20 * 2.5 + 40 * 2)
    assert seconds("cudnn") == pytest.approx(1 + 20 * 5.5 + 40 * 5)


def test_it_runs_at_tiny_shapes(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--smoke", "--output", str(tmp_path / "rows.csv"), "--commit", "x"])
    bench.main()
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["attention"] for row in rows] == ["math", "radial", "radial, sparse layers"] * 2
    assert all(float(row["extrapolated_step_s"]) != 0 for row in rows)
    assert all(0 < float(row["density"]) < 1 for row in rows if row["attention"] == "radial")
