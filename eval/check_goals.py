"""What the rows of `eval/bench_attention.py` say about the goals that were set for the kernels.

    python eval/check_goals.py             print the table and write assets/results/attention_goals.csv
    python eval/check_goals.py --strict    exit with 1 where a must is missed, or was not measured

A figure compares rows of one set of one run, since only those were timed in turn on the same card; of several runs the
newest that has both counts, for each figure by itself: columns `run` and `commit` say which. It is of the size that the
goal is about, where that was timed, else of a smaller one: column `case` says which. Figures of calls that are repeated
are of rows of two stretches or more: single ones did not take turns. The table of README.md is made from the output by
`python eval/readme_tables.py`.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from videosparse.benchmark.rows import read_rows, repeated_ms
from videosparse.policies.base import BLOCK

RESULTS = Path(__file__).resolve().parents[1] / "assets/results"
COLUMNS = ("goal", "case", "measured", "unit", "must", "wanted", "verdict", "detail", "gpu", "run", "commit")
LARGE, SMALL, LONGEST = "wan2.1-14b 720x1280x81", "12x30720", "wan2.1-14b 720x1280x321"
NARROW = ("40x75600 d64", "12x30720 d64")
FASTEST = ("cudnn", "fa3", "fa4", "fa2")

Row = dict[str, str]
Choice = Callable[[list[Row], str], Row | None]
"""Of the rows of a set, the one to compare by a column of times."""


@dataclass(frozen=True)
class Found:
    """A measured figure, and the rows that it comes from."""

    value: float
    detail: str
    row: Row


@dataclass(frozen=True)
class Goal:
    """A bound on a figure.

    Args:
        title: what is compared.
        must, wanted: bounds; the second is the ambition.
        measure: the figure of a case, None where rows are missing.
        cases: in the order of preference; the first that was measured counts.
        at_most: whether smaller is better.
        unit: "x" for ratios.
    """

    title: str
    must: float
    wanted: float
    measure: Callable[[Runs, str], Found | None]
    cases: tuple[str, ...] = (LARGE, SMALL)
    at_most: bool = False
    unit: str = "x"

    def verdict(self, value: float) -> str:
        """ "pass", "must only" or "miss"."""
        sign = -1 if self.at_most else 1
        if sign * value >= sign * self.wanted:
            return "pass"
        return "must only" if sign * value >= sign * self.must else "miss"


class Runs:
    """The timed rows, by set and run, newest run first."""

    def __init__(self, rows: list[Row]) -> None:
        self.sets: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self.sets.setdefault((row["run"], row["set"]), []).append(row)

    def of(self, case: str, what: str) -> Iterator[list[Row]]:
        """Rows of sets of one case and pass, newest first."""
        for key in sorted(self.sets, reverse=True):
            rows = [r for r in self.sets[key] if r["case"] == case and r["pass"] == what and r["p50_ms"]]
            if rows:
                yield rows


def milliseconds(row: Row, column: str) -> float | None:
    """A time of a row; None where it was not measured, and `steady_ms` where the call was not repeated in turn."""
    if column == "steady_ms":
        return repeated_ms(row)
    return float(row[column]) if row.get(column) else None


def pick(rows: list[Row], kernel: str | tuple[str, ...], column: str = "p50_ms", **wanted: str | float) -> Row | None:
    """The row of a kernel, or of several, whose columns are as wanted; densities may differ by a hundredth.

    Of several the fastest by `column`, and only those that have a time there.
    """
    kernels = (kernel,) if isinstance(kernel, str) else kernel
    found = [r for r in rows if r["kernel"] in kernels and all(_same(r[name], v) for name, v in wanted.items())]
    timed = [(ms, i) for i, row in enumerate(found) if (ms := milliseconds(row, column)) is not None]
    return found[min(timed)[1]] if timed else None


def _same(cell: str, value: str | float) -> bool:
    return cell == value if isinstance(value, str) else abs(float(cell) - value) <= 0.01


def times(first: Row | None, second: Row | None, column: str = "p50_ms") -> Found | None:
    """How many times faster the second row is than the first, by a column of times that `milliseconds` knows."""
    if first is None or second is None:
        return None
    slow, fast = milliseconds(first, column), milliseconds(second, column)
    if slow is None or fast is None:
        return None
    return Found(slow / fast, f"{_name(second)} {fast:.2f} ms against {_name(first)} {slow:.2f} ms", second)


def _name(row: Row) -> str:
    return " ".join(x for x in (row["kernel"], row["policy"] if row["policy"] != "dense" else "", row["block"]) if x)


def compare(
    what: str, slower: Choice, faster: Choice, invert: bool = False, column: str = "p50_ms"
) -> Callable[[Runs, str], Found | None]:
    """time(slower) / time(faster), or its inverse, in the newest set of a pass that has both; `column` is the time."""

    def measure(runs: Runs, case: str) -> Found | None:
        for rows in runs.of(case, what):
            found = times(slower(rows, column), faster(rows, column), column)
            if found is not None:
                return Found(1 / found.value, found.detail, found.row) if invert else found
        return None

    return measure


def chosen(kernel: str | tuple[str, ...], **wanted: str | float) -> Choice:
    return lambda rows, column: pick(rows, kernel, column, **wanted)


WIDE, FINE = "128x128", "128x64"


def _densities(rows: list[Row], kernel: str) -> list[str]:
    return sorted({r["density"] for r in rows if r["kernel"] == kernel and r["policy"] == "uniform"})


def finer_blocks(runs: Runs, case: str) -> Found | None:
    """Worst time of 64-wide keys over that of 128-wide ones, at equal density."""
    worst: Found | None = None
    for rows in runs.of(case, "forward"):
        for density in _densities(rows, "ours"):
            wanted = {"policy": "uniform", "density": float(density)}
            fine, wide = pick(rows, "ours", block=FINE, **wanted), pick(rows, "ours", block=WIDE, **wanted)
            found = times(fine, wide)
            if found is not None and (worst is None or found.value > worst.value):
                worst = found
        if worst is not None:
            return worst
    return None


def build(runs: Runs, case: str) -> Found | None:
    """Milliseconds of map and lists with the default block; where it was not timed, of that before it, and says so."""
    default = "x".join(map(str, BLOCK))
    for block, note in ((default, ", the default"), (WIDE, f"; not timed with the default, {default}")):
        for rows in runs.of(case, "index"):
            if (row := pick(rows, "index", block=block)) is not None:
                what = f"{int(row['tokens']):,} tokens in blocks of {block}{note}"
                return Found(float(row["p50_ms"]), what, row)
    return None


def memory(runs: Runs, case: str) -> Found | None:
    """Memory beyond q, k, v and the output, lists included, as a percentage of q + k + v."""
    for rows in runs.of(case, "forward"):
        row = pick(rows, "ours", policy="radial")
        if row is not None:
            given = 3 * 2 * int(row["tokens"]) * int(row["heads"]) * int(row["head_dim"]) / 1e6
            return Found(100 * (float(row["extra_mb"]) + float(row["lists_mb"])) / given, "radial, shared map", row)
    return None


def goals() -> list[Goal]:
    """In the order of the table."""
    uniform = {"policy": "uniform", "block": WIDE}
    full = chosen("ours", policy="full")
    found = [
        Goal(
            "full map against the fastest dense kernel",
            0.92,
            1.0,
            compare("forward", chosen(FASTEST, policy="dense"), full),
        )
    ]
    for density, must in ((0.5, 0.98), (0.25, 1.0), (0.1, 1.05), (0.05, 1.1)):
        measure = compare(
            "forward", chosen("fa4", density=density, **uniform), chosen("ours", density=density, **uniform)
        )
        found.append(Goal(f"density {density:g} against FlashAttention-4 block-sparse", must, max(must, 1.05), measure))
    measure = compare("forward", chosen("flex", density=0.25, **uniform), chosen("ours", density=0.25, **uniform))
    found.append(Goal("density 0.25 against FlexAttention", 1.6, 1.8, measure))
    found.append(Goal("64-wide keys: time over 128-wide", 1.03, 1.01, finer_blocks, at_most=True))
    for policy, must, wanted in (("two dense rows", 1.05, 1.02), ("u^2", 1.12, 1.04)):
        skew = {"policy": policy, "density": 0.1, "block": WIDE}
        measure = compare("forward", chosen("ours", **skew), chosen("ours", density=0.1, **uniform))
        found.append(Goal(f"{policy}: time over uniform rows", must, wanted, measure, at_most=True))
    found += [
        Goal(
            "head_dim 64, full map against the fastest dense kernel", 0.8, 0.95,
            compare("forward", chosen(FASTEST, policy="dense"), full), NARROW,
        ),
        *_backward(uniform),
        *_integers(uniform),
        Goal("map and lists built, ms", 20, 5, build, (LONGEST,), at_most=True, unit="ms"),
        Goal(
            "block_sums: time over own dense forward", 0.6, 0.5,
            compare("sums", chosen("block_sums", block=WIDE), chosen("ours", policy="dense")), at_most=True,
        ),
        Goal("memory beyond q + k + v + out, lists included", 5, 2, memory, (LONGEST, LARGE), at_most=True, unit="%"),
    ]  # fmt: skip
    return found


def _backward(uniform: dict[str, str]) -> list[Goal]:
    dense, both = chosen("ours", policy="dense"), "forward+backward"
    total = compare(both, chosen("ours", density=0.1, **uniform), chosen(FASTEST, policy="dense"))
    return [
        Goal("backward, dense, against cuDNN", 0.85, 1.0, compare("backward", chosen("cudnn"), dense)),
        Goal(
            "backward, dense, against the fastest", 0.68, 0.85,
            compare("backward", chosen(FASTEST, policy="dense"), dense),
        ),
        Goal("forward+backward at density 0.1: time over dense fastest", 0.16, 0.13, total, at_most=True),
    ]  # fmt: skip


def _integers(uniform: dict[str, str]) -> list[Goal]:
    """Two lines each: integers cost less power, and a card bound by power gives that back only after a while."""
    at = {"density": 0.25, **uniform}
    ways = (("repeated in stretches that take turns", "steady_ms"), ("right behind 15 ms of products", "p50_ms"))
    return [
        Goal(
            f"{title}, density 0.25, quantization included, against own bf16, {way}", must, wanted,
            compare("forward", chosen("ours", **at), chosen(kernel, **at), column=column),
        )
        for kernel, title, must, wanted in (
            ("int8", "INT8 queries and keys", 1.1, 1.2), ("int8-fp8", "the same with FP8 values", 1.25, 1.45),
        )
        for way, column in ways
    ]  # fmt: skip


def check(rows: list[Row]) -> list[Row]:
    """The table: a line for each goal."""
    runs, table = Runs(rows), []
    for goal in goals():
        found = next((f for case in goal.cases if (f := goal.measure(runs, case)) is not None), None)
        line = {
            "goal": goal.title,
            "unit": goal.unit,
            "must": _bound(goal, goal.must),
            "wanted": _bound(goal, goal.wanted),
        }
        if found is None:
            table.append(line | {"verdict": "not measured"})
            continue
        line |= {name: found.row[name] for name in ("case", "gpu", "run", "commit")}
        measured = {"measured": f"{found.value:.3f}", "verdict": goal.verdict(found.value), "detail": found.detail}
        table.append(line | measured)
    return table


def _bound(goal: Goal, value: float) -> str:
    return f"{'<=' if goal.at_most else '>='} {value:g}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "attention.csv")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention_goals.csv")
    parser.add_argument("--strict", action="store_true", help="fail where a must is missed or was not measured")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.rows, ("set", "case", "kernel", "p50_ms", "run"))
    except ValueError as error:
        parser.error(str(error))
    table = check(rows)
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}.")
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(table)
    for line in table:
        measured = f"{line.get('measured', '-'):>8} {line['unit']:2}"
        print(f"{line['verdict']:12} {measured} must {line['must']:8} wanted {line['wanted']:8} {line['goal']}")
        if "detail" in line:
            print(f"{'':25}{line['case']}: {line['detail']}")
    return int(args.strict and any(line["verdict"] in ("miss", "not measured") for line in table))


if __name__ == "__main__":
    run_program(main)
