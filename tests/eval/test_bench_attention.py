"""The attention benchmark without a GPU: maps, checks, rows, goals and figures at tiny sizes."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_programs import load

pytest.importorskip("diffusers")

from videosparse.benchmark import checks, contenders, gauge, kernel_tables, problems, timing
from videosparse.benchmark.problems import Entry, Inputs, Workload
from videosparse.benchmark.rows import write_rows
from videosparse.kernels import KernelOptions, attend, block_sums
from videosparse.layout import TokenLayout, VideoGrid

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TORCH = KernelOptions(backend="torch")
TINY = Workload("tiny", TokenLayout(VideoGrid(2, 12, 15)), heads=2, head_dim=16, share="per head")
TEXT = Workload("tiny text", TokenLayout(VideoGrid(2, 12, 15), 40), heads=2, head_dim=16)
BLOCK = (64, 64)
STEADY = {
    "steady_ms": "2", "steady_p20_ms": "1", "steady_p80_ms": "3", "stretches": "5", "sm_mhz": "4", "watts": "6",
    "joules": "7",
}  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    return load("bench_attention")


@pytest.fixture(scope="module")
def goals():
    return load("check_goals")


def problem(workload, policy, density=0.4, dtype=torch.float32, block=BLOCK):
    return Inputs(workload, CPU, dtype, seed=3).of(Entry("ours", policy, density, block))


@pytest.mark.parametrize("policy", ["uniform", "two dense rows", "u^2"])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.25, 0.5])
def test_maps_of_one_density_have_the_same_total(policy, density):
    for rows, columns in ((240, 240), (591, 1182)):
        counts = problems.counts_of_rows(policy, rows, columns, density, torch.Generator().manual_seed(1))
        assert abs(int(counts.sum()) / (density * rows * columns) - 1) < 0.02
        assert int(counts.min()) >= 1
        assert int(counts.max()) <= columns
    if policy == "two dense rows":
        assert int((counts == columns).sum()) == 2


def test_every_kind_of_map_can_be_made():
    for policy in ("dense", "full", "uniform", "two dense rows", "u^2"):
        for workload in (TINY, TEXT):
            found = problem(workload, policy)
            assert found.q.shape[1] == found.layout.length
            assert policy in ("dense", "full") or found.block_map.keep.shape[1] == (2 if workload is TINY else 1)
            if workload is TEXT and policy != "dense":
                assert found.layout.text_start == 384
                assert found.block_map.keep[..., 6:].all()
                assert found.k[:, 360:384].isnan().all()
    radial = Workload("wan2.1-1.3b 480x832x81", TokenLayout(VideoGrid(21, 30, 52)), 12)
    assert 0 < problems.make_map(radial, Entry("ours", "radial"), CPU, 0).density < 1


@pytest.mark.parametrize("workload", [TINY, TEXT], ids=["video", "text"])
@pytest.mark.parametrize("policy", ["dense", "uniform"])
def test_forward_check_passes_right_outputs_and_no_others(workload, policy):
    p = problem(workload, policy)
    out = attend(*p.qkv, layout=p.layout, index=p.index, options=TORCH)
    error, allowed = checks.check_forward(p, out)
    assert error <= allowed
    error, allowed = checks.check_forward(p, out * 1.001)
    assert not error <= allowed


@pytest.mark.parametrize("quant", contenders.INTEGERS)
@pytest.mark.parametrize("policy", ["dense", "uniform"])
def test_integers_are_checked_by_bounds_of_their_own(quant, policy):
    inputs = Inputs(replace(TINY, head_dim=64), CPU, torch.bfloat16, seed=3)
    p = inputs.of(Entry(quant, policy, 0.4, BLOCK))
    out = attend(*p.qkv, layout=p.layout, index=p.index, options=KernelOptions(quant=quant))
    error, allowed = checks.check_integers(p, out)
    assert 0.003 < error <= allowed
    error, allowed = checks.check_integers(p, out * 1.06)
    assert not error <= allowed
    assert not checks.check_integers(p, out.flip(1))[0] <= allowed


def test_sums_check():
    p = problem(TINY, "dense")
    _, lse = attend(*p.qkv, layout=p.layout, return_lse=True)
    sums = block_sums(p.q, p.k, lse, layout=p.layout, block=BLOCK, options=TORCH)
    error, allowed = checks.check_sums(p, sums)
    assert error <= allowed
    error, allowed = checks.check_sums(p, sums * 1.001)
    assert not error <= allowed


def test_backward_check():
    p = problem(TINY, "uniform")
    leaves = [x.clone().requires_grad_() for x in p.qkv]
    grad = torch.randn_like(p.q)
    grads = torch.autograd.grad(attend(*leaves, layout=p.layout, index=p.index, options=TORCH), leaves, grad)
    error, allowed = checks.check_backward(p, grads, grad)
    assert error <= allowed
    error, allowed = checks.check_backward(p, (grads[0], grads[1] * 1.001, grads[2]), grad)
    assert not error <= allowed


def test_peers_without_a_gpu_are_named_as_missing():
    p = problem(TINY, "dense", dtype=torch.bfloat16)
    for name in ("fa3", "fa4", "cudnn", "fa2", "flex"):
        with pytest.raises(contenders.Missing, match=r"NVIDIA GPU|needs a GPU|head_dim"):
            contenders.CONTENDERS[name](p)
    for name in contenders.QUANTIZE:
        with pytest.raises(contenders.Missing, match="it needs CUDA or ROCm tensors"):
            contenders.CONTENDERS[name](p)
    with pytest.raises(contenders.Missing, match="reads no block lists"):
        contenders.CONTENDERS["cudnn"](problem(TINY, "uniform"))


def test_every_set_names_kernels_that_exist_and_can_be_selected(bench, capsys):
    names = [s.name for s in bench.sets()]
    assert len(set(names)) == len(names)
    for bench_set in bench.sets():
        assert {e.kernel for e in bench_set.entries} <= set(contenders.CONTENDERS)
        assert len(set(bench_set.entries)) == len(bench_set.entries)
    assert bench.main(["--list", "--only", "^backward"]) == 0
    assert capsys.readouterr().out.split("\n") == [
        "backward 12x30720 128x128",
        "backward wan2.1-14b 720x1280x81 128x128",
        "",
    ]


def test_every_goal_is_timed_at_the_size_that_it_is_about(bench, goals):
    """Of a run of all sets, each goal finds a row of its first case; maps and lists in blocks of the default."""
    rows = [
        timed(
            s.name, e.kernel, 1.0, case=s.workload.name, policy=e.policy, density=f"{e.density:.4f}",
            block="x".join(map(str, e.block)), steady_ms="1.0", stretches="2", **{"pass": s.what},
        )
        for s in bench.sets() for e in s.entries
    ]  # fmt: skip
    found = {line["goal"]: line for line in goals.check(rows)}
    assert {name: line.get("case") for name, line in found.items()} == {g.title: g.cases[0] for g in goals.goals()}
    assert {g.cases[0] for g in goals.goals()} == {goals.LARGE, goals.LONGEST, "40x75600 d64"}
    assert found["map and lists built, ms"]["detail"] == "30,720 tokens in blocks of 128x64, the default"


def test_equal_rows_are_compared_in_the_set_that_they_are_about(bench):
    """FlashAttention-4 on equal rows is in one set of 128x128 at that size, else the newest name would decide."""
    name = "wan2.1-14b 720x1280x81"
    there = [s for s in bench.sets() if s.what == "forward" and s.workload.name == name]
    assert [s.label for s in there if Entry("fa4", "uniform", 0.1) in s.entries] == ["128x128"]


def test_tensors_of_every_set_fit_a_gpu(bench):
    """q, k, v, and for gradients also what each contestant keeps: output and its gradient."""
    for s in bench.sets():
        tensor = 2 * s.workload.layout.length * s.workload.heads * s.workload.head_dim
        kept = 2 * len(s.entries) if s.what.endswith("backward") else 0
        assert tensor * (3 + kept) < 40e9, s.name


def test_without_a_gpu_it_says_so(bench, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_quantiles_and_columns():
    assert timing.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)
    columns = timing.timed_columns([2.0, 2.0, 2.0], 1e12, 1000.0)
    assert (columns["tflops"], columns["percent_of_ceiling"], columns["rounds"]) == ("500.0", "50.0", "3")


class Event:
    """A CUDA event on a clock of its own."""

    now = 0.0

    def record(self):
        self.at = Event.now

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(timing, "_event", Event)
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)


def spend(milliseconds):
    Event.now += milliseconds


def test_calls_take_turns_and_slow_ones_run_thrice(no_gpu):
    times = timing.interleave({"fast": lambda: spend(2), "slow": lambda: spend(5000)}, rounds=6, seconds=60)
    assert times == {"fast": [2.0] * 6, "slow": [5000.0] * 3}
    times = timing.interleave({"fast": lambda: spend(2)}, rounds=100, seconds=0)
    assert len(times["fast"]) == timing.FEWEST_ROUNDS


def test_the_same_work_comes_ahead_of_every_call(no_gpu):
    """Also in the round that warms up, and it is not timed."""
    ran = []

    def call(name, milliseconds):
        return lambda: (ran.append(name), spend(milliseconds))

    calls = {"fast": call("fast", 2), "other": call("other", 3)}
    times = timing.interleave(calls, rounds=5, seconds=60, before=call("heat", 15))
    assert times == {"fast": [2.0] * 5, "other": [3.0] * 5}
    assert ran[::2] == ["heat"] * 12
    assert sorted(ran[1::2]) == ["fast"] * 6 + ["other"] * 6


def test_clocks_need_what_reads_them(bench, monkeypatch, tmp_path, capsys):
    def absent():
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gauge, "_EnergyCounter", absent)
    with pytest.raises(SystemExit):
        bench.main(["--clocks", "1", "--output", str(tmp_path / "rows.csv")])
    assert "pip install nvidia-ml-py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--clocks", "nan"])
    assert "--clocks must be seconds, 0 for none (got nan)" in capsys.readouterr().err


def test_a_set_becomes_rows(bench, no_gpu, monkeypatch, tmp_path):
    """Right kernels are timed; a wrong, a failing and a missing one get a row that says so."""

    def ours(p):
        return lambda: attend(*p.qkv, layout=p.layout, index=p.index, options=TORCH)

    def failing(p):
        return lambda: 1 / 0

    made = {"ours": ours, "fa2": failing, "fa3": contenders.CONTENDERS["fa3"], "portable": lambda p: lambda: p.q}
    monkeypatch.setattr(bench, "CONTENDERS", made)
    monkeypatch.setattr(bench, "CEILING", 8)
    monkeypatch.setattr(bench, "DEVICE", CPU)
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    monkeypatch.setattr(
        bench, "interleave", lambda calls, rounds, seconds, before: before() or {key: [1.0, 2.0, 3.0] for key in calls}
    )
    entries = [Entry("ours"), *(Entry(k, "uniform", 0.4, BLOCK) for k in ("ours", "fa2", "portable")), Entry("fa3")]

    def steady(calls, seconds, stretches):
        """In another order, and with a time by which each call's columns are known."""
        assert (seconds, stretches) == (0.5, 2)
        return {c: STEADY | {"steady_ms": c.row["density"]} for c in reversed(list(calls))}

    monkeypatch.setattr(bench, "steady_columns", steady)
    tiny = bench.BenchSet("forward", "64x64", TINY, tuple(entries))
    assert "steady_ms" not in str(bench.run_set(tiny, rounds=3, seconds=1))
    rows = bench.run_set(tiny, rounds=3, seconds=1, clocks=0.5, stretches=2)
    assert set(STEADY) == set(gauge.COLUMNS)
    assert [set(STEADY) <= set(row) for row in rows] == ["p50_ms" in row for row in rows]
    steady_rows = [row for row in rows if "steady_ms" in row]
    assert [row["steady_ms"] for row in steady_rows] == [row["density"] for row in steady_rows]
    assert len({row["density"] for row in steady_rows}) == 2
    assert bench._line(steady_rows[0]).endswith("repeated 1.0000 ms (1..3) at 4 MHz, 6 W")
    assert [row["note"].split(":")[0] for row in rows if "note" in row] == ["failed", "error above allowed", "missing"]
    assert [row["p50_ms"] for row in rows if "p50_ms" in row] == ["2.0000", "2.0000"]
    where = {"run": "now", "gpu": "none", "commit": "c"}
    write_rows(tmp_path / "rows.csv", [row | where for row in rows], bench.COLUMNS)
    again = bench.read(tmp_path / "rows.csv")
    assert len(again) == len(rows)
    assert set(again[0]) == set(bench.COLUMNS)
    assert again[0]["set"] == "forward tiny 64x64"


