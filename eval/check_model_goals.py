"""What the rows of `eval/bench_model.py` say about the goals that were set for whole models.

    python eval/check_model_goals.py             print the table and write assets/results/model_goals.csv
    python eval/check_model_goals.py --strict    exit with 1 where a must is missed, or was not measured

A figure is the time of a step of one contender over that of another, of the same case and card, both from the newest
commit that has both. "Dense" is the fastest dense contender in bfloat16 of that commit and card, whichever that is; so
is "integers" the faster of INT8 attention with 16-bit values and with FP8 values. The
goals are of Radial Attention at its default density; AdaSpa, and what Diffusers as shipped and FlashAttention-2 take,
are listed without a bound. Tables of the pages are made from the output by `python eval/readme_tables.py`.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
from dataclasses import dataclass
from pathlib import Path

from videosparse.benchmark.rows import read_rows, write_rows
from videosparse.benchmark.step_tables import DENSE, STACK

RESULTS = Path(__file__).resolve().parents[1] / "assets/results"
COLUMNS = (
    "case", "goal", "measured", "must", "wanted", "verdict", "detail", "command", "gpu", "run", "commit",
)  # fmt: skip
NEEDED = ("case", "contender", "forward_s", "layers_timed", "gpu", "commit", "run", "note")
Row = dict[str, str]


@dataclass(frozen=True)
class Goal:
    """A bound on how many times faster a step is.

    Args:
        case: as rows call it.
        title: what is compared.
        slower: the contenders of which the fastest is compared with.
        faster: the contenders of which the fastest is to be faster.
        must, wanted: bounds; None where there is none.
    """

    case: str
    title: str
    slower: tuple[str, ...]
    faster: tuple[str, ...]
    must: float | None = None
    wanted: float | None = None

    def verdict(self, value: float) -> str:
        """ "pass", "must only" or "miss"; "" without bounds."""
        if self.must is None or self.wanted is None:
            return ""
        return "pass" if value >= self.wanted else "must only" if value >= self.must else "miss"

    @property
    def command(self) -> str:
        """What measures it."""
        names = dict.fromkeys([*self.slower, *self.faster])
        return f'python eval/bench_model.py --case "{self.case}" --only {" ".join(names)}'


BOUNDS = {
    "wan2.1-14b 720x1280x81": ((2.0, 2.3), (2.9, 3.5)),
    "wan2.1-14b 720x1280x321": ((3.5, 4.5), (5.0, 6.5)),
    "hunyuan-video 720x1280x129": ((2.0, 2.4), (2.9, 3.5)),
    "hunyuan-video 720x1280x509": ((4.4, 5.5), (6.0, 8.0)),
}
"""By case: (must, goal) of a sparse step in bfloat16, and with integer attention and FP8 linear layers."""


def goals() -> list[Goal]:
    """In the order of the table."""
    found = []
    for case, (plain, stack) in BOUNDS.items():
        found += [
            Goal(case, "Radial against the fastest dense", DENSE, ("radial",), *plain),
            Goal(case, "Radial, integers and FP8 linears against the fastest dense", DENSE, STACK, *stack),
            Goal(case, "Radial against Diffusers as shipped", ("stock",), ("radial",)),
            Goal(case, "Radial against FlashAttention-2", ("fa2",), ("radial",)),
            Goal(case, "Radial, integers and FP8 linears against Diffusers as shipped", ("stock",), STACK),
            Goal(case, "AdaSpa against the fastest dense", DENSE, ("adaspa",)),
            Goal(case, "AdaSpa, INT8 and FP8 linears against the fastest dense", DENSE, ("adaspa-stack",)),
        ]
    return found


def check(rows: list[Row]) -> list[Row]:
    """The table: a line for each goal."""
    return [_line(goal, rows) for goal in goals()]


def _line(goal: Goal, rows: list[Row]) -> Row:
    line = {
        "case": goal.case, "goal": goal.title, "must": _bound(goal.must), "wanted": _bound(goal.wanted),
        "verdict": "not measured", "command": goal.command,
    }  # fmt: skip
    pair = _pair(goal, rows)
    if pair is None:
        return line
    slower, faster = pair
    value = float(slower["forward_s"]) / float(faster["forward_s"])
    told = " against ".join(f"{r['contender']} {float(r['forward_s']):.2f} s" for r in (faster, slower))
    line |= {"measured": f"{value:.2f}", "verdict": goal.verdict(value), "detail": f"{told} a forward"}
    return line | {name: faster[name] for name in ("gpu", "run", "commit")}


def _pair(goal: Goal, rows: list[Row]) -> tuple[Row, Row] | None:
    """The rows to compare, slower and faster: the newest of one commit and card that timed as many layers."""
    usable = [r for r in rows if r["case"] == goal.case and r["forward_s"] and not r["note"]]
    usable.sort(key=lambda r: r["run"], reverse=True)
    for newest in (r for r in usable if r["contender"] in goal.faster):
        same = [r for r in usable if all(r[name] == newest[name] for name in ("gpu", "commit", "layers_timed"))]
        slower = _fastest(same, goal.slower)
        if slower is not None:
            faster = _fastest(same, goal.faster)
            assert faster is not None  # `newest` is one
            return slower, faster
    return None


def _fastest(rows: list[Row], names: tuple[str, ...]) -> Row | None:
    """Of the newest row of each contender; rows come newest first."""
    newest = {r["contender"]: r for r in reversed(rows) if r["contender"] in names}
    return min(newest.values(), key=lambda r: float(r["forward_s"]), default=None)


def _bound(value: float | None) -> str:
    return "" if value is None else f">= {value:g}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "models.csv")
    parser.add_argument("--output", type=Path, default=RESULTS / "model_goals.csv")
    parser.add_argument("--strict", action="store_true", help="fail where a must is missed or was not measured")
    args = parser.parse_args(argv)
    try:
        table = check(read_rows(args.rows, NEEDED))
    except ValueError as error:
        parser.error(str(error))
    write_rows(args.output, table, COLUMNS)
    for line in table:
        measured = f"{line['measured']:>6}x" if "measured" in line else f"{'-':>7}"
        bounds = f"must {line['must']:7} wanted {line['wanted']:7}" if line["must"] else " " * 27
        print(f"{line['verdict']:12} {measured} {bounds} {line['case']}: {line['goal']}")
        if "detail" in line:
            print(f"{'':20}{line['detail']}")
    return int(args.strict and any(line["must"] and line["verdict"] in ("miss", "not measured") for line in table))


if __name__ == "__main__":
    run_program(main)
