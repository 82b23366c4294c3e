"""Tables of whole models: rows of `eval/bench_model.py`, `eval/check_model_goals.py` and `eval/profile_step.py`."""

from __future__ import annotations

from videosparse.benchmark.kernel_names import GAPS, PARTS, UNKNOWN
from videosparse.benchmark.tables import Row, Table, markdown
from videosparse.benchmark.whole import STEP_CASES

DENSE = ("dense", "dense-eager", "stock", "fa2")
"""Contenders that multiply all blocks in bfloat16; the fastest is what sparse ones are compared with."""

STACK = ("stack", "stack-fp8")
"""Contenders with integers in attention and FP8 linear layers."""

NOT_MEASURED = "not measured"


def newest(rows: list[Row], case: str) -> dict[str, Row]:
    """The rows of a case by contender, all of the card of its newest figure, each of the newest commit that it ran at.

    Of several such rows of a contender one with a figure counts, and that with most layers.
    """
    found = sorted((r for r in rows if r["case"] == case), key=lambda r: r["run"])
    timed = [r for r in found if r["forward_s"]]
    if not timed:
        return {}
    here = [r for r in found if r["gpu"] == timed[-1]["gpu"]]
    commits = {r["contender"]: r["commit"] for r in here}
    own = [r for r in here if r["commit"] == commits[r["contender"]]]
    return {r["contender"]: r for r in sorted(own, key=lambda r: (bool(r["forward_s"]), int(r["layers_timed"])))}


def fastest(rows: dict[str, Row], names: tuple[str, ...]) -> Row | None:
    """The fastest of some contenders of a case, of those of the newest commit with most layers."""
    timed = [rows[name] for name in names if name in rows and rows[name]["forward_s"]]
    if not timed:
        return None
    commit = max(timed, key=lambda r: r["run"])["commit"]
    here = [r for r in timed if r["commit"] == commit]
    most = max(int(r["layers_timed"]) for r in here)
    return min((r for r in here if int(r["layers_timed"]) == most), key=lambda r: float(r["forward_s"]))


def overview(rows: list[Row]) -> Table:
    """A line for each case with rows: the fastest dense, Radial, and all: with integers and FP8 linear layers, too."""
    lines = []
    for case in STEP_CASES:
        found = newest(rows, case)
        if not found:
            continue
        dense, stock = fastest(found, DENSE), found.get("stock")
        radial = _timed(found, "radial") or _timed(found, "radial-eager")
        stack = fastest(found, STACK) or found.get("stack")
        told = f" ({dense['contender']})" if dense is not None and dense["contender"] in ("stock", "fa2") else ""
        sparse = [_seconds(row) + (f" ({gain})" if (gain := _gain(dense, row)) else "") for row in (radial, stack)]
        lines.append([
            case, "" if radial is None else f"{float(radial['density']):.2f}", _seconds(stock),
            _seconds(dense) + told, *sparse, ", ".join(_minutes(r) for r in (dense, radial, stack)),
        ])  # fmt: skip
    head = [
        "model, size", "density", "Diffusers as shipped, s a step", "fastest dense, s", "Radial, s (gain)",
        "all, s (gain)", "50 steps, min: dense, Radial, all",
    ]  # fmt: skip
    return head, lines


def missing(rows: list[Row]) -> str:
    """A sentence that names the cases without rows; empty when there are none."""
    cases = [case for case in STEP_CASES if not newest(rows, case)]
    return f"Not measured yet: {', '.join(cases)}." if cases else ""


def every_row(rows: list[Row]) -> Table:
    """A line for each contender of each case with rows."""
    lines = []
    for case in STEP_CASES:
        for row in newest(rows, case).values():
            if not row["forward_s"]:
                lines.append([case, row["contender"], "", "", row["note"], "", "", "", ""])
                continue
            timed = "all" if row["layers_timed"] == row["layers"] else row["layers_timed"]
            search = f"{float(row['search_s']):.2f}" if row["search_s"] else ""
            lines.append([
                case, row["contender"], row["backend"], f"{float(row['density']):.2f}", _seconds(row),
                search, _gain(_beside(rows, row), row), _minutes(row),
                f"{timed} of {row['layers']}, {float(row['peak_gb'] or 0):.0f} GB",
            ])  # fmt: skip
    head = [
        "model, size", "contender", "attention by", "density", "s a step", "a forward that searches, s",
        "against the fastest dense", "50 steps, min", "layers timed, peak with them",
    ]  # fmt: skip
    return head, lines