def timed(set_name, kernel, ms, **columns):
    """A row as the benchmark writes it."""
    row = {
        "set": set_name, "case": "12x30720", "tokens": "30720", "heads": "12", "head_dim": "128", "pass": "forward",
        "kernel": kernel, "policy": "dense", "block": "", "density": "1.0000", "p50_ms": f"{ms}", "extra_mb": "0",
        "lists_mb": "0", "run": "2", "gpu": "H200", "commit": "c",
    }  # fmt: skip
    return row | columns


def test_goals_compare_rows_of_the_newest_run(goals):
    full = {"policy": "full", "block": "128x128"}
    rows = [
        timed("a", "cudnn", 12.0),
        timed("a", "fa3", 10.0),
        timed("a", "ours", 10.5, **full),
        timed("a", "ours", 1.0, run="1", **full),
        timed("b", "ours", 2.0, **full),
    ]
    table = {line["goal"]: line for line in goals.check(rows)}
    line = table["full map against the fastest dense kernel"]
    assert (line["measured"], line["verdict"], line["case"]) == ("0.952", "must only", "12x30720")
    assert "fa3 10.00 ms" in line["detail"]
    assert table["backward, dense, against cuDNN"]["verdict"] == "not measured"


def test_goals_know_which_way_is_better(goals):
    skew = {"policy": "two dense rows", "block": "128x128", "density": "0.1010"}
    even = {"policy": "uniform", "block": "128x128", "density": "0.1000"}
    rows = [timed("a", "ours", 1.03, **skew), timed("a", "ours", 1.0, **even), timed("a", "fa4", 1.2, **even)]
    rows += [timed("s", "ours", 10.0, policy="dense", **{"pass": "sums"})]
    rows += [timed("s", "block_sums", 4.9, block="128x128", **{"pass": "sums"})]
    rows += [timed("i", "index", 4.0, block="128x128", **{"pass": "index", "case": goals.LONGEST})]
    found = {line["goal"]: (line["verdict"], line.get("measured")) for line in goals.check(rows)}
    assert found["two dense rows: time over uniform rows"] == ("must only", "1.030")
    assert found["density 0.1 against FlashAttention-4 block-sparse"] == ("pass", "1.200")
    assert found["block_sums: time over own dense forward"] == ("pass", "0.490")
    assert found["map and lists built, ms"] == ("pass", "4.000")
    built = next(line["detail"] for line in goals.check(rows) if line["goal"] == "map and lists built, ms")
    assert built == "30,720 tokens in blocks of 128x128; not timed with the default, 128x64"
    assert found["u^2: time over uniform rows"] == ("not measured", None)


