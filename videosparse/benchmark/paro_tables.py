"""Tables of PAROAttention: what orders gain and cost, what calibration costs, and the paper's figures beside ours."""

from __future__ import annotations

from videosparse.benchmark.kernel_tables import fastest_dense_call, integer_calls
from videosparse.benchmark.tables import Row, Table, mean, usual

PUBLISHED = (
    ("0.5", "", "1.73x", "29.1"), ("0.5, no reordering", "", "", "26.3"), ("0.5", "int8", "1.83x", "29.0"),
    ("0.3", "", "2.71x", "22.9"), ("0.3", "int8", "5.72x", ""), ("0.2", "", "3.81x", "19.4"),
)  # fmt: skip
"""CogVideoX-5B as the paper reports it (arXiv 2506.16054): density, numbers, attention speed-up, PSNR in dB."""


def published(videos: list[Row], calls: list[Row]) -> Table:
    """The paper's table beside ours: the gain of a call of Wan-14B, and the fidelity of the embedded model.

    Args:
        videos: rows of `eval/compare_methods.py`.
        calls: rows of `eval/bench_attention.py`.
    """
    calls = integer_calls(calls)
    dense, videos = fastest_dense_call(calls), usual(videos)
    lines = []
    for density, quant, speed, quality in PUBLISHED:
        share, _, raster = density.partition(", ")
        setting = ", ".join(x for x in (f"paro {share}", "raster order" if raster else "", quant) if x)
        scores = [float(r["psnr_db"]) for r in videos if r["setting"] == setting]
        times = [
            float(r["p50_ms"]) for r in calls
            if r["policy"] == "uniform" and r["kernel"] == (quant or "ours")
            and abs(float(r["density"]) - float(share)) < 0.01
        ]  # fmt: skip
        ours = f"{float(dense['p50_ms']) / times[0]:.2f}x" if dense and times else "-"
        lines.append(
            [density, quant or "16 bits", speed or "-", quality or "-", ours, mean(scores, 1) if scores else "-"]
        )
    head = [
        "density", "numbers", "paper: attention", "paper: PSNR, dB", "ours: attention, Wan-14B 720p",
        "ours: PSNR, dB, embedded model",
    ]  # fmt: skip
    return head, lines


def reordering(rows: list[Row]) -> Table:
    """Recall and output error of maps by how orders and maps were chosen, shorter videos first."""
    rows = sorted((r for r in rows if r["method"] != "dense"), key=lambda r: int(r["frames"]))
    densities = list(dict.fromkeys(r["asked_density"] for r in rows))
    lines = []
    for key in dict.fromkeys((r["frames"], r["method"], r["quant"]) for r in rows):
        found = {r["asked_density"]: r for r in rows if (r["frames"], r["method"], r["quant"]) == key}
        cells = [f"{found[d]['recall']}, {found[d]['error']}" if d in found else "-" for d in densities]
        frames, method, quant = key
        lines.append([f"{frames} frames", method, quant or "bf16", *cells])
    return ["", "recall, error", "numbers", *(f"density {density}" for density in densities)], lines


def reorder_cost(rows: list[Row]) -> Table:
    """What an order adds to a sparse attention call, part by part."""
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
    return head, lines


def calibration(rows: list[Row]) -> Table:
    """Seconds and size of a calibration."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows):
        parts = [r for r in rows if r["case"] == case]
        whole = next(r for r in parts if r["part"] == "all")
        longest = max((r for r in parts if r["total_s"]), key=lambda r: float(r["total_s"]) * (r["part"] != "all"))
        share = f"{longest['part']}, {float(longest['total_s']):.0f} s" if len(parts) > 1 else ""
        seconds, size = (f"{float(whole[name]):.4g}" for name in ("total_s", "plan_mb"))
        lines.append([case, whole["kind"], whole["prompts"], whole["steps"], f"{seconds} s", share, f"{size} MB"])
    head = ["model, size", "", "prompts", "steps", "calibration", "most of it", "plan"]
    return head, lines
