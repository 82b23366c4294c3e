"""The program that measures what calibrations cost, at tiny sizes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from videosparse.benchmark.rows import read_rows
from videosparse.cases import Case, ModelSpec

PATH = Path(__file__).parents[2] / "eval" / "bench_calibration.py"
CPU = torch.device("cpu")
SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32,
    "rope_max_seq_len": 64,
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_calibration", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_large_model_is_extrapolated_from_a_few_layers(bench):
    model = ModelSpec("small", "wan", "wan2.1", layers=6, heads=2, head_dim=12, stride=(4, 8))
    pipe = bench.random_pipeline(2, CPU, torch.float32, **SMALL)
    rows = {row["part"]: row for row in bench.extrapolated(Case(model, 9, 128, 128), 2, CPU, pipe)}
    dense, looked, again = (rows[name] for name in list(rows)[:3])
    assert (dense["times"], looked["times"], again["times"]) == (200 - 24, 24, 24)
    assert float(looked["seconds"]) > 0
    assert float(dense["seconds"]) > 0
    total = sum(float(row["total_s"]) for name, row in rows.items() if name != "all" and row["total_s"])
    assert float(rows["all"]["total_s"]) == pytest.approx(total, abs=0.2)
    assert 0 < float(rows["all"]["plan_mb"]) < 0.02
    assert not pipe.transformer._forward_pre_hooks


def test_the_embedded_model_is_calibrated(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "FRAMES", (5,))
    monkeypatch.setattr(bench, "PROMPTS", bench.PROMPTS[:1])
    output = tmp_path / "rows.csv"
    assert bench.main(["--only", "embedded", "--steps", "2", "--device", "cpu", "--output", str(output)]) == 0
    (row,) = read_rows(output, bench.COLUMNS)
    assert (row["case"], row["kind"], row["maps"], row["layers"]) == ("tiny-wan 128x128x5", "measured", "2", "8")
    assert float(row["total_s"]) > 0
    assert "tiny-wan 128x128x5" in capsys.readouterr().out


def test_parts_do_not_replace_the_published_rows(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "embedded"])
    assert "would replace the rows of" in capsys.readouterr().err
