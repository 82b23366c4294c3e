"""Write the tables of README.md, of assets/results/README.md and of the model card from the rows in `assets/results`.

    python eval/readme_tables.py            rewrite what stands between the marks
    python eval/readme_tables.py --check    exit with 1 if a table is out of date (the test suite does this)

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; its rows come from the function of that name.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

from videosparse.metrics.bootstrap import interval
from videosparse.program import run_program

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "assets/results"
PAGES = ("README.md", "assets/results/README.md", "assets/results/profile.md", "assets/tiny-wan/README.md")

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


def _share(right: list[float]) -> str:
    return "{} % ({} to {})".format(*(f"{100 * x:.0f}" for x in interval(right)))


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
    newest = {r["set"]: max(x["run"] for x in rows if x["set"] == r["set"]) for r in rows}
    lines = []
    for case, run in newest.items():
        mine = [r for r in rows if (r["set"], r["run"]) == (case, run)]
        times = {(r["kernel"], r["policy"]): float(r["p50_ms"]) for r in mine if r["p50_ms"]}
        found = next(r for r in mine if (r["kernel"], r["policy"]) == ("ours", "radial"))
        stock, full, sparse = times["cudnn", "dense"], times["ours", "dense"], times["ours", "radial"]
        theirs = times.get(("fa4", "radial"))
        lines.append([
            found["case"], f"{int(found['tokens']):,}", found["block"], found["density"],
            *(f"{time:.1f}" if time else "cannot" for time in (stock, full, theirs, sparse)),
            f"{min(stock, full) / sparse:.1f}x",
        ])  # fmt: skip
    head = [
        "model, size", "tokens", "block", "density", "cuDNN dense, ms", "ours dense, ms",
        "FlashAttention-4 with Radial, ms", "ours with Radial, ms", "against the faster dense",
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


def fidelity(name: str = "video_fidelity") -> str:
    """PSNR and SSIM of every setting against dense, with 95 % bootstrap intervals over prompts."""
    lines = []
    rows = read(name)
    for setting in dict.fromkeys(r["setting"] for r in rows):
        videos = [r for r in rows if r["setting"] == setting]
        cells = [_mean([float(v[name]) for v in videos], digits) for name, digits in (("psnr_db", 1), ("ssim", 3))]
        lines.append([setting, videos[0]["video_density"], videos[0]["average_density"], *cells])
    return markdown(["setting", "video density", "averaged over the run", "PSNR, dB", "SSIM"], lines)


def methods() -> str:
    """Every method of `eval/compare_methods.py` at every size, with the anchors."""
    if not (RESULTS / "method_comparison.csv").exists():
        return UNMEASURED
    from videosparse.evaluation.page.summary import sizes_of

    lines = []
    for size in sizes_of(read("method_comparison")):
        for group in size.groups:
            cells = [_sure(group.mean(name), digits, factor) for name, digits, factor in METHOD_COLUMNS]
            lines.append([f"{size.key['frames']}x{size.key['height']}x{size.key['width']}", group.setting, *cells])
    head = [
        "frames x H x W", "setting", "video density", "PSNR against dense, dB", "SSIM", "latents, relative L1",
        "all right, %", "motion class right, %", "permanence, %", "temporal flickering",
    ]  # fmt: skip
    return markdown(head, lines)


METHOD_COLUMNS = (
    ("video_density", 0, 0), ("psnr_db", 1, 1), ("ssim", 3, 1), ("latent_l1", 3, 1), ("all_right", 0, 100),
    ("motion_right", 0, 100), ("permanence", 1, 100), ("temporal_flickering", 4, 1),
)  # fmt: skip


def _sure(found: tuple[float, float, float] | None, digits: int, factor: int) -> str:
    """A mean with its interval; a density, which has none, by its mean alone; "-" where there is nothing."""
    if found is None:
        return "-"
    if not factor:
        return f"{found[0]:.4f}"
    return "{} ({} to {})".format(*(f"{x * factor:.{digits}f}" for x in found))


def _mean(values: list[float], digits: int) -> str:
    return "{} ({} to {})".format(*(f"{x:.{digits}f}" for x in interval(values)))


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


def models() -> str:
    """Steps of whole models and runs of 50, dense and sparse, and what measures them."""
    from videosparse.benchmark.step_tables import missing, overview

    rows = read("models")
    return "\n\n".join(filter(None, (markdown(*overview(rows)), missing(rows))))


def model_steps() -> str:
    """Every contender of every case that has rows, those without a figure too."""
    from videosparse.benchmark.step_tables import every_row, missing

    rows = read("models")
    return "\n\n".join(filter(None, (markdown(*every_row(rows)), missing(rows))))


def model_check() -> str:
    """Whole models as measured beside what few of their layers say."""
    from videosparse.benchmark.step_tables import extrapolation

    head, lines = extrapolation(read("models"))
    return markdown(head, lines) if lines else UNMEASURED


def model_goals() -> str:
    """What was measured of whole models and all that must be, from `eval/check_model_goals.py`."""
    if not _measured("model_goals"):
        return UNMEASURED
    head = ["model, size", "a sparse step", "measured", "must", "goal", "", "seconds"]
    return markdown(head, [
        [r["case"], r["goal"], r["measured"] and f"{r['measured']}x", r["must"], r["wanted"], r["verdict"], r["detail"]]
        for r in read("model_goals") if r["measured"] or r["must"]
    ])  # fmt: skip


def profile() -> str:
    """Where the time of a layer goes, from `eval/profile_step.py`, with its picture where there is one."""
    from videosparse.benchmark.step_tables import parts

    if not _measured("profile"):
        return UNMEASURED
    picture = "\n\n![Milliseconds of a layer by part](../figures/profile.png)"
    tables = "\n\n".join(f"{case}\n\n{markdown(head, lines)}" for case, head, lines in parts(read("profile")))
    return tables + (picture if (ROOT / "assets/figures/profile.png").exists() else "")


def training() -> str:
    """Training steps of whole models, reckoned from few layers."""
    from videosparse.benchmark.training_tables import steps

    return markdown(*steps(read("lora_training")))


def lora_lengths() -> str:
    """Videos beyond the trained length, quarter by quarter; what has no row is named below."""
    from videosparse.benchmark.training_tables import lengths

    if not _measured("lora_length"):
        return UNMEASURED
    head, lines, missing = lengths(read("lora_length"))
    note = f"\n\nNot measured yet: {', '.join(missing)}." if missing else ""
    drawn = (RESULTS.parent / "figures/lora_lengths.png").exists()
    figure = "\n\n![Right answers by quarter, drift and repetition](../figures/lora_lengths.png)" if drawn else ""
    return markdown(head, lines) + note + figure


def paro_videos() -> str:
    """Videos by plans of PAROAttention, with orders and without, in integers and without."""
    return fidelity("paro_fidelity")


def _measured(*names: str) -> bool:
    return all((RESULTS / f"{name}.csv").exists() for name in names)


def _integer_rows(case: str = "wan2.1-14b 720x1280x81") -> list[Row]:
    """Rows of one call in bf16 and in integers; before there are any of the present code, the bf16 rows of variants."""
    rows = read("integer_attention" if _measured("integer_attention") else "integer_variants")
    return [r for r in rows if r["case"] == case and r["p50_ms"] and not r["note"]]


def reordering() -> str:
    """Recall and output error of maps by how orders and maps were chosen."""
    if not _measured("reordering"):
        return UNMEASURED
    rows = read("reordering")
    columns = list(dict.fromkeys((r["frames"], r["asked_density"]) for r in rows if r["method"] != "dense"))
    columns = [(frames, density) for frames, density in columns if frames == max((c[0] for c in columns), key=int)]
    lines = []
    for method, quant in dict.fromkeys((r["method"], r["quant"]) for r in rows):
        found = {(r["frames"], r["asked_density"]): r for r in rows if (r["method"], r["quant"]) == (method, quant)}
        cells = [f"{found[c]['recall']}, {found[c]['error']}" if c in found else "-" for c in columns]
        if method != "dense":
            lines.append([method, quant or "bf16", *cells])
    return markdown(["recall, error", "numbers", *(f"{n} frames at {density}" for n, density in columns)], lines)


def rounding() -> str:
    """What integers alone do to dense attention on real queries, keys and values."""
    if not _measured("reordering"):
        return UNMEASURED
    rows = [r for r in read("reordering") if r["method"] == "dense" and r["quant"]]
    head = ["integers", "frames", "calls", "relative L2 error (95 %)", "least cosine of a call"]
    return markdown(head, [[r["quant"], r["frames"], r["calls"], _ranged(r, "error"), r["cosine_worst"]] for r in rows])


def integer_errors() -> str:
    """How far integer attention is from fp64 on real and on hard inputs, by kind of integers."""
    if not _measured("integer_errors"):
        return UNMEASURED
    rows = read("integer_errors")
    kinds = list(dict.fromkeys(r["quant"] for r in rows))
    lines = []
    for inputs in dict.fromkeys(r["inputs"] for r in rows):
        found = {r["quant"]: r for r in rows if r["inputs"] == inputs}
        lines.append(
            [inputs, *(f"{float(found[k]['error']):.2%} ({float(found[k]['error_worst']):.2%})" for k in kinds)]
        )
    return markdown(["inputs", *kinds], lines)


def integers() -> str:
    """One call in bf16 and in integers, quantization included, beside the fastest dense kernel."""
    if not _measured("integer_attention"):
        return UNMEASURED
    rows = _integer_rows()
    dense = [r for r in rows if r["policy"] == "dense"]
    fastest = min((r for r in dense if not r["kernel"].startswith("int8")), key=lambda r: float(r["p50_ms"]))
    lines = [["fastest dense", KERNELS[fastest["kernel"]], "1.000", f"{float(fastest['p50_ms']):.1f}", "", "", ""]]
    for density in dict.fromkeys(r["density"] for r in rows):
        found = {r["kernel"]: r for r in rows if r["density"] == density and r["policy"] in ("dense", "uniform")}
        names = {"int8": "INT8", "int8-fp8": "INT8, FP8 values", "int8-int8": "INT8, INT8 values"}
        for kernel, name in {"ours": "bf16", **names}.items():
            if kernel in found:
                time, own = (float(found[k]["p50_ms"]) for k in (kernel, "ours"))
                error = found[kernel]["error"] if kernel != "ours" else ""
                gain = f"{float(fastest['p50_ms']) / time:.2f}x"
                lines.append(["ours", name, density, f"{time:.1f}", f"{own / time:.2f}x", gain, error])
    head = ["", "numbers", "density", "ms", "against own bf16", "against the fastest dense", "relative error"]
    return markdown(head, lines)


def reorder_cost() -> str:
    """What an order adds to a sparse attention call, part by part."""
    if not _measured("reorder"):
        return UNMEASURED
    rows = read("reorder")
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows):
        found = {(r["part"], r["form"]): r for r in rows if r["case"] == case}
        cells = []
        for part in ("norm", "values", "attention"):
            ordered, raster = (found.get((part, form), {}).get("p50_ms") for form in ("ordered", "raster"))
            cells.append(f"{float(ordered) - float(raster or 0):+.2f} ms" if ordered else "-")
        whole = found["attention", "raster"]["p50_ms"]
        lines.append([case, f"{float(whole):.1f} ms", *cells, f"{found['sum', 'ordered'].get('percent') or '-'} %"])
    head = ["model, size", "sparse attention", "norm and rotation", "values", "attention", "sum, of sparse attention"]
    return markdown(head, lines)


def calibration() -> str:
    """Seconds and size of a calibration."""
    if not _measured("paro_calibration"):
        return UNMEASURED
    rows = read("paro_calibration")
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows):
        parts = [r for r in rows if r["case"] == case]
        whole = next(r for r in parts if r["part"] == "all")
        longest = max((r for r in parts if r["total_s"]), key=lambda r: float(r["total_s"]) * (r["part"] != "all"))
        share = f"{longest['part']}, {float(longest['total_s']):.0f} s" if len(parts) > 1 else ""
        seconds, size = (f"{float(whole[name]):.4g}" for name in ("total_s", "plan_mb"))
        lines.append([case, whole["kind"], whole["prompts"], whole["steps"], f"{seconds} s", share, f"{size} MB"])
    head = ["model, size", "", "prompts", "steps", "calibration", "most of it", "plan"]
    return markdown(head, lines)


# CogVideoX-5B as the paper reports it (arXiv 2506.16054): density, numbers, attention speed-up, PSNR
PUBLISHED = [
    ("0.5", "", "1.73x", "29.1"), ("0.5, no reordering", "", "", "26.3"), ("0.5", "int8", "1.83x", "29.0"),
    ("0.3", "", "2.71x", "22.9"), ("0.3", "int8", "5.72x", ""), ("0.2", "", "3.81x", "19.4"),
]  # fmt: skip


def published() -> str:
    """The paper's table beside ours: the gain of a call of Wan-14B, and the fidelity of the embedded model."""
    videos = read("paro_fidelity")
    calls = _integer_rows()
    dense = min(float(r["p50_ms"]) for r in calls if r["policy"] == "dense" and not r["kernel"].startswith("int8"))
    calls = [r for r in calls if r["policy"] == "uniform"]
    lines = []
    for density, quant, speed, quality in PUBLISHED:
        share, _, raster = density.partition(", ")
        setting = ", ".join(x for x in (f"paro {share}", "raster order" if raster else "", quant) if x)
        scores = [float(r["psnr_db"]) for r in videos if r["setting"] == setting]
        times = [
            float(r["p50_ms"]) for r in calls
            if r["kernel"] == (quant or "ours") and abs(float(r["density"]) - float(share)) < 0.01
        ]  # fmt: skip
        ours = f"{dense / times[0]:.2f}x" if times else "-"
        lines.append(
            [density, quant or "16 bits", speed or "-", quality or "-", ours, _mean(scores, 1) if scores else "-"]
        )
    head = [
        "density", "numbers", "paper: attention", "paper: PSNR, dB", "ours: attention, Wan-14B 720p",
        "ours: PSNR, dB, embedded model",
    ]  # fmt: skip
    return markdown(head, lines)


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


def speeds() -> str:
    """What each speed combines."""
    from videosparse.generation.presets import SPEEDS

    rows = []
    for speed in SPEEDS.values():
        values = speed.values
        attention = values.get("method", "sparse, the method's defaults")
        if "quant" in values:
            attention = f"sparse, `quant={values['quant']}`"
        flags = {"compile": "compiled blocks", "linears": "`--linears {}`", "step_cache": "`--step-cache {}`"}
        beside = [text.format(values[key]) for key, text in flags.items() if key in values]
        rows.append([f"`{speed.name}`", str(attention), ", ".join(beside)])
    return markdown(["preset", "attention", "beside it"], rows)


def stack() -> str:
    """Which accelerations go together, from what requests are refused by."""
    from videosparse.generation.stack import together

    return together()


ALL = (
    densities, accuracy, coverage, cpu, figure, attention, radial_speed, norms, recall, fidelity, methods, search,
    goals, models, model_steps, model_check, model_goals, profile, training, lora_lengths, reordering, rounding,
    integers, integer_errors, reorder_cost, calibration, paro_videos, published, dimensions,
    speeds, stack,
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
    run_program(main)
