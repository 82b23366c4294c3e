"""The program that measures the errors of integer attention, at a size where it takes seconds."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

PATH = Path(__file__).parents[2] / "eval" / "measure_integers.py"


@pytest.fixture
def program(monkeypatch):
    spec = importlib.util.spec_from_file_location("measure_integers", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_rows(program, tmp_path, capsys):
    output = tmp_path / "rows.csv"
    small = ["--frames", "5", "--size", "64", "--steps", "2", "--tokens", "200", "--device", "cpu"]
    assert program.main([*small, "--output", str(output)]) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (2 * 8 + 1), "three kinds of integers; eight inputs of two head_dims, and the model"
    real = [row for row in rows if row["inputs"] == "the embedded model, 5 frames"]
    assert {(row["tokens"], row["head_dim"], row["calls"]) for row in real} == {("128", "64", "16")}, (
        "8 layers, 2 branches"
    )
    for row in rows:
        assert 0 < float(row["error"]) <= float(row["error_worst"]) < 0.06, row
        assert row["quant"] == "int8-fp8" or float(row["error"]) <= 0.03, row
    assert "the embedded model, 5 frames" in capsys.readouterr().out


def test_rows_of_the_kernels_are_not_replaced_by_those_of_torch(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--device", "cpu"])
    assert "errors without a GPU are not those of the kernels" in capsys.readouterr().err