def test_goals_of_integers_are_against_own_bf16_beside_them(goals, tmp_path, capsys):
    """Both where calls repeat and behind products; the first is not measured by rows of fewer than two stretches."""
    even = {"policy": "uniform", "block": "128x128", "density": "0.2510"}
    calls = (("ours", 5.0, "6"), ("int8", 4.0, "5"), ("int8-fp8", 3.9, "4"))
    rows = [timed("i", kernel, ms, steady_ms=steady, stretches="2", **even) for kernel, ms, steady in calls]
    arguments = ["--rows", str(tmp_path / "attention.csv"), "--output", str(tmp_path / "goals.csv")]

    def found(of):
        write_rows(tmp_path / "attention.csv", [timed("a", "cudnn", 12.0, steady_ms="", stretches=""), *of])
        assert goals.main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.split()[:3] for line in lines if "quantization included" in line]

    assert found(rows) == [
        ["pass", "1.200", "x"], ["pass", "1.250", "x"], ["pass", "1.500", "x"], ["must", "only", "1.282"]
    ]  # fmt: skip
    for lacking in ({"steady_ms": ""}, {"stretches": ""}, {"stretches": "1"}):
        assert found([row | lacking for row in rows])[::2] == [["not", "measured", "-"]] * 2
    older = [row | {"run": "1", "steady_ms": "1"} for row in rows]
    single = [row | {"stretches": "1"} for row in rows]
    assert found([*older, *single])[::2] == [["miss", "1.000", "x"]] * 2, "of the newest run that has both"


