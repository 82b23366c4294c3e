"""Tables of the rows of `eval/bench_training.py` and `eval/score_lora_lengths.py`: training steps, and long videos."""

from __future__ import annotations

from videosparse.benchmark.tables import Row, Table

SETTINGS = {
    ("truth", "none"): "rendered truth",
    ("none", "dense"): "no training, dense",
    ("none", "radial"): "no training, Radial",
    ("riflex", "dense"): "no training, RIFLEx, dense",
    ("ultravico", "dense"): "no training, UltraViCo, dense",
    ("windows", "dense"): "no training, context windows, dense",
    ("dense", "dense"): "LoRA trained dense",
    ("radial", "radial"): "LoRA trained with Radial",
}
"""What `eval/score_lora_lengths.py` compares, by the columns lora and method."""

LENGTHS = ("81", "161", "321")
"""Pixel frames at which it is compared."""

TRAINING_COLUMNS = ("training_steps", "training_s", "training_peak_gib")

_KERNELS = ("cudnn", "fa2", "fa4")


def steps(rows: list[Row]) -> Table:
    """Seconds of a training step by model, length and number of GPUs, and how many times as long dense takes."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for r in rows:
        cases.setdefault((r["case"], r["frames"], r.get("gpus") or "1"), {})[r["attention"]] = r
    lines = []
    for (case, frames, gpus), found in cases.items():
        first = next(iter(found.values()))
        gains = [found.get("radial", {}).get(f"against_{name}") for name in _KERNELS]
        dense = [
            _step(found.get(name)) + (f" ({float(gain):.2f}x)" if gain else "")
            for name, gain in zip(_KERNELS, gains, strict=True)
        ]
        size = f"{case}, {frames} frames"
        lines.append([
            size, f"{first['times_length']}x", f"{int(first['tokens']):,}", gpus, _step(found.get("radial")), *dense,
        ])  # fmt: skip
    head = [
        "model, size", "length", "tokens", "GPUs", "Radial, s", "dense by cuDNN, s", "by FlashAttention-2, s",
        "by FlashAttention-4, s",
    ]  # fmt: skip
    return head, lines


def _step(row: Row | None) -> str:
    """Seconds of a training step, or why there are none."""
    if row is None:
        return "not timed"
    if row["extrapolated_step_s"]:
        return f"{float(row['extrapolated_step_s']):.0f}"
    return row["note"] if row["note"] == "out of memory" else "not installed"


def lengths(rows: list[Row]) -> Table:
    """Every setting that has a row, length by length, with 95 % intervals."""
    lines = []
    for (lora, method, frames), setting in _places().items():
        r = _at(rows, lora, method, frames)
        if r is None:
            continue
        cells = [_percent(r, name) for name in (*(f"right_q{q}" for q in (1, 2, 3, 4)), "drift")]
        repetition = "{:.2f} ({:.2f} to {:.2f})".format(*_ranged(r, "repetition"))
        training = ", ".join(filter(None, (r[name] for name in TRAINING_COLUMNS))) or "-"
        lines.append(
            [f"{frames} frames", setting, r["videos"], *cells, repetition, _percent(r, "permanence"), training]
        )
    head = [
        "frames", "setting", "videos", "right in the first quarter, %", "second", "third", "last", "drift, points",
        "repetition beyond the truth's", "permanence, %", "training: steps, s, peak GiB",
    ]  # fmt: skip
    return head, lines


def missing_lengths(rows: list[Row]) -> str:
    """A sentence that names the settings without a row; empty where there are none."""
    missing: dict[str, list[str]] = {}
    for place, setting in _places().items():
        if _at(rows, *place) is None:
            missing.setdefault(setting, []).append(place[2])
    named = [f"{setting} at {', '.join(lengths)} frames" for setting, lengths in missing.items()]
    return f"Not measured yet: {'; '.join(named)}." if named else ""


def _places() -> dict[tuple[str, str, str], str]:
    """Settings by LoRA, method and frames, in the order of the table."""
    return {(*place, frames): setting for frames in LENGTHS for place, setting in SETTINGS.items()}


def _at(rows: list[Row], lora: str, method: str, frames: str) -> Row | None:
    found = [r for r in rows if (r["lora"], r["method"], r["frames"]) == (lora, method, frames)]
    return found[-1] if found else None


def _percent(row: Row, name: str) -> str:
    return "{} ({} to {})".format(*(round(100 * value) for value in _ranged(row, name)))


def _ranged(row: Row, name: str) -> list[float]:
    """A mean and the ends of its interval."""
    return [float(row[name + end]) for end in ("", "_low", "_high")]
