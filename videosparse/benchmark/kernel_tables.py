"""Tables of attention kernels, and of what stands beside them: rates, goals, norms, searches, integers, CPUs."""

from __future__ import annotations

from videosparse.benchmark.rows import repeated_ms
from videosparse.benchmark.tables import Row, Table

KERNELS = {
    "ours": "videosparse", "portable": "videosparse, kernel for any GPU", "fa4": "FlashAttention-4",
    "flex": "FlexAttention", "fa3": "FlashAttention-3", "cudnn": "cuDNN", "fa2": "FlashAttention-2",
}  # fmt: skip

INTEGERS = {"int8": "INT8", "int8-fp8": "INT8, FP8 values", "int8-int8": "INT8, INT8 values"}

ROUNDING = {"quantize int8": "rounding alone, INT8", "quantize int8-fp8": "rounding alone, INT8, FP8 values"}

SEARCH = {
    ("dense ours", ""): "dense attention, ours", ("block_sums", ""): "block sums, all rows",
    ("block_sums", "16"): "block sums, 16 rows of a block", ("select", ""): "selection",
    ("expand", ""): "lists from bits", ("sparse", ""): "sparse attention at density 0.2",
}  # fmt: skip
"""Calls of `eval/bench_search.py` by kernel and sample."""

SHARES = {
    "share_of_attention": "all attention of 50 steps", "share_of_run_eager": "the run, eager",
    "share_of_run_compiled": "the run, compiled",
}  # fmt: skip


def far(rows: list[Row]) -> Table:
    """What smaller scores of far tokens cost a call, beside the kernel of choice and the one that can have them."""
    lines = []
    for case, attention in dict.fromkeys((r["case"], r["attention"]) for r in rows):
        found = {r["scores"]: r for r in rows if (r["case"], r["attention"]) == (case, attention)}
        timed = [found[scores] for scores in ("portable", "far")]
        ratios = [f"{float(r['p50_ms']):.1f} ms ({float(r['over_best']):.2f}x)" if r["p50_ms"] else "-" for r in timed]
        best = found["best"]
        lines.append([case, attention, f"{float(best['density']):.2f}", f"{float(best['p50_ms']):.1f} ms", *ratios])
    head = ["model, size", "attention", "density", "kernel of choice", "kernel for any GPU", "the same with far scores"]
    return head, lines


def newest_run(rows: list[Row], name: str) -> list[Row]:
    """What was timed in the newest run of a set: its rows were timed in turn on one card, those of other runs not."""
    found = [r for r in rows if r["set"] == name and r["p50_ms"]]
    last = max((r["run"] for r in found), default="")
    return [r for r in found if r["run"] == last]


def rates(rows: list[Row], case: str = "12x30720", label: str = "128x128") -> Table:
    """Rates of all kernels in the newest run of one set, dense and by density."""
    rows = newest_run(rows, f"forward {case} {label}")
    columns = [("dense", ""), ("full", ""), *(("uniform", d) for d in ("0.5", "0.25", "0.1", "0.05"))]
    lines = [[name, *(_rate(rows, kernel, *column) for column in columns)] for kernel, name in KERNELS.items()]
    head = ["TFLOP/s", "dense", "full map", "density 0.5", "0.25", "0.1", "0.05"]
    return head, [line for line in lines if any(cell != "-" for cell in line[1:])]


def _rate(rows: list[Row], kernel: str, policy: str, density: str) -> str:
    """TFLOP/s of one row; "-" where there is none."""
    for r in rows:
        near = not density or abs(float(r["density"]) - float(density)) <= 0.01
        if r["kernel"] == kernel and r["policy"] == policy and near:
            return f"{float(r['tflops']):.0f}"
    return "-"