def test_the_fastest_row_is_so_by_the_column_that_is_compared(goals):
    """And a row that has no time there is none."""
    rows = [
        timed("a", "cudnn", 10.0, steady_ms="14", stretches="5"),
        timed("a", "fa3", 11.0, steady_ms="12", stretches="5"),
        timed("a", "fa4", 9.0, steady_ms="8", stretches=""),
    ]
    assert goals.pick(rows, goals.FASTEST)["kernel"] == "fa4"
    assert goals.pick(rows, goals.FASTEST, "steady_ms")["kernel"] == "fa3"
    assert goals.pick(rows[2:], goals.FASTEST, "steady_ms") is None
    repeated = goals.compare("forward", goals.chosen("cudnn"), goals.chosen(goals.FASTEST), column="steady_ms")
    found = repeated(goals.Runs(rows), "12x30720")
    assert (found.value, found.detail) == (pytest.approx(14 / 12), "fa3 12.00 ms against cudnn 14.00 ms")


def test_goals_are_written_and_can_fail(goals, tmp_path, capsys):
    rows, output = tmp_path / "rows.csv", tmp_path / "goals.csv"
    line = timed("a", "cudnn", 12.0)
    with rows.open("w", newline="") as file:
        writer = csv.DictWriter(file, line)
        writer.writeheader()
        writer.writerow(line)
    assert goals.main(["--rows", str(rows), "--output", str(output)]) == 0
    assert goals.main(["--rows", str(rows), "--output", str(output), "--strict"]) == 1
    with output.open(newline="") as file:
        assert {row["verdict"] for row in csv.DictReader(file)} == {"not measured"}
    assert "not measured" in capsys.readouterr().out


