"""The program that measures reordering, at a size where it takes seconds."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

PATH = Path(__file__).parents[2] / "eval" / "measure_reordering.py"


def test_rows(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("measure_reordering", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    small = ["--frames", "9", "--size", "64", "--steps", "2", "--prompts", "1", "--densities", "0.3", "1.0"]
    monkeypatch.setattr(sys, "argv", [str(PATH), *small, "--device", "cpu", "--output", str(tmp_path / "rows.csv")])
    module.main()
    with (tmp_path / "rows.csv").open() as file:
        every = list(csv.DictReader(file))
    rows = {
        (row["method"], row["asked_density"]): row for row in every if not row["quant"] and row["method"] != "dense"
    }
    methods = {method for method, _ in rows}
    assert methods == {
        "raster, static", "reordered, static", "by mass, static", "raster, this call", "reordered, this call",
        "best order, this call",
    }  # fmt: skip
    for row in rows.values():
        assert (row["frames"], row["tokens"], row["calls"]) == ("9", "192", "16"), "8 layers, two parts of the run"
    for method in methods:
        full, sparse = rows[method, "1.0"], rows[method, "0.3"]
        assert float(full["recall"]) == pytest.approx(1)
        assert float(full["error"]) < 1e-4, "a full map in any order is dense attention"
        assert float(sparse["density"]) == pytest.approx(1 / 3, abs=1e-4)
        assert 0 < float(sparse["recall_low"]) <= float(sparse["recall"]) <= float(sparse["recall_high"]) < 1
    rounded = [row for row in every if row["quant"]]
    assert len(rounded) == 3 * (2 * 3 + 1), "three kinds of integers, two densities of three static methods, and dense"
    for row in rounded:
        if row["asked_density"] == "1.0":
            assert 0 < float(row["error"]) <= 0.03, row["quant"]
            assert float(row["cosine_worst"]) >= 0.999
    recall = {method: float(rows[method, "0.3"]["recall"]) for method in methods}
    assert recall["best order, this call"] >= max(recall["raster, this call"], recall["reordered, this call"])
    assert recall["raster, this call"] >= recall["raster, static"]
    assert "orders of the plan" in capsys.readouterr().out