def backward(rows: list[Row]) -> Table:
    """The backward pass alone and after a forward pass: milliseconds of all kernels by density, and the most memory.

    Of several runs of a set the newest counts.
    """
    rows = [r for r in rows if r["pass"].endswith("backward") and r["p50_ms"]]
    densities = sorted({round(float(r["density"]), 2) for r in rows if r["policy"] == "uniform"}, reverse=True)
    lines = []
    for name in dict.fromkeys(r["set"] for r in rows):
        mine = newest_run(rows, name)
        for kernel, title in KERNELS.items():
            own = [r for r in mine if r["kernel"] == kernel]
            if own:
                cells = [_milliseconds(own, "dense", 1.0), *(_milliseconds(own, "uniform", d) for d in densities)]
                most = max(float(r["extra_mb"]) for r in own)
                lines.append([own[0]["case"], own[0]["pass"], title, *cells, f"{most:,.0f} MB"])
    head = ["size", "pass", "kernel", "dense, ms", *(f"density {d:g}, ms" for d in densities), "memory beside"]
    return head, lines


def _milliseconds(rows: list[Row], policy: str, density: float) -> str:
    """Of the row of a kind of map; "-" where there is none."""
    found = (r["p50_ms"] for r in rows if r["policy"] == policy and abs(float(r["density"]) - density) <= 0.01)
    return next((f"{float(time):.2f}" for time in found), "-")


def radial_speed(rows: list[Row]) -> Table:
    """One attention call of real models: torch's dense kernel, ours with every block, and ours with Radial's map.

    Of several runs of a set the newest counts.
    """
    rows = [r for r in rows if r["set"].startswith("forward ") and r["set"].endswith(" radial")]
    lines = []
    for name in dict.fromkeys(r["set"] for r in rows):
        mine = newest_run(rows, name)
        times = {(r["kernel"], r["policy"]): float(r["p50_ms"]) for r in mine}
        found = next(r for r in mine if (r["kernel"], r["policy"]) == ("ours", "radial"))
        stock, full, sparse = times["cudnn", "dense"], times["ours", "dense"], times["ours", "radial"]
        theirs = times.get(("fa4", "radial"))
        lines.append([
            found["case"], f"{int(found['tokens']):,}", f"{found['density']} ({found['block']})",
            *(f"{time:.1f}" if time else "cannot" for time in (stock, full, theirs, sparse)),
            f"{min(stock, full) / sparse:.1f}x",
        ])  # fmt: skip
    head = [
        "model, size", "tokens", "density (block)", "cuDNN dense, ms", "ours dense, ms",
        "FlashAttention-4 with Radial, ms", "ours with Radial, ms", "against the faster dense",
    ]  # fmt: skip
    return head, lines


def goals(rows: list[Row]) -> Table:
    """The goals of the kernels and what was measured, from `eval/check_goals.py`."""
    head = ["figure", "case", "measured", "must", "goal", "", "what was timed"]
    lines = []
    for r in rows:
        measured = r["measured"] and f"{r['measured']} {r['unit']}"
        lines.append([r["goal"], r["case"], measured, r["must"], r["wanted"], r["verdict"], r["detail"]])
    return head, lines


def norms(rows: list[Row]) -> Table:
    """What stands between projections and attention: step by step, compiled, and by one kernel."""
    head = ["model, size", "steps, ms", "steps compiled, ms", "one kernel, ms", "of the rate of a copy"]
    lines = []
    for case in dict.fromkeys((r["case"], r["form"]) for r in rows):
        found = {r["kernel"]: r for r in rows if (r["case"], r["form"]) == case}
        times = [f"{float(found[k]['p50_ms']):.2f}" for k in ("steps", "compiled", "fused")]
        lines.append([" ".join(filter(None, case)), *times, f"{float(found['fused']['percent_of_copy']):.0f} %"])
    return head, lines


def cpu(rows: list[Row]) -> Table:
    """Attention on two CPU cores: dense and sparse."""
    head = ["tokens", "density", "dense, ms", "sparse, ms", "speed-up", "relative error"]
    return head, [
        [r["tokens"], r["density"], r["dense_ms"], r["sparse_ms"], f"{r['speedup']}x", r["error"]] for r in rows
    ]