def test_committed_goals_are_those_of_the_committed_rows(goals, tmp_path):
    assert goals.main(["--output", str(tmp_path / "goals.csv")]) == 0
    committed = (ROOT / "assets/results/attention_goals.csv").read_text()
    assert (tmp_path / "goals.csv").read_text() == committed, "run python eval/check_goals.py"


def test_tables_of_the_page_are_made_from_rows(bench, goals, tmp_path, monkeypatch):
    tables = load("readme_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.made("attention") == tables.made("goals") == tables.made("backward") == "Not measured yet."
    where = "forward 12x30720 128x128"
    rows = [
        timed(where, "cudnn", 12.0, tflops="600.4"),
        timed(where, "ours", 1.0, tflops="640.5", policy="uniform", density="0.1000"),
        timed(where, "ours", 1.0, tflops="1.0", policy="uniform", density="0.1000", run="1"),
    ]
    write_rows(tmp_path / "attention.csv", rows, bench.COLUMNS)
    assert "| videosparse | - | - | - | - | 640 | - |" in tables.made("attention")
    assert "| cuDNN | 600 | - |" in tables.made("attention")
    goals.main(["--rows", str(tmp_path / "attention.csv"), "--output", str(tmp_path / "attention_goals.csv")])
    assert "| not measured |" in tables.made("goals")


def test_backward_is_a_line_for_each_pass_and_kernel():
    what = {"pass": "backward", "extra_mb": "8.2"}
    sparse = {"policy": "uniform", "block": "128x128", "density": "0.0998", **what}
    rows = [
        timed("backward 12x30720 128x128", "ours", 28.0, **what),
        timed("backward 12x30720 128x128", "ours", 3.5, **sparse | {"extra_mb": "1192.6"}),
        timed("backward 12x30720 128x128", "ours", 1.0, **sparse | {"run": "1"}),
        timed("backward 12x30720 128x128", "fa4", 2.75, **sparse),
        timed("backward 12x30720 128x128", "fa2", "", **what),
        timed("forward 12x30720 128x128", "fa4", 9.0),
    ]
    head, lines = kernel_tables.backward(rows)
    assert head[3:] == ["dense, ms", "density 0.1, ms", "memory beside"]
    assert lines == [
        ["12x30720", "backward", "videosparse", "28.00", "3.50", "1,193 MB"],
        ["12x30720", "backward", "FlashAttention-4", "-", "2.75", "8 MB"],
    ]


def test_figures_are_drawn(bench, tmp_path):
    pytest.importorskip("matplotlib")
    plots = load("plot_attention")
    where = {"tflops": "600", "ceiling_tflops": "750", "dtype": "bfloat16"}
    rows = [timed("forward 12x30720 128x128", "cudnn", 12.0, **where)]
    rows += [timed("forward 12x30720 128x128", "ours", 1.0, policy="uniform", density=d, **where) for d in ("0.1", "1")]
    write_rows(tmp_path / "rows.csv", rows, bench.COLUMNS)
    assert plots.main(["--rows", str(tmp_path / "rows.csv"), "--figures", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"attention_density.png"}


def test_rows_that_cannot_be_used_are_one_line_and_nothing_is_written(goals, tmp_path, capsys):
    empty, other, output = tmp_path / "empty.csv", tmp_path / "other.csv", tmp_path / "goals.csv"
    empty.write_text("set,case,kernel,p50_ms,run\n")
    other.write_text("a,b\n1,2\n")
    for rows, said in ((empty, "has no rows"), (other, "has no column set"), (tmp_path / "no.csv", "cannot be read")):
        with pytest.raises(SystemExit):
            goals.main(["--rows", str(rows), "--output", str(output)])
        assert said in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "["], "must be a regular expression"),
        (["--only", "no such set"], "matches no set"),
        (["--rounds", "0"], "--rounds must be at least 1 (got 0)"),
        (["--stretches", "0"], "--stretches must be at least 1 (got 0)"),
        (["--only", "skew"], "would lose its other rows"),
        (["--kernels", "ours"], "would lose its other rows"),
        (["--kernels", "no such kernel"], "matches no kernel"),
        (["--set-seconds", "nan"], "--set-seconds must be a positive number"),
        (["--seconds", "-1"], "--seconds must be a positive number"),
    ],
)
def test_arguments_of_the_benchmark_are_checked_first(bench, arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert error.count("error:") == 1


def test_the_benchmark_learns_first_whether_its_rows_can_be_kept(bench, tmp_path, monkeypatch, capsys):
    """Not after half an hour of a GPU; and a set that fails shows in the exit code."""
    timed = []

    def one_row(found, *_):
        timed.append(found.name)
        if "64x64" in found.name:
            raise RuntimeError("out of memory")
        return [{"set": found.name, "kernel": "ours", "p50_ms": len(timed)}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench, "environment", lambda commit: {"commit": "1"})
    monkeypatch.setattr(bench, "run_set", one_row)
    other = tmp_path / "other.csv"
    other.write_text("set,kernel,p50_ms,step_s\na,b,1,2\n")
    for arguments, said in (
        (["--append", "--output", str(other)], "has a column step_s"),
        (["--output", str(other / "rows.csv")], "is not a folder"),
    ):
        with pytest.raises(ValueError, match=said):
            bench.main(["--only", "sums", *arguments])
    assert not timed
    output = tmp_path / "rows.csv"
    assert bench.main(["--only", "sums", "--output", str(output)]) == 1
    assert len(bench.read(output)) == len(timed) - 1 == 2
    assert "Failed: sums 12x30720 64x64" in capsys.readouterr().err
    kept = {row["set"]: row["p50_ms"] for row in bench.read(output)}
    last = list(kept)[-1]
    assert bench.main(["--only", f"^{re.escape(last)}$", "--append", "--output", str(output)]) == 0
    assert {row["set"]: row["p50_ms"] for row in bench.read(output)} == kept | {last: str(len(timed))}
    assert len(bench.read(output)) == 2


def test_a_set_timed_again_takes_its_own_place_as_a_whole(bench):
    def row(name, kernel, time, gpu="H200"):
        return {"set": name, "kernel": kernel, "p50_ms": time, "gpu": gpu}

    other = row("other", "ours", "1")
    before = [other, row("set", "ours", "2"), row("set", "ours", "3"), row("set", "fa4", "3")]
    again = [row("set", "ours", 4.0), row("set", "ours", 5.0), row("set", "fa4", 5.0)]
    assert bench.merged(before, again) == [other, *again]
    for part in (
        again[:2],
        again[1:],
        [*again[:2], row("set", "fa4", "")],  # missing there
        [one | {"gpu": "H100"} for one in again],
    ):
        assert bench.merged(before, part) == [*before, *part]
    assert bench.merged([other, row("set", "fa4", "")], again) == [other, *again]
