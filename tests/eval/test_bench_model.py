"""The benchmark of whole transformers: tiny runs on a CPU, and how it extrapolates."""

import csv
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from videosparse.cases import MODELS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("bench_model", ROOT / "eval" / "bench_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def row(**more):
    return {"layers": 10, "forward_s": 1.0, "step_s": 2.0, "search_s": "", **more}


def test_a_whole_run_is_worked_out_by_the_schedule(program):
    spec = MODELS["wan2.1-14b"]
    contenders = {contender.name: contender for contender in program.contenders()}
    seconds = {"dense": 3.0}
    # 40 layers are four times the ten that were timed, and a step has two branches
    dense = program.whole_run(contenders["dense"], row(forward_s=3.0), seconds, spec)
    assert dense["run_s"] == 50 * 2 * 4 * 3.0
    radial = program.whole_run(contenders["radial"], row(), seconds, spec)
    assert (radial["dense_steps"], radial["run_s"]) == (12, 2 * 4 * (12 * 3.0 + 38 * 1.0))
    assert radial["speedup_step"] == 3.0
    adaspa = program.whole_run(contenders["adaspa"], row(search_s=5.0), seconds, spec)
    assert (adaspa["dense_steps"], adaspa["run_s"]) == (10, 2 * 4 * (10 * 3.0 + 2.0 + 40 * 1.0))
    assert "50 steps and 40 layers" in adaspa["run_is"]
    alone = program.whole_run(contenders["radial"], row(), {}, spec)
    assert (alone["run_s"], alone["speedup_step"]) == ("", "")


def test_a_tiny_run(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(program.MODELS, "wan2.1-1.3b", dataclasses.replace(program.MODELS["wan2.1-1.3b"], ffn=64))
    size = ["--layers", "1", "--frames", "5", "--height", "32", "--width", "32"]
    monkeypatch.setattr(
        sys, "argv",
        ["x", "--model", "wan2.1-1.3b", *size, "--only", "stock", "dense", "--output", str(tmp_path / "models.csv")],
    )  # fmt: skip
    program.main()
    assert "2 rows in" in capsys.readouterr().out
    with (tmp_path / "models.csv").open() as file:
        stock, dense = csv.DictReader(file)
    assert (stock["contender"], dense["contender"]) == ("stock", "dense")
    assert float(dense["difference"]) < 0.02  # bfloat16
    assert float(dense["run_s"]) == pytest.approx(50 * 2 * 30 * float(dense["forward_s"]))
    assert stock["tokens"] == "8"
