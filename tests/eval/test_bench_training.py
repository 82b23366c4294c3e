"""The benchmark of training steps: what it extrapolates, and that it runs."""

import csv
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

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


def test_it_runs_at_tiny_shapes_and_goes_on(bench, tmp_path, monkeypatch, capsys):
    """No time for anything, then one model, then the other, then nothing is left to measure."""
    output = tmp_path / "rows.csv"
    old = {"case": "another", "frames": "81", "attention": "cudnn", "extrapolated_step_s": "7"}  # of before `gpus`
    bench.write_rows(output, [old])

    def run(*more):
        argv = ["bench", "--smoke", "--output", str(output), "--commit", "x", *more]
        monkeypatch.setattr(sys, "argv", argv)
        bench.main()
        return list(csv.DictReader(output.open())), capsys.readouterr().out.count(" GiB")

    assert run("--seconds", "-1") == ([old], 0)
    rows, made = run("--only", "wan")
    assert (len(rows), made) == (1 + 3, 3)
    assert {**rows[0], **old, "gpus": "1"} == rows[0]
    rows, made = run()
    assert made == 4, "HunyuanVideo has two kinds of blocks"
    assert [row["attention"] for row in rows[1:]] == ["math", "radial", "radial, sparse layers"] * 2
    assert all(float(row["extrapolated_step_s"]) != 0 for row in rows)
    assert all(0 < float(row["density"]) < 1 for row in rows if row["attention"] == "radial")
    again, made = run()
    assert (again, made) == (rows, 0)


def test_rows_of_several_machines_are_put_together(bench, tmp_path, monkeypatch):
    """Those of the same case and number of GPUs are replaced, all others stay."""
    output = tmp_path / "rows.csv"
    for name, gpus, seconds in (("a", 1, 5), ("b", 2, 3), ("c", 1, 4)):
        row = {"case": "x", "frames": 161, "attention": "radial", "gpus": gpus, "extrapolated_step_s": seconds}
        bench.write_rows(tmp_path / f"{name}.csv", [row], bench.COLUMNS)
    monkeypatch.setattr(
        sys, "argv", ["b", "--output", str(output), "--merge", *(str(tmp_path / f"{n}.csv") for n in "abc")]
    )
    bench.main()
    rows = list(csv.DictReader(output.open()))
    assert [(row["gpus"], row["extrapolated_step_s"]) for row in rows] == [("2", "3"), ("1", "4")]


@pytest.fixture
def measured(bench, tmp_path):
    """`measured(kernel=point, ...)`: the rows of the first HunyuanVideo case with these measurements."""
    case, state = bench.CASES[2], types.SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    base = {"one": (3.5, 0.5), "two": (5.5, 0.4), "dual": (6.0, 0.45)}

    def make(kernels=("cudnn", "fa4"), **more):
        points = bench.Points(tmp_path / "points.json", False, "x")
        for part, (seconds, loss) in base.items():
            point = {"seconds": seconds, "loss": loss, "peak": 9.0, "density": 0.2}
            points.add(bench.point_name(case, state, part), more.pop(part, point))
        for part, point in more.items():
            points.add(bench.point_name(case, state, part), point)
        found = bench.rows_of(case, points, state, types.SimpleNamespace(kernels=kernels))
        return {row["attention"]: row for row in found}

    return make


DENSE = {"seconds": 6.5, "loss": 0.5, "peak": 10.0, "density": 1.0}


def test_a_kernel_that_is_not_here_has_a_row_that_says_so(measured):
    rows = measured(cudnn=DENSE)
    assert list(rows) == ["cudnn", "radial", "radial, sparse layers", "fa4"]
    assert rows["fa4"]["note"].startswith("it needs an NVIDIA GPU")
    assert "extrapolated_step_s" not in rows["fa4"]
    assert (rows["cudnn"]["extrapolated_step_s"], rows["cudnn"]["gpus"]) == (f"{1 + 20 * 5.5 + 40 * 5:.2f}", 2)
    assert float(rows["radial, sparse layers"]["against_cudnn"]) == pytest.approx(311 / 131, abs=1e-3)
    # two dense layers, and a dense step now and then
    assert 311 / 140 < float(rows["radial"]["against_cudnn"]) < 311 / 137


def test_nothing_is_told_before_it_is_measured(measured):
    assert measured() == {}
    rows = measured(cudnn=DENSE, one={"note": "out of memory"})
    assert (list(rows), rows["radial"]["note"]) == (["radial", "fa4"], "out of memory")
    rows = measured(kernels=("cudnn", "fa2"), cudnn=DENSE, fa2={"note": "out of memory"})
    assert rows["fa2"]["note"] == "out of memory"
    assert "against_fa2" not in rows["radial"]


def test_losses_that_differ_are_refused(measured):
    with pytest.raises(RuntimeError, match=r"fa2: loss 0.52, expected 0.5"):
        measured(kernels=("cudnn", "fa2"), cudnn=DENSE, fa2={**DENSE, "loss": 0.52})
    with pytest.raises(RuntimeError, match="one: loss nan"):
        measured(cudnn=DENSE, one={**DENSE, "loss": float("nan")})


def test_measurements_of_other_code_are_made_again(bench, tmp_path):
    points = bench.Points(tmp_path / "points.json", True, "x")
    points.add("a", DENSE)
    assert "a" in bench.Points(tmp_path / "points.json", True, "x")
    assert "a" not in bench.Points(tmp_path / "points.json", True, "y")
