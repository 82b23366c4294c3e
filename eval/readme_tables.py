"""Write the tables of README.md (and the model card) from the rows in `assets/results`.

    python eval/readme_tables.py            rewrite what stands between the marks
    python eval/readme_tables.py --check    exit with 1 if a table is out of date (the test suite does this)

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; its rows come from the function of that name.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "assets/results"
PAGES = ("README.md", "assets/tiny-wan/README.md")

ACCURACY = {
    "tiny_wan_ceiling_33": "ground truth through the VAE, 33 frames",
    "tiny_wan_dense_33": "dense, 33 frames, 20 steps, guidance 4, bf16 on an H200",
    "tiny_wan_radial_33": "Radial Attention, the same",
}

Row = dict[str, str]


def read(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ranged(row: Row, name: str) -> str:
    return f"{row[name]} ({row[name + '_low']} to {row[name + '_high']})"


def densities() -> str:
    """Radial maps with the defaults of each model."""
    head = [
        "model", "size (HxWxframes)", "tokens", "block", "decay", "video density", "with text",
        "averaged over 50 steps", "attention at most",
    ]  # fmt: skip
    rows = [
        [
            r["model"], r["pixels"], f"{int(r['tokens']):,}", r["block"], r["decay"], r["video_density"], r["density"],
            r["average_density"], f"{r['attention_bound']}x faster",
        ]
        for r in read("radial_density")
    ]  # fmt: skip
    return markdown(head, rows)


def accuracy() -> str:
    """Share of right videos of the embedded model, with 95 % bootstrap intervals over videos."""
    rows = []
    for name, setting in ACCURACY.items():
        if (RESULTS / f"{name}.csv").exists():
            videos = read(name)
            shares = [_share([float(v[f"{what}_right"]) for v in videos]) for what in ("colour", "shape", "motion")]
            rows.append([setting, str(len(videos)), *shares])
    return markdown(["setting", "videos", "colour", "shape", "motion class"], rows)


def _interval(values: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return fmean(values), means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def _share(right: list[float]) -> str:
    return "{} % ({} to {})".format(*(f"{100 * x:.0f}" for x in _interval(right)))


def coverage() -> str:
    """Radial's two block rules against dense, on the embedded model."""
    head = [
        "frames x H x W", "rule", "decay", "video density", "prediction against dense, relative L2 (95 %)",
        "growth of the loss (95 %)",
    ]  # fmt: skip
    rows = [
        [r["size"], r["coverage"], r["decay"], r["density"], _ranged(r, "relative_l2"), _ranged(r, "loss_growth")]
        for r in read("radial_coverage")
    ]
    return markdown(head, rows)


def cpu() -> str:
    """Attention on two CPU cores: dense and sparse."""
    head = ["tokens", "density", "dense, ms", "sparse, ms", "speed-up", "relative error"]
    rows = [
        [r["tokens"], r["density"], r["dense_ms"], r["sparse_ms"], f"{r['speedup']}x", r["error"]]
        for r in read("cpu_attention")
    ]
    return markdown(head, rows)


def figure() -> str:
    """What the frames at the top of the page show."""
    head = ["prompt", "frames", "steps", "video density", "averaged over the run", "PSNR against dense, dB", "SSIM"]
    columns = ("prompt", "frames", "steps", "video_density", "average_density", "psnr_db", "ssim")
    return markdown(head, [[r[c] for c in columns] for r in read("figure_dense_vs_radial")])


KERNELS = {
    "ours": "videosparse", "portable": "videosparse, kernel for any GPU", "fa4": "FlashAttention-4",
    "flex": "FlexAttention", "fa3": "FlashAttention-3", "cudnn": "cuDNN", "fa2": "FlashAttention-2",
}  # fmt: skip
UNMEASURED = "Not measured yet."


def attention(case: str = "12x30720", label: str = "128x128") -> str:
    """Rates of all kernels in the newest run of one set, dense and by density."""
    if not (RESULTS / "attention.csv").exists():
        return UNMEASURED
    rows = [r for r in read("attention") if r["set"] == f"forward {case} {label}" and r["p50_ms"]]
    rows = [r for r in rows if r["run"] == max(r["run"] for r in rows)]
    columns = [("dense", ""), ("full", ""), *(("uniform", d) for d in ("0.5", "0.25", "0.1", "0.05"))]
    table = [[name, *(_rate(rows, kernel, *column) for column in columns)] for kernel, name in KERNELS.items()]
    head = ["TFLOP/s", "dense", "full map", "density 0.5", "0.25", "0.1", "0.05"]
    return markdown(head, [line for line in table if any(cell != "-" for cell in line[1:])])


def _rate(rows: list[Row], kernel: str, policy: str, density: str) -> str:
    """TFLOP/s of one row; "-" where there is none."""
    for r in rows:
        near = not density or abs(float(r["density"]) - float(density)) <= 0.01
        if r["kernel"] == kernel and r["policy"] == policy and near:
            return f"{float(r['tflops']):.0f}"
    return "-"


def radial_speed() -> str:
    """One attention call of real models: torch's dense kernel, ours with every block, and ours with Radial's map."""
    if not (RESULTS / "attention.csv").exists():
        return UNMEASURED
    rows = [r for r in read("attention") if r["set"].startswith("forward ") and r["set"].endswith(" radial")]
    lines = []
    for case in dict.fromkeys(r["set"] for r in rows):
        times = {(r["kernel"], r["policy"]): float(r["p50_ms"]) for r in rows if r["set"] == case and r["p50_ms"]}
        found = next(r for r in rows if r["set"] == case and (r["kernel"], r["policy"]) == ("ours", "radial"))
        stock, full, sparse = times["cudnn", "dense"], times["ours", "dense"], times["ours", "radial"]
        theirs = times.get(("fa4", "radial"))
        lines.append([
            found["case"], f"{int(found['tokens']):,}", found["density"],
            *(f"{time:.1f}" if time else "cannot" for time in (stock, full, theirs, sparse)),
            f"{min(stock, full) / sparse:.1f}x",
        ])  # fmt: skip
    head = [
        "model, size", "tokens", "density", "cuDNN dense, ms", "ours dense, ms", "FlashAttention-4 with Radial, ms",
        "ours with Radial, ms", "against the faster dense",
    ]  # fmt: skip
    return markdown(head, lines)