def search(rows: list[Row]) -> Table:
    """What a search costs, call by call, and as a share of a run; a column for each case."""
    cases = list(dict.fromkeys((r["case"], r["block"]) for r in rows))
    lines = []
    for (kernel, sample), name in SEARCH.items():
        found = {(r["case"], r["block"]): r for r in rows if (r["kernel"], r["sample"]) == (kernel, sample)}
        lines.append([name, *(f"{float(found[c]['p50_ms']):.1f} ms" if c in found else "-" for c in cases)])
    for sample, name in (("", "all rows"), ("16", "16 rows of a block")):
        found = {(r["case"], r["block"]): r for r in rows if (r["kernel"], r["sample"]) == ("share", sample)}
        for column, of in SHARES.items():
            cells = [found[c][column] if c in found else "" for c in cases]
            lines.append([f"two searches, {name}, of {of}", *(f"{float(x):.1f} %" if x else "-" for x in cells)])
    return ["", *(" ".join(c) for c in cases)], lines if cases else []


WIDE_CALL = "wan2.1-14b 720x1280x81"
"""The call that tables of integers are about."""


def integer_calls(rows: list[Row], case: str = WIDE_CALL) -> list[Row]:
    """The timed rows of one call in bf16 and in integers, each set of its newest run."""
    return [r for r in _timed(rows, case) if r["kernel"] not in ROUNDING]


def _timed(rows: list[Row], case: str) -> list[Row]:
    """What was timed in the sets of integers: those with values in 16 or 8 bits floating, and those in INT8."""
    sets = [f"forward {case} {label}" for label in ("integers", "integer values")]
    return [r for name in sets for r in newest_run(rows, name)]


def fastest_dense_call(calls: list[Row]) -> Row | None:
    """The fastest dense call in 16 bits."""
    dense = [r for r in calls if r["policy"] == "dense" and not r["kernel"].startswith("int8")]
    return min(dense, key=lambda r: float(r["p50_ms"]), default=None)


def integers(rows: list[Row]) -> Table:
    """One call in bf16 and in integers, quantization included, beside the fastest dense kernel; and that by itself.

    Gains are between rows of one run, those over own bf16 of one set; INT8 values have a set of their own, and no gain
    over the fastest dense kernel where that is of another run. The last columns are of each call repeated in two or
    more stretches that take turns, where that was timed.
    """
    head = ["numbers", "density", "ms", "against own bf16", "against the fastest dense", "relative error"]
    head += ["repeated, ms", "against own bf16", "MHz"]
    calls = integer_calls(rows)
    fastest = fastest_dense_call(calls)
    if fastest is None:
        return head, []
    name = f"fastest dense, {KERNELS[fastest['kernel']]}"
    lines = [[name, "1.000", f"{float(fastest['p50_ms']):.1f}", "", "", "", *_repeated(fastest, None)]]
    owns = {(r["set"], r["density"]): r for r in calls if r["kernel"] == "ours"}
    for density in dict.fromkeys(r["density"] for r in calls):
        found = {r["kernel"]: r for r in reversed(calls) if r["density"] == density}
        for kernel, name in {"ours": "bf16", **INTEGERS}.items():
            if kernel in found:
                row, own = found[kernel], owns[found[kernel]["set"], density]
                time, error = float(row["p50_ms"]), row["error"] if kernel != "ours" else ""
                bases = (own, fastest)
                gains = [f"{float(b['p50_ms']) / time:.2f}x" if b["run"] == row["run"] else "" for b in bases]
                lines.append([name, density, f"{time:.1f}", *gains, error, *_repeated(row, own)])
    by_kernel = {r["kernel"]: r for r in _timed(rows, WIDE_CALL)}
    for kernel, name in ROUNDING.items():
        if kernel in by_kernel:
            row = by_kernel[kernel]
            lines.append([name, "", f"{float(row['p50_ms']):.2f}", "", "", row["error"], *_repeated(row, None)])
    return head, lines


def _repeated(row: Row, own: Row | None) -> list[str]:
    """Time in ms, gain over a row and clock in MHz of a call that was repeated in turn; empty where it was not."""
    time, base = repeated_ms(row), None if own is None else repeated_ms(own)
    if time is None:
        return ["", "", ""]
    gain = "" if base is None else f"{base / time:.2f}x"
    return [f"{time:.2f}" if time < 10 else f"{time:.1f}", gain, row["sm_mhz"]]
