"""The benchmark of whole transformers: tiny runs on a CPU, and how few layers tell of all."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from eval_programs import load

from videosparse.benchmark import block_clock, step_contenders, stepping, transformer
from videosparse.benchmark.rows import RowFile
from videosparse.benchmark.step_contenders import STEP_CONTENDERS, bound
from videosparse.benchmark.stepping import classes, difference, step
from videosparse.benchmark.whole import BlockTimes, case_of, whole_forward, whole_run
from videosparse.cases import MODELS
from videosparse.components import is_compiled
from videosparse.policies.base import DenseSchedule

ROOT = Path(__file__).parents[2]
TINY = {name: dataclasses.replace(MODELS[name], heads=2, ffn=64) for name in ("wan2.1-1.3b", "hunyuan-video", "mochi")}


@pytest.fixture(scope="module")
def program():
    return load("bench_model")


@pytest.fixture
def tiny(monkeypatch):
    """Every model with two heads."""
    for name, spec in TINY.items():
        monkeypatch.setitem(MODELS, name, spec)


def run(program, tmp_path, *more, only, case="wan2.1-1.3b 32x32x5", layers=2):
    path = tmp_path / "models.csv"
    assert program.main(["--case", case, "--layers", str(layers), "--only", *only, "--output", str(path), *more]) == 0
    with path.open() as file:
        return {row["contender"]: row for row in csv.DictReader(file)}


def test_a_tiny_run_resumes(program, tiny, tmp_path, capsys):
    only = ["stock", "dense-eager", "radial-eager", "fa2", "stack"]
    rows = run(program, tmp_path, only=only)
    assert set(rows) == set(only)
    stock, dense, radial = (rows[name] for name in only[:3])
    assert float(dense["difference"]) < 0.02
    assert dense["difference_from"] == "stock"
    assert "FlashAttention" not in rows["fa2"]["backend"]
    assert rows["fa2"]["note"].startswith("not here: it needs an NVIDIA GPU")
    assert rows["stack"]["note"].startswith("not here: linears=fp8")
    assert stock["blocks"].startswith("WanTransformerBlock dense")
    assert "sparse" in radial["blocks"]
    assert "dense" in radial["blocks"]  # Radial leaves the first layer dense
    assert radial["dense_steps"] == "12"
    for row in (stock, dense):
        assert float(row["run_s"]) == pytest.approx(100 * float(row["forward_s"]), rel=1e-3)
    dense_s, sparse_s = float(dense["forward_s"]), float(radial["forward_s"])
    assert float(radial["run_s"]) == pytest.approx(2 * (12 * dense_s + 38 * sparse_s), rel=1e-3)
    assert "dense-eager" in radial["run_is"]
    capsys.readouterr()
    again = run(program, tmp_path, "--resume", only=only)
    assert capsys.readouterr().out.startswith("0 rows")
    assert again == rows


def test_rows_of_another_machine_are_added(program, tmp_path, capsys):
    here, there = tmp_path / "models.csv", tmp_path / "other.csv"
    key = {"case": "x", "layers_timed": "3", "gpu": "H200", "commit": "a"}
    RowFile(here, program.COLUMNS, program.KEY).add({**key, "contender": "stock", "forward_s": "1"})
    RowFile(there, program.COLUMNS, program.KEY).add({**key, "contender": "stock", "forward_s": "2"})
    RowFile(there, program.COLUMNS, program.KEY).add({**key, "contender": "dense", "forward_s": "3"})
    assert program.main(["--merge", str(there), "--output", str(here)]) == 0
    assert "2 rows added" in capsys.readouterr().out
    with here.open() as file:
        assert [(r["contender"], r["forward_s"]) for r in csv.DictReader(file)] == [("stock", "2"), ("dense", "3")]
    with pytest.raises(SystemExit):
        program.main(["--merge", str(tmp_path / "none.csv")])
    assert "none.csv cannot be read" in capsys.readouterr().err


def test_what_is_written_survives_what_fails(program, tiny, tmp_path, monkeypatch, capsys):
    def fail(model, contender, *rest):
        if contender.name == "stock":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return step(model, contender, *rest)

    monkeypatch.setattr(program, "step", fail)
    rows = run(program, tmp_path, only=["stock", "dense-eager"])
    assert rows["stock"]["note"] == "out of memory"
    assert rows["stock"]["forward_s"] == ""
    assert rows["dense-eager"]["forward_s"]
    assert "no figure: wan2.1-1.3b 32x32x5, stock" in capsys.readouterr().out


def test_time_that_is_over_is_told(program, tiny, tmp_path, monkeypatch, capsys):
    def slow(model, contender, *rest):
        if contender.name == "dense-eager":
            while True:
                pass
        return step(model, contender, *rest)

    monkeypatch.setattr(program, "step", slow)
    rows = run(program, tmp_path, "--seconds", "6", only=["stock", "dense-eager", "radial-eager"])
    assert set(rows) == {"stock"}
    told = capsys.readouterr().out
    assert "left out, 6 s are over: wan2.1-1.3b 32x32x5, dense-eager" in told
    assert "left out, 6 s are over: wan2.1-1.3b 32x32x5, radial-eager" in told


def test_dense_outputs_that_differ_are_no_figure(program, tiny, tmp_path, monkeypatch):
    def wrong(model, contender, *rest):
        found = step(model, contender, *rest)
        found.out = found.out * (1.0 if contender.name == "stock" else 1.1)
        return found

    monkeypatch.setattr(program, "step", wrong)
    rows = run(program, tmp_path, only=["stock", "dense-eager"])
    assert "0.100 from that of stock" in rows["dense-eager"]["note"]
    assert rows["dense-eager"]["forward_s"] == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--case", "wan2.1-14b 720x1280"], "MODEL HEIGHTxWIDTHxFRAMES"),
        (["--case", "wan2.1-14b 720x1280x80"], "num_frames must be 4k+1"),
        (["--case", "wan2.1-14b 64x64x5", "--layers", "41"], "--layers must be 2 to 40"),
    ],
)
def test_mistakes_are_one_line(program, arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("wan2.1-1.3b 32x32x5", ["WanTransformerBlock"] * 3),
        ("hunyuan-video 32x32x5", ["HunyuanVideoTransformerBlock"] + ["HunyuanVideoSingleTransformerBlock"] * 2),
        ("mochi 32x32x7", ["MochiTransformerBlock"] * 2 + ["MochiTransformerBlock last"]),
    ],
)
def test_every_family_is_timed_block_by_block(tiny, case, kinds):
    case = case_of(case)
    device = torch.device("cpu")
    model = transformer.build(case.model, 3, device)
    assert {transformer.kind_of(b) for b in transformer.blocks_of(model)} == set(transformer.kinds_of(case.model))
    assert len(transformer.kinds_of(case.model)) == case.model.layers
    inputs = transformer.make_inputs(case, device)
    outs = []
    for name in ("stock", "dense-eager", "radial-eager"):
        contender = STEP_CONTENDERS[name]
        with bound(model, contender, ""):
            found = step(model, contender, inputs, inputs)
        assert [kind for kind, _ in found.times.classes] == kinds
        modes = [mode for _, mode in found.times.classes]
        first = "dense" if case.model.family == "wan" else "sparse"
        assert modes == ([first, "sparse", "sparse"] if contender.sparse else ["dense"] * 3)
        assert all(len(blocks) == 3 and min(blocks) > 0 for blocks in found.times.blocks)
        assert 0 < found.times.rest < found.times.forward
        outs.append(found.out)
    torch.testing.assert_close(outs[1], outs[0], rtol=0.05, atol=0.05)
    assert all(not is_compiled(block) for block in transformer.blocks_of(model))


def test_a_method_that_searches_is_timed_searching_and_sparse(tiny):
    case = case_of("wan2.1-1.3b 32x32x5")
    model = transformer.build(case.model, 2, torch.device("cpu"))
    inputs = transformer.make_inputs(case, torch.device("cpu"))
    contender = dataclasses.replace(STEP_CONTENDERS["adaspa"], compiled=False)
    with bound(model, contender, ""):
        found = step(model, contender, inputs, inputs)
    assert {mode for _, mode in found.times.classes} == {"sparse"}
    assert {mode for _, mode in found.search.classes} == {"search"}
    dense = STEP_CONTENDERS["dense-eager"]
    with bound(model, dense, ""):
        expected = step(model, dense, inputs, inputs)
    # one block holds all of this video, so nothing is left out, whatever number of forwards came before
    assert found.density == 1
    assert difference(found.out, expected.out) < 0.01


def test_outputs_compare_whatever_number_of_forwards_was_timed(tiny, monkeypatch):
    case = case_of("wan2.1-1.3b 32x32x5")
    model = transformer.build(case.model, 2, torch.device("cpu"))
    inputs = transformer.make_inputs(case, torch.device("cpu"))
    outs = []
    for most in (1, 3):
        monkeypatch.setattr(stepping, "MOST_TIMED", most)
        with bound(model, STEP_CONTENDERS["dense-eager"], ""):
            found = step(model, STEP_CONTENDERS["dense-eager"], inputs, inputs)
        assert len(found.times.forwards) == most
        outs.append(found.out)
    assert torch.equal(*outs)


def test_compiled_blocks_keep_their_stamps_and_are_undone(tiny):
    case = case_of("wan2.1-1.3b 32x32x5")
    model = transformer.build(case.model, 2, torch.device("cpu"))
    inputs = transformer.make_inputs(case, torch.device("cpu"))
    eager, compiled = STEP_CONTENDERS["radial-eager"], STEP_CONTENDERS["radial"]
    with bound(model, eager, ""):
        expected = step(model, eager, inputs, inputs).out
    with bound(model, compiled, "", backend="eager"):
        found = step(model, compiled, inputs, inputs)
        assert classes(model, compiled) == found.times.classes
        assert all(is_compiled(block) for block in model.blocks)
    torch.testing.assert_close(found.out, expected, rtol=0.05, atol=0.05)
    assert min(min(blocks) for blocks in found.times.blocks) > 0
    assert not any(is_compiled(module) for module in model.modules())


def test_a_step_that_the_cache_skips_calls_one_block(tiny):
    case = case_of("wan2.1-1.3b 32x32x5")
    model = transformer.build(case.model, 3, torch.device("cpu"))
    inputs = transformer.make_inputs(case, torch.device("cpu"))
    contender = dataclasses.replace(STEP_CONTENDERS["cached"], linears="none")
    calls = []
    handles = [block.ffn.register_forward_hook(lambda *_: calls.append(1)) for block in model.blocks]
    with bound(model, contender, "", backend="eager"):
        step(model, dataclasses.replace(contender, compiled=False), inputs, inputs)
        before = len(calls)
        assert before == 3 + 3  # a first step of three blocks, then three of one
    for handle in handles:
        handle.remove()
    assert not model.is_cache_enabled
    assert all("forward" not in vars(block) for block in model.blocks)


def test_the_clock_counts_what_blocks_take(monkeypatch):
    times = iter([0.0, 2.0, 2.0, 5.0, 10.0, 11.0, 11.0, 13.0])
    blocks = [torch.nn.Identity(), torch.nn.Identity()]
    monkeypatch.setattr(block_clock.time, "perf_counter", lambda: next(times))
    clock = block_clock.BlockClock(blocks, torch.device("cpu"))
    with clock:
        for block in blocks * 2:
            block(torch.zeros(1))
    assert clock.seconds() == [3.0, 5.0]
    with clock:
        pass
    assert clock.seconds() == [0.0, 0.0]
    assert blocks[0](3) == 3


def test_few_blocks_tell_the_whole():
    dual, single = "HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"
    times = BlockTimes([(dual, "dense"), (single, "dense"), (single, "dense")])
    times.add(12.0, [4.0, 3.0, 3.0])
    times.add(13.0, [5.0, 3.0, 4.0])
    times.add(10.0, [3.0, 2.0, 3.0])
    assert times.forward == 12.0
    assert times.rest == 2.0
    assert times.by_class() == {(dual, "dense"): 4.0, (single, "dense"): 3.0}
    spec = MODELS["hunyuan-video"]
    assert whole_forward(times.rest, times.by_class(), spec, "dense") == 2.0 + 20 * 4.0 + 40 * 3.0
    with pytest.raises(ValueError, match="No sparse HunyuanVideoTransformerBlock was timed"):
        whole_forward(times.rest, times.by_class(), spec, "sparse")
    wan = {("WanTransformerBlock", "dense"): 5.0, ("WanTransformerBlock", "sparse"): 1.0}
    schedule = DenseSchedule(first_layers=1, last_layers=2)
    assert whole_forward(0.5, wan, MODELS["wan2.1-14b"], "sparse", schedule) == 0.5 + 3 * 5.0 + 37 * 1.0


def test_runs_are_worked_out_by_the_schedule():
    assert whole_run(50, 50, 2, 3.0, 0.0) == 300.0
    assert whole_run(50, 12, 2, 3.0, 1.0) == 2 * (12 * 3.0 + 38 * 1.0)
    assert whole_run(50, 10, 1, 3.0, 1.0, search=5.0) == 9 * 3.0 + 5.0 + 40 * 1.0


def test_rows_of_one_key_replace_each_other(tmp_path):
    rows = RowFile(tmp_path / "rows.csv", ("name", "value", "commit"), ("name", "commit"))
    assert rows.rows() == []
    rows.add({"name": "a", "value": 1, "commit": "x"})
    rows.add({"name": "b", "value": 2, "commit": "x"})
    RowFile(tmp_path / "rows.csv", ("name", "value", "commit"), ("name", "commit")).add(
        {"name": "a", "value": 3, "commit": "x"}
    )
    rows.add({"name": "a", "value": 4, "commit": "y"})
    assert [(r["name"], r["value"], r["commit"]) for r in rows.rows()] == [
        ("b", "2", "x"), ("a", "3", "x"), ("a", "4", "y"),
    ]  # fmt: skip
    assert rows.find(name="a", commit="x")["value"] == "3"
    assert rows.find(name="c") is None
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv"}


def test_the_best_kernel_is_of_the_gpu(program):
    assert step_contenders.fastest_kernel(case_of("wan2.1-14b 64x64x5"), torch.device("cpu")) == ""


def row(case, contender, forward, layers=3, commit="abc", run="2026-11-22T12:00:00Z", note="", **more):
    columns = {"search_s": "", "run_s": "60", "peak_gb": "9", "density": "0.3", "backend": "ours", **more}
    return {
        "case": case, "contender": contender, "forward_s": forward, "step_s": str(2 * float(forward or 0)),
        "layers_timed": str(layers), "layers": "40", "gpu": "H200", "commit": commit, "run": run, "note": note,
        **columns,
    }  # fmt: skip


CASE = "wan2.1-14b 720x1280x81"


def test_goals_compare_with_the_fastest_dense_of_the_same_commit():
    goals = load("check_model_goals")
    rows = [
        row(CASE, "stock", "12"), row(CASE, "dense", "10"), row(CASE, "fa2", "22"), row(CASE, "radial", "4.8"),
        row(CASE, "stack", "", note="not here: torchao"), row(CASE, "dense", "1", commit="old"),
        row(CASE, "dense", "2", layers=40),
    ]  # fmt: skip
    table = {(line["case"], line["goal"]): line for line in goals.check(rows)}
    found = table[CASE, "Radial against the fastest dense"]
    assert (found["measured"], found["verdict"], found["must"]) == ("2.08", "must only", ">= 2")
    assert table[CASE, "Radial against FlashAttention-2"]["measured"] == "4.58"
    assert table[CASE, "Radial against FlashAttention-2"]["verdict"] == ""
    stack = table[CASE, "Radial, integers and FP8 linears against the fastest dense"]
    assert stack["verdict"] == "not measured"
    assert f'--case "{CASE}"' in stack["command"]


def test_strict_fails_until_all_musts_are_met(tmp_path, capsys):
    goals = load("check_model_goals")
    rows = [
        row(case, name, str(forward))
        for case in goals.BOUNDS
        for name, forward in (("dense", 100), ("radial", 10), ("stack", 5))
    ]
    path, out = tmp_path / "rows.csv", tmp_path / "goals.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    arguments = ["--rows", str(path), "--output", str(out), "--strict"]
    assert goals.main(arguments) == 0
    assert "10.00x" in capsys.readouterr().out
    path.write_text(path.read_text().replace(",100,", ",30,"))
    assert goals.main(arguments) == 1


def test_tables_name_what_is_missing():
    from videosparse.benchmark.step_tables import every_row, extrapolation, missing, newest, overview
    from videosparse.benchmark.whole import STEP_CASES

    rows = [
        row(CASE, "dense", "10"), row(CASE, "radial", "5"), row(CASE, "stack", "", note="out of memory"),
        row(CASE, "dense", "11", layers=40), row(CASE, "radial", "4", commit="old", run="2026-11-21T12:00:00Z"),
    ]  # fmt: skip
    assert newest(rows, CASE)["dense"]["layers_timed"] == "40"
    assert newest(rows, CASE)["radial"]["forward_s"] == "5"
    assert (
        newest([*rows, row(CASE, "radial", "3", gpu="H100", run="2026-11-20T12:00:00Z")], CASE)["radial"]["gpu"]
        == "H200"
    )
    failed = [*rows, row(CASE, "dense", "", layers=50, note="out of memory")]
    assert newest(failed, CASE)["dense"]["forward_s"] == "11"
    head, lines = overview(rows)
    first = dict(zip(head, lines[0], strict=True))
    assert first["fastest dense, s"] == "22.00"
    assert (first["Radial, s (gain)"], first["all, s (gain)"]) == ("10.00 (2.20x)", "out of memory")
    assert len(lines) == 1
    assert missing(rows).startswith("Not measured yet: ")
    assert CASE not in missing(rows)
    assert all(case in missing(rows) for case in STEP_CASES if case != CASE)
    told = [line for line in every_row(rows)[1] if line[0] == CASE]
    assert [line[1] for line in told if line[4] == "out of memory"] == ["stack"]
    assert all(len(line) == len(every_row(rows)[0]) for line in every_row(rows)[1])
    assert extrapolation(rows)[1] == [[CASE, "dense", "11.000", "10.000", "3", "-9.1 %"]]
    eager = [row(CASE, "dense-eager", "12", commit="eager"), row(CASE, "radial-eager", "6", commit="eager")]
    gains = {line[1]: line[6] for line in every_row([*rows, *eager])[1] if line[0] == CASE}
    assert gains["radial"] == "2.00x"
    assert gains["dense-eager"] == gains["radial-eager"] == "", "no gain over layers that are not compiled"
