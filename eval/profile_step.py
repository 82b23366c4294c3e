"""Where the time of a denoising step goes, part by part: whole layers at full size, with random weights.

    python eval/profile_step.py                                   Wan2.1-14B, 81 frames, HunyuanVideo, 129: 720x1280
    python eval/profile_step.py --case "wan2.1-14b 720x1280x321" --only dense radial
    python eval/profile_step.py --plot                            draw assets/figures/profile.png from the rows
    python eval/profile_step.py --case "wan2.1-1.3b 64x64x5" --only stock radial-eager --output some.csv    on a CPU

Contenders are those of `eval/bench_model.py`, but every layer is sparse: what is told is a layer, the mean of those
that were built. Each is timed without the profiler first (`layer_ms`), then one forward is traced by torch.profiler and
its kernels are sorted into parts by the table `videosparse.benchmark.kernel_names.RULES`; a kernel that no rule knows
is in the part "unknown", by name. "between kernels" is the timed forward less its kernels: starting them, planning, the
GPU waiting. Embeddings and the head are in it as well, a share that shrinks with the layers: three are enough to see
where time goes. On a CPU, operations take the place of kernels.

Rows go to `assets/results/profile.csv`, in place of those of the same case and contender; tables and the page
`assets/results/profile.md` are made from them by `python eval/readme_tables.py`.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from videosparse.attach import tracker_of
from videosparse.benchmark.figures import save_figure
from videosparse.benchmark.kernel_names import GAPS, PARTS, part_of
from videosparse.benchmark.profiling import sums, trace, works
from videosparse.benchmark.rows import WHERE, environment, read_rows, write_rows
from videosparse.benchmark.step_contenders import STEP_CONTENDERS, StepContender, bound, fastest_kernel
from videosparse.benchmark.transformer import build, make_inputs
from videosparse.benchmark.whole import STEP_CASES, case_of
from videosparse.cases import Case
from videosparse.generation.errors import GenerationError
from videosparse.generation.linears import quantize_linears

ROOT = Path(__file__).resolve().parents[1]
OUTPUT, FIGURE = ROOT / "assets/results/profile.csv", ROOT / "assets/figures/profile.png"
COLUMNS = (
    "case", "contender", "layers", "density", "layer_ms", "part", "ms", "share", "kernels", "longest", *WHERE,
)  # fmt: skip
CASES = (STEP_CASES[0], STEP_CASES[2])
CONTENDERS = ("stock", "dense", "radial", "stack")
TIMED = 3


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.plot:
        plot(read_rows(args.output, COLUMNS), args.figure)
        print(args.figure)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = environment(args.commit)
    for case in args.case:
        best, inputs = fastest_kernel(case, device), make_inputs(case, device)
        for contender in (replace(STEP_CONTENDERS[name], all_layers=True) for name in args.only):
            print(f"{case.name}, {contender.name} ...", flush=True)
            try:
                model = build(case.model, args.layers, device)
                if contender.linears != "none":
                    quantize_linears(model, kind=contender.linears)
                rows = profile(model, case, contender, inputs, best, args.layers)
            except (torch.OutOfMemoryError, GenerationError) as error:
                print(f"left out: {str(error).splitlines()[0]}", flush=True)
                continue
            others = [] if not args.output.exists() else read_rows(args.output, COLUMNS)
            same = (case.name, contender.name)
            kept = [row for row in others if (row["case"], row["contender"]) != same]
            write_rows(args.output, [*kept, *(row | where for row in rows)], COLUMNS)
            for row in rows:
                print(f"{float(row['ms']):9.2f} ms {float(row['share']):5.1f} %  {row['part']}", flush=True)
                if row["part"] == "unknown":
                    print(f"{'':20}{row['longest']}", flush=True)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=case_of, nargs="+", default=[case_of(name) for name in CASES])
    parser.add_argument("--only", nargs="+", choices=list(STEP_CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--commit", help="of the code; asked of git unless given")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--plot", action="store_true", help="draw the rows instead")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args(argv)
    for name in args.only:
        if STEP_CONTENDERS[name].searches or STEP_CONTENDERS[name].cached:
            parser.error(f"--only: {name} has steps of several kinds; choose of {', '.join(plain())}.")
    return args


def plain() -> list[str]:
    """Contenders of which one step is like another."""
    return [name for name, contender in STEP_CONTENDERS.items() if not (contender.searches or contender.cached)]


def profile(
    model: Any, case: Case, contender: StepContender, inputs: dict[str, torch.Tensor], best: str, layers: int
) -> list[dict[str, Any]]:
    """The rows of a contender, the longest part first."""
    device = inputs["hidden_states"].device
    with bound(model, contender, best), torch.no_grad():
        forward = partial(once, model, inputs)
        forward()  # compiles
        seconds = statistics.median(timed(forward, device) for _ in range(TIMED))
        found = works(trace(forward, device))
        density = 1.0
        if contender.method != "stock":
            density = tracker_of(model).session.processor.report().density
    parts = list(sums(found, part_of))
    busy = sum(took for _, took, _, _ in parts)
    parts.append((GAPS, max(0.0, seconds - busy), 0, ""))
    return [
        {
            "case": case.name, "contender": contender.name, "layers": layers, "density": f"{density:.4f}",
            "layer_ms": f"{1e3 * seconds / layers:.3f}", "part": part, "ms": f"{1e3 * took / layers:.3f}",
            "share": f"{100 * took / max(seconds, busy):.1f}", "kernels": f"{count / layers:.1f}", "longest": names,
        }
        for part, took, count, names in parts
    ]  # fmt: skip


def once(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """A forward of a further step."""
    inputs["timestep"].sub_(1)
    model(**inputs, return_dict=False)


def timed(forward: Any, device: torch.device) -> float:
    """Seconds of a forward."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    forward()
    wait()
    return time.perf_counter() - start


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """A bar for each case and contender, cut in parts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = list(dict.fromkeys((r["case"], r["contender"]) for r in rows))
    parts = [part for part in (*PARTS, GAPS) if any(r["part"] == part for r in rows)]
    colours = dict(zip(parts, pyplot.get_cmap("tab20").colors, strict=False))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.45 * len(bars)), layout="constrained")
    for place, bar in enumerate(bars):
        left = 0.0
        times = {r["part"]: float(r["ms"]) for r in rows if (r["case"], r["contender"]) == bar}
        for part in parts:
            axes.barh(place, times.get(part, 0.0), left=left, color=colours[part], label=None if place else part)
            left += times.get(part, 0.0)
    axes.set_yticks(range(len(bars)), [f"{case}\n{contender}" for case, contender in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms a layer and forward")
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, 120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_program(main)
