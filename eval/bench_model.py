"""How long a denoising step of a whole transformer takes, at full size with random weights, on one GPU.

    python eval/bench_model.py                                      all cases and contenders; --list names them
    python eval/bench_model.py --case "wan2.1-14b 720x1280x81"      one case, all contenders
    python eval/bench_model.py --only dense radial stack --seconds 200
    python eval/bench_model.py --case "wan2.1-14b 720x1280x81" --layers 40 --only dense radial
    python eval/bench_model.py --case "wan2.1-1.3b 64x64x5" --layers 2 --only stock radial-eager    on a CPU

A contender (`videosparse.benchmark.step_contenders`) is a method, the numbers that attention and the linear layers
multiply, and whether blocks are compiled. `dense` is the baseline: the fastest dense kernel that is installed
(FlashAttention-3 and -4 among them), blocks compiled. `stock` is Diffusers as shipped, `fa2` is Diffusers with
FlashAttention-2. Sparse contenders make a sparse step at their defaults: of Radial on Wan, the first layer is dense.
PARO has no plan here: it finds orders and maps in the run. All run on the same random weights (as `from_pretrained`
leaves them: bfloat16, some small parts fp32), latents and text; random weights do not change how long a call takes.

Few layers are built, and each of their blocks is timed within whole forwards. `forward_s` is the forward of the whole
model: the median block of each kind (dual- or single-stream, dense or sparse) times its count, and the rest; a row says
so in `forward_is`. Rows with all layers (--layers 40) are measured, and say how good that is. A step has two forwards
under guidance, one of HunyuanVideo. `run_s` is 50 steps by the method's own schedule, worked out: dense steps at the
rate of `dense` here (of `dense-fp8` where linear layers are FP8), one that searches, and sparse ones; text encoder and
VAE are not in it. `cached` is a step that FirstBlockCache skips; how many it skips is up to the model and a threshold,
which random weights cannot tell, so it has no `run_s`.

An output that is not finite is an error, and so is a dense contender in bfloat16 that is further than 2 % from another
(`difference`, relative L2). Outputs of sparse contenders differ from dense ones by what is left out, which on random
weights says nothing; their attention is checked against fp64 where it is timed, in `eval/bench_attention.py`.

A row is written as soon as it is measured, in place of the one before; several processes may write one file. A
contender that runs out of memory, or cannot run here, is a row that says so. --resume leaves out what has a row of this
commit and card. --seconds is hard: what is being timed then is given up, and what was left out is named.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import gc
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from videosparse.benchmark.contenders import Missing
from videosparse.benchmark.rows import WHERE, RowFile, environment, read_rows
from videosparse.benchmark.step_contenders import STEP_CONTENDERS, STEPS, StepContender, bound, fastest_kernel
from videosparse.benchmark.stepping import MOST_DIFFERENCE, Inputs, Stepped, difference, step
from videosparse.benchmark.transformer import branches_of, build, make_inputs
from videosparse.benchmark.whole import STEP_CASES, BlockTimes, case_of, whole_forward, whole_run
from videosparse.cases import MODELS, Case
from videosparse.generation.errors import GenerationError
from videosparse.generation.linears import quantize_linears
from videosparse.policies.base import Mode

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/models.csv"
COLUMNS = (
    "case", "model", "frames", "height", "width", "tokens", "contender", "method", "quant", "linears", "compiled",
    "backend", "density", "layers_timed", "timed_forward_s", "rest_s", "blocks", "layers", "forward_s", "forward_is",
    "step_s", "search_s", "dense_steps", "run_s", "run_is", "difference", "difference_from", "peak_gb", "timed", "note",
    *WHERE,
)  # fmt: skip
KEY = ("case", "contender", "layers_timed", "gpu", "commit")
LAYERS = 3


class OutOfTime(BaseException):
    """--seconds are over; no Exception, so that nobody on the way takes it for a failure of what was interrupted."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where, rows = environment(args.commit), RowFile(Path(args.output), COLUMNS, KEY)
    if args.merge:
        for row in args.merge:
            rows.add(row)
        print(f"{len(args.merge)} rows added to {args.output}")
        return 0
    started, failed, left = time.perf_counter(), [], []
    todo = [(case, STEP_CONTENDERS[name]) for case in args.case for name in STEP_CONTENDERS if name in args.only]
    if args.resume:
        known = {rows.key_of(row) for row in rows.rows() if not row["note"].startswith("failed")}
        todo = [pair for pair in todo if rows.key_of(key_of(*pair, args.layers, where)) not in known]
    if args.list:
        print("\n".join(f"{case.name}, {contender.name}: {contender.title}" for case, contender in todo))
        return 0
    bench: Bench | None = None
    with limit(args.seconds):
        for number, (case, contender) in enumerate(todo):
            try:
                if bench is None or bench.case is not case:
                    bench = None  # frees the model of the case before
                    bench = Bench(case, args.layers, device)
                print(f"{time.perf_counter() - started:5.0f} s  {case.name}, {contender.name} ...", flush=True)
                row = measure(bench, contender, rows, where)
            except OutOfTime:
                left = todo[number:]
                break
            rows.add(row)
            failed += [f"{case.name}, {contender.name}"] if row["note"] else []
            shown = ("forward_s", "forward_is", "search_s", "run_s", "density", "peak_gb", "difference", "note")
            print("        ", {name: row[name] for name in shown if row.get(name) not in (None, "")}, flush=True)
    for case, contender in left:
        print(f"left out, {args.seconds:.0f} s are over: {case.name}, {contender.name}")
    for told in failed:
        print(f"no figure: {told} (see the note in its row)")
    print(f"{len(todo) - len(left)} rows in {args.output}, {time.perf_counter() - started:.0f} s")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", type=case_of, nargs="+", default=[case_of(name) for name in STEP_CASES],
        metavar="MODEL HEIGHTxWIDTHxFRAMES", help="of the models " + ", ".join(MODELS),
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(STEP_CONTENDERS), default=list(STEP_CONTENDERS))
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help="to build and time; as many as the model has: no rest"
    )
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--resume", action="store_true", help="leave out what has a row of this commit and card")
    parser.add_argument("--list", action="store_true", help="print what would be timed, in its order")
    parser.add_argument("--merge", type=Path, help="measure nothing: add the rows of this file, as of another machine")
    parser.add_argument("--commit", help="of the code; asked of git unless given")
    parser.add_argument("--output", default=str(OUTPUT))
    args = parser.parse_args(argv)
    try:
        args.merge = read_rows(args.merge, (*KEY, "forward_s", "note")) if args.merge else []
    except ValueError as error:
        parser.error(str(error))
    for case in args.case:
        if not 2 <= args.layers <= case.model.layers:
            parser.error(f"--layers must be 2 to {case.model.layers} for {case.model.name} (got {args.layers}).")
    return args


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` after some seconds, on systems that have such alarms."""

    def over(number: int, frame: Any) -> None:
        raise OutOfTime

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """A case: a transformer of few layers, its inputs, its best dense kernel, and an output to compare with."""

    def __init__(self, case: Case, layers: int, device: torch.device) -> None:
        self.case, self.layers, self.device = case, layers, device
        self.inputs: Inputs = make_inputs(case, device)
        short = Case(case.model, 2 * case.model.stride[0] + 1, case.height, case.width)
        self.short: Inputs = make_inputs(short, device)
        self.kernel = fastest_kernel(case, device)
        self.reference: tuple[str, torch.Tensor] | None = None
        self._linears, self._model = "", None

    def model(self, linears: str) -> Any:
        """The transformer with linear layers of a kind; only one is kept, so that peaks of memory are of one."""
        if self._linears != linears:
            self._linears, self._model = "", None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._model = build(self.case.model, self.layers, self.device)
            if linears != "none":
                quantize_linears(self._model, kind=linears)
            self._linears = linears
        return self._model


def key_of(case: Case, contender: StepContender, layers: int, where: dict[str, str]) -> dict[str, Any]:
    """The first columns of a row."""
    return {
        "case": case.name, "model": case.model.name, "frames": case.num_frames, "height": case.height,
        "width": case.width, "tokens": case.layout().length, "contender": contender.name, "method": contender.method,
        "quant": contender.quant or "", "linears": contender.linears, "compiled": contender.compiled,
        "layers_timed": layers, "layers": case.model.layers, "note": "", **where,
    }  # fmt: skip


def measure(bench: Bench, contender: StepContender, rows: RowFile, where: dict[str, str]) -> dict[str, Any]:
    """A row: what was measured, or why nothing was."""
    row = key_of(bench.case, contender, bench.layers, where)
    try:
        model = bench.model(contender.linears)
        with bound(model, contender, bench.kernel):
            kernel = bench.kernel if contender.kernel == "best" else contender.kernel
            stepped = step(model, contender, bench.inputs, bench.short, kernel)
        return row | columns(bench, contender, stepped, rows, where)
    except torch.OutOfMemoryError:
        note = "out of memory"
    except (Missing, GenerationError, ImportError) as error:
        note = f"not here: {error}"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        traceback.print_exc()
        note = f"failed: {type(error).__name__}: {error}"
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return row | {"note": note.split("\n")[0][:300]}


def columns(
    bench: Bench, contender: StepContender, stepped: Stepped, rows: RowFile, where: dict[str, str]
) -> dict[str, Any]:
    """What a contender's forwards say of the whole model.

    Raises:
        RuntimeError: a dense output that is too far from another.
    """
    spec, times = bench.case.model, stepped.times
    found: dict[str, Any] = {
        "backend": stepped.backend, "density": f"{stepped.density:.4f}", "timed": len(times.forwards),
        "timed_forward_s": f"{times.forward:.5f}", "rest_s": f"{times.rest:.5f}", "blocks": times.text(),
        "peak_gb": f"{stepped.peak / 1e9:.2f}" if stepped.peak else "",
    }  # fmt: skip
    reference = bench.reference
    if reference is not None and not contender.cached:
        far = difference(stepped.out, reference[1])
        found |= {"difference": f"{far:.5f}", "difference_from": reference[0]}
        if contender.exact and far > MOST_DIFFERENCE:
            raise RuntimeError(f"its output is {far:.3f} from that of {reference[0]}; {MOST_DIFFERENCE} is rounding.")
    elif contender.exact:
        bench.reference = contender.name, stepped.out
    forward = whole(bench, contender, times)
    is_measured = bench.layers == spec.layers
    found |= {
        "forward_s": f"{forward:.5f}", "step_s": f"{branches_of(spec) * forward:.5f}",
        "forward_is": "measured" if is_measured else f"blocks of {bench.layers} layers times their counts",
    }  # fmt: skip
    if contender.cached:
        return found | {"forward_is": "measured; the layers that are skipped take no time"}
    search = None if stepped.search is None else whole(bench, contender, stepped.search, Mode.SEARCH)
    found["search_s"] = "" if search is None else f"{search:.5f}"
    return found | run_of(bench, contender, forward, search, rows, where)


def whole(bench: Bench, contender: StepContender, times: BlockTimes, mode: Mode = Mode.SPARSE) -> float:
    """Seconds of a forward of the whole model."""
    spec = bench.case.model
    if bench.layers == spec.layers or contender.cached:
        return times.forward
    if not contender.sparse:
        return whole_forward(times.rest, times.by_class(), spec, Mode.DENSE)
    schedule = contender.usual().resolve(spec).schedule
    return whole_forward(times.rest, times.by_class(), spec, mode, schedule)


def run_of(
    bench: Bench, contender: StepContender, forward: float, search: float | None, rows: RowFile, where: dict[str, str]
) -> dict[str, Any]:
    """Columns on a run by the schedule of the method; empty where nothing tells what its dense steps take."""
    spec = bench.case.model
    branches, told = branches_of(spec), f"worked out for {STEPS} steps, transformer only"
    if not contender.sparse:
        return {"dense_steps": STEPS, "run_s": f"{whole_run(STEPS, STEPS, branches, forward, 0):.3f}", "run_is": told}
    schedule = contender.usual().resolve(spec).schedule
    dense_steps = sum(schedule.dense_steps(STEPS))
    suited = ["dense-eager", "stock"] if not contender.compiled else ["dense"]
    for name in [*(["dense-fp8"] if contender.linears == "fp8" else []), *suited]:
        same = {key: where[key] for key in ("gpu", "commit")}
        dense = rows.find(case=bench.case.name, contender=name, note="", layers_timed=bench.layers, **same)
        if dense is not None:
            seconds = whole_run(STEPS, dense_steps, branches, float(dense["forward_s"]), forward, search)
            run_is = f"{told}, dense steps as those of {name}"
            return {"dense_steps": dense_steps, "run_s": f"{seconds:.3f}", "run_is": run_is}
    return {"dense_steps": dense_steps, "run_is": f"no row of {suited[0]} at this commit"}


if __name__ == "__main__":
    run_program(main)