def norms() -> str:
    """What stands between projections and attention: step by step, compiled, and by one kernel."""
    rows = read("norm_rotate")
    head = ["model, size", "steps, ms", "steps compiled, ms", "one kernel, ms", "of the rate of a copy"]
    lines = []
    for case in dict.fromkeys((r["case"], r["form"]) for r in rows):
        found = {r["kernel"]: r for r in rows if (r["case"], r["form"]) == case}
        times = [f"{float(found[k]['p50_ms']):.2f}" for k in ("steps", "compiled", "fused")]
        lines.append([" ".join(filter(None, case)), *times, f"{float(found['fused']['percent_of_copy']):.0f} %"])
    return markdown(head, lines)


# frames and density: those that Radial's default reaches, and two below
RECALL_AT = [("81", "0.444"), ("81", "0.2"), ("81", "0.1"), ("321", "0.176"), ("321", "0.1")]


def recall(columns: list[tuple[str, str]] = RECALL_AT) -> str:
    """Recall and output error of every method at some densities, over all steps after the search."""
    rows = [r for r in read("attention_recall") if r["step"] == "all"]
    lines = []
    for method, block in dict.fromkeys((r["method"], r["block"]) for r in rows):
        if block == "64x64" or method == "adaspa":
            found = {(r["frames"], r["asked_density"]): r for r in rows if (r["method"], r["block"]) == (method, block)}
            cells = [f"{found[c]['recall']}, {found[c]['error']}" if c in found else "-" for c in columns]
            lines.append([method, block, *cells])
    return markdown(
        ["recall, error", "block", *(f"{frames} frames at {density}" for frames, density in columns)], lines
    )


def fidelity() -> str:
    """PSNR and SSIM of every setting against dense, with 95 % bootstrap intervals over prompts."""
    lines = []
    rows = read("video_fidelity")
    for setting in dict.fromkeys(r["setting"] for r in rows):
        videos = [r for r in rows if r["setting"] == setting]
        cells = [_mean([float(v[name]) for v in videos], digits) for name, digits in (("psnr_db", 1), ("ssim", 3))]
        lines.append([setting, videos[0]["video_density"], videos[0]["average_density"], *cells])
    return markdown(["setting", "video density", "averaged over the run", "PSNR, dB", "SSIM"], lines)


def _mean(values: list[float], digits: int) -> str:
    return "{} ({} to {})".format(*(f"{x:.{digits}f}" for x in _interval(values)))


def search() -> str:
    """What a search costs, call by call, and as a share of a run."""
    rows = read("search_cost")
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
    return markdown(["", *(" ".join(c) for c in cases)], lines)


SEARCH = {
    ("dense ours", ""): "dense attention, ours", ("block_sums", ""): "block sums, all rows",
    ("block_sums", "16"): "block sums, 16 rows of a block", ("select", ""): "selection",
    ("expand", ""): "lists from bits", ("sparse", ""): "sparse attention at density 0.2",
}  # fmt: skip
SHARES = {
    "share_of_attention": "all attention of 50 steps", "share_of_run_eager": "the run, eager",
    "share_of_run_compiled": "the run, compiled",
}  # fmt: skip


def goals() -> str:
    """The goals of the kernels and what was measured, from `eval/check_goals.py`."""
    if not (RESULTS / "attention_goals.csv").exists():
        return UNMEASURED
    head = ["figure", "case", "measured", "must", "goal", ""]
    return markdown(head, [
        [r["goal"], r["case"], r["measured"] and f"{r['measured']} {r['unit']}", r["must"], r["wanted"], r["verdict"]]
        for r in read("attention_goals")
    ])  # fmt: skip


def dimensions() -> str:
    """What `eval/score_videos.py` computes, from the registry itself."""
    from videosparse.metrics.vbench import DIMENSIONS
    from videosparse.metrics.vbench.weights import NEEDED

    head = ["dimension", "", "how", "range", "weight", "weights needed"]
    return markdown(head, [
        [
            d.name, d.kind, d.formula, f"{d.minimum:g} to {d.maximum:g}", f"{d.weight:g} ({d.group})",
            " and ".join(NEEDED[k].name if NEEDED[k].is_file else NEEDED[k].source for k in d.models) or "none",
        ]
        for d in DIMENSIONS.values()
    ])  # fmt: skip


ALL = (
    densities, accuracy, coverage, cpu, figure, attention, radial_speed, norms, recall, fidelity, search, goals,
    dimensions,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {t.__name__: t for t in ALL}


def fill(text: str) -> str:
    """The page with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise SystemExit(f"Unknown table {name!r}; there are {', '.join(TABLES)}.")
        return f"<!-- table:{name} -->\n{TABLES[name]()}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\w+) -->.*?<!-- /table -->", table, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for page in (ROOT / name for name in PAGES):
        old = page.read_text()
        new = fill(old)
        if new != old:
            stale.append(page.name)
            if not args.check:
                page.write_text(new)
    if args.check and stale:
        print(f"Out of date: {', '.join(stale)}; run python eval/readme_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
