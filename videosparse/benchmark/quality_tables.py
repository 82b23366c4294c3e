"""Tables of quality on the embedded model, and of the densities that maps have."""

from __future__ import annotations

from videosparse.benchmark.tables import Row, Table, ranged
from videosparse.metrics.bootstrap import interval

ACCURACY = (
    "ground truth through the VAE, 33 frames",
    "dense, 33 frames, 20 steps, guidance 4, bf16 on an H200",
    "Radial Attention, the same",
    "dense, 33 frames, 50 steps, combinations that training never shows",
    "dense, 81 frames, 50 steps, the same",
)
"""What the files of `accuracy` hold, in their order."""

RECALL_AT = (("81", "0.444"), ("81", "0.2"), ("81", "0.1"), ("321", "0.176"), ("321", "0.1"))
"""Frames and densities: those that Radial's default reaches, and some below."""


def figure(rows: list[Row]) -> Table:
    """What the frames at the top of the README show."""
    head = ["prompt", "frames", "steps", "video density", "averaged over the run", "PSNR against dense, dB", "SSIM"]
    columns = ("prompt", "frames", "steps", "video_density", "average_density", "psnr_db", "ssim")
    return head, [[r[c] for c in columns] for r in rows]


def accuracy(*settings: list[Row]) -> Table:
    """Share of right videos of the embedded model, with 95 % bootstrap intervals over videos; a line for each file."""
    lines = []
    for name, videos in zip(ACCURACY, settings, strict=True):
        shares = [[float(v[f"{what}_right"]) for v in videos] for what in ("colour", "shape", "motion")]
        if videos:
            lines.append([name, str(len(videos)), *(_share(right) for right in shares)])
    return ["setting", "videos", "colour", "shape", "motion class"], lines


def _share(right: list[float]) -> str:
    return "{} % ({} to {})".format(*(f"{100 * x:.0f}" for x in interval(right)))


def densities(rows: list[Row]) -> Table:
    """Radial maps with the defaults of each model."""
    lines = []
    for r in rows:
        density = r["video_density"] if r["density"] == r["video_density"] else f"{r['video_density']} ({r['density']})"
        lines.append([
            f"{r['model']} {r['pixels']}", f"{int(r['tokens']):,}", r["block"], r["decay"], density,
            r["average_density"], f"{r['attention_bound']}x faster",
        ])  # fmt: skip
    head = [
        "model, size", "tokens", "block", "decay", "video density (with text)", "averaged over 50 steps",
        "attention at most",
    ]  # fmt: skip
    return head, lines


def coverage(rows: list[Row]) -> Table:
    """Radial's two block rules against dense, on the embedded model."""
    head = [
        "frames x H x W", "rule", "decay", "video density", "prediction against dense, relative L2 (95 %)",
        "growth of the loss (95 %)",
    ]  # fmt: skip
    return head, [
        [r["size"], r["coverage"], r["decay"], r["density"], ranged(r, "relative_l2"), ranged(r, "loss_growth")]
        for r in rows
    ]


def recall(rows: list[Row]) -> Table:
    """Recall and output error of every method at some densities, over all steps after the search."""
    rows = [r for r in rows if r["step"] == "all"]
    lines = []
    for method, block in dict.fromkeys((r["method"], r["block"]) for r in rows):
        if block == "64x64" or method == "adaspa":
            found = {(r["frames"], r["asked_density"]): r for r in rows if (r["method"], r["block"]) == (method, block)}
            cells = [f"{found[c]['recall']}, {found[c]['error']}" if c in found else "-" for c in RECALL_AT]
            lines.append([method, block, *cells])
    return ["recall, error", "block", *(f"{frames} frames at {density}" for frames, density in RECALL_AT)], lines


def rounding(rows: list[Row]) -> Table:
    """What integers alone do to dense attention on real queries, keys and values."""
    rows = [r for r in rows if r["method"] == "dense" and r["quant"]]
    head = ["integers", "frames", "calls", "relative L2 error (95 %)", "least cosine of a call"]
    return head, [[r["quant"], r["frames"], r["calls"], ranged(r, "error"), r["cosine_worst"]] for r in rows]


def integer_errors(rows: list[Row]) -> Table:
    """How far integer attention is from fp64 on real and on hard inputs, by kind of integers."""
    kinds = list(dict.fromkeys(r["quant"] for r in rows))
    lines = []
    for inputs in dict.fromkeys(r["inputs"] for r in rows):
        found = {r["quant"]: r for r in rows if r["inputs"] == inputs}
        cells = [f"{float(found[k]['error']):.2%} ({float(found[k]['error_worst']):.2%})" for k in kinds]
        lines.append([inputs, *cells])
    return ["inputs", *kinds], lines