def extrapolation(rows: list[Row]) -> Table:
    """A line for each contender that was timed with all layers and with few, on one card at one commit."""
    lines = []
    for whole in (r for r in rows if r["layers_timed"] == r["layers"] and r["forward_s"]):
        same = ("case", "contender", "gpu", "commit")
        for few in rows:
            if few["layers_timed"] != few["layers"] and few["forward_s"] and all(few[n] == whole[n] for n in same):
                found, told = float(whole["forward_s"]), float(few["forward_s"])
                lines.append([
                    whole["case"], whole["contender"], f"{found:.3f}", f"{told:.3f}", few["layers_timed"],
                    f"{100 * (told / found - 1):+.1f} %",
                ])  # fmt: skip
    return ["model, size", "contender", "all layers, s a forward", "from few", "layers", "off by"], lines


def goals(rows: list[Row]) -> Table:
    """What was measured of whole models, and all that must be, from `eval/check_model_goals.py`."""
    head = ["model, size", "a sparse step", "measured", "must", "goal", "", "seconds"]
    return head, [
        [r["case"], r["goal"], r["measured"] and f"{r['measured']}x", r["must"], r["wanted"], r["verdict"], r["detail"]]
        for r in rows if r["measured"] or r["must"]
    ]  # fmt: skip


def profile(rows: list[Row]) -> str:
    """Where the time of a layer goes, in Markdown: a table for each case, below its name."""
    return "\n\n".join(f"{case}\n\n{markdown((head, lines))}" for case, head, lines in parts(rows))


def parts(rows: list[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(case, head, lines) of each case: milliseconds of a layer by part, a column for each contender."""
    tables = []
    for case in dict.fromkeys(r["case"] for r in rows):
        here = [r for r in rows if r["case"] == case]
        names = list(dict.fromkeys(r["contender"] for r in here))
        cells = {(r["part"], r["contender"]): f"{float(r['ms']):.1f} ({float(r['share']):.0f} %)" for r in here}
        ordered = [part for part in (*PARTS, GAPS) if any((part, name) in cells for name in names)]
        lines = [[part, *(cells.get((part, name), "") for name in names)] for part in ordered]
        whole = {r["contender"]: f"{float(r['layer_ms']):.1f}" for r in here}
        lines.append(["a layer", *(whole[name] for name in names)])
        lines += [
            [f"unknown in {r['contender']}: {r['longest']}", *("" for _ in names)]
            for r in here if r["part"] == UNKNOWN
        ]  # fmt: skip
        tables.append((case, ["ms a layer", *names], lines))
    return tables


def _beside(rows: list[Row], row: Row) -> Row | None:
    """The fastest dense row that compares with another; none with a step that a cache skips, and no eager one."""
    same = ("case", "gpu", "commit", "layers_timed")
    here = {r["contender"]: r for r in rows if all(r[name] == row[name] for name in same)}
    dense = None if row["contender"] == "cached" else fastest(here, DENSE)
    return None if dense is None or dense["contender"] == "dense-eager" else dense


def _timed(rows: dict[str, Row], name: str) -> Row | None:
    row = rows.get(name)
    return row if row is not None and row["forward_s"] else None


def _seconds(row: Row | None) -> str:
    """Of a step, with a word where nothing is compiled though others of its kind are."""
    if row is None or not row["forward_s"]:
        return row["note"].partition(":")[0] if row is not None else NOT_MEASURED
    eager = " (eager)" if row["contender"].endswith("-eager") else ""
    return f"{float(row['step_s']):.2f}{eager}"


def _gain(dense: Row | None, row: Row | None) -> str:
    if dense is None or row is None or not row["forward_s"]:
        return ""
    return f"{float(dense['forward_s']) / float(row['forward_s']):.2f}x"


def _minutes(row: Row | None) -> str:
    return f"{float(row['run_s']) / 60:.1f}" if row is not None and row["run_s"] else "-"


def shared(rows: list[Row]) -> Table:
    """A line for each forward that several GPUs shared: seconds, how many times faster than one, and how far apart."""
    lines = [
        [
            row["case"], row["contender"], f"{float(row['density']):.2f}", row["layers"],
            f"{float(row['alone_s']):.3f}", f"{float(row['shared_s']):.3f} ({float(row['scaling']):.2f}x)",
            f"{float(row['difference']):.1e}" if float(row["difference"]) else "the same bits",
            f"{float(row['peak_gb_alone']):.1f}, {float(row['peak_gb_shared']):.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    gpus = next((row["gpus"] for row in rows), "")
    head = [
        "model, size", "attention", "density", "layers", "one GPU, s a forward", f"{gpus} GPUs, s",
        "outputs differ by",
        "peak, GB: one, each",
    ]  # fmt: skip
    return head, lines
