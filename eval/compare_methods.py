"""Is the faster video still the same video, and still a good one? Methods side by side, with all anchors.

    python eval/compare_methods.py --output rows.csv                       the usual methods, 33 frames, 20 steps
    python eval/compare_methods.py --frames 81 --steps 50 --output rows.csv --keep-videos 4
    accelerate launch eval/compare_methods.py --frames 81 --output rows.csv           on all GPUs
    python eval/report.py rows.csv --videos rows-videos --output report.html

Every prompt is generated with the same noise under every setting, the first fifth of the steps dense and every layer
sparse after it. A setting is method[@density][+quant][:option=value]..., such as `adaspa@0.1:head_adaptive=no` or
`paro@radial+int8`; a method that takes a density and names none runs at all `--densities`, of which "radial" is that of
Radial Attention's map on the same grid. The anchors: `ceiling` is the rendered truth through the VAE, `dense` comes by
itself, `other-noise` is dense with another seed, `random` keeps random blocks. `paro` goes by a plan, which is
calibrated first, on two prompts that are not in the list, `paro-raster` by one that reorders nothing, `paro-mass` by
one whose orders are those in which its maps keep most of the attention; `paro-online` finds orders and maps in the run.

One row per video, as CSV, or as Parquet where the name ends so (`pip install -e ".[parquet]"`): fidelity to the
dense video (PSNR, SSIM, relative L1 of latents, by quarter), the detectors of the synthetic world, dimensions that need
no weights, densities, seconds, environment. A video that has a row is not made again: a killed run goes on with the
same command, and one table can take many sizes. `--prompts` takes a list of the world, or text, a prompt a line; for
such prompts, and any other model, there are no detectors and no ceiling.

    python eval/compare_methods.py --merge a.csv b.csv --output rows.csv     rows of several machines in one table

Exit code: 0 when every row is there, 1 when a setting failed (the others go on), 2 for what cannot be run at all, 3
when `--seconds` were up before.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from videosparse.benchmark.rows import environment
from videosparse.evaluation.prompts import Prompt, load_prompts
from videosparse.evaluation.running import Batches, settings_of, weights_of
from videosparse.evaluation.settings import BY_PLAN, Conditions, Setting, expand
from videosparse.evaluation.table import RowStore, number
from videosparse.evaluation.work import COLUMNS, FIXED, KEY, SHARED, TIMED, Comparison, kind_of, workers
from videosparse.generation.calibrating import BUCKETS, CalibrationRequest, calibrate
from videosparse.generation.errors import GenerationError, one_line
from videosparse.generation.output import WHOLE, check_writable, slug
from videosparse.generation.request import Settings
from videosparse.generation.sources import find_model

PROMPTS = Path(__file__).resolve().parent / "prompts"
METHODS = ("ceiling", "other-noise", "radial", "adaspa", "random", "paro", "paro+int8", "paro+int8-fp8")
DENSITIES = ("radial", "0.2")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="table, .csv or .parquet; grows")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="SETTING")
    parser.add_argument("--densities", nargs="+", default=DENSITIES, metavar="D")
    parser.add_argument("--models", nargs="+", default=[None], help="folders, hub ids or names; the embedded model")
    parser.add_argument("--prompts", type=Path, default=PROMPTS / "world64.json")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--seeds", type=int, default=1, help="videos of each prompt, from its own seed on")
    for name in ("frames", "height", "width", "steps"):
        parser.add_argument(f"--{name}", type=int, help="the model's default")
    parser.add_argument("--guidance", type=float, help="the model's default")
    parser.add_argument("--block", type=block, default=(64, 64), help="of every sparse method: 64, 128 or 128x64")
    parser.add_argument("--first-steps", type=float, default=0.2, help="share of the run that stays dense")
    parser.add_argument("--batch", type=int, help="videos at once; as many as keep a GPU busy")
    parser.add_argument("--seconds", type=float, help="begin nothing new after this time")
    parser.add_argument("--untimed", action="store_true", help="rows say no seconds: other work shares the device")
    parser.add_argument("--keep-videos", type=int, default=0, metavar="N", help="keep videos and maps of N prompts")
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="where; beside the table unless said")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workers", type=int, default=min(12, (os.cpu_count() or 2) // 2), help="that run detectors")
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="TABLE", help="make nothing: put these into --output")
    args = parser.parse_args(argv)
    for name, least in (("limit", 1), ("seeds", 1), ("batch", 1), ("keep_videos", 0), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least} (got {value}).")
    if not 0 <= args.first_steps <= 1:
        parser.error(f"--first-steps must be a share of the run, 0 to 1 (got {args.first_steps:g}); 0.2 is usual.")
    if args.seconds is not None and not args.seconds >= 0:
        parser.error(f"--seconds must be a number of at least 0 (got {args.seconds:g}).")
    args.videos = args.videos or args.output.with_name(f"{args.output.stem}-videos")
    return args


def block(text: str) -> tuple[int, int]:
    """(query rows, key rows) from "64" or "128x64"."""
    sizes = [int(size) for size in text.split("x")]
    if len(sizes) not in (1, 2) or any(size not in (64, 128) for size in sizes):
        raise argparse.ArgumentTypeError(f"must be 64, 128 or a pair such as 128x64 (got {text}).")
    return sizes[0], sizes[-1]


def wanted_prompts(args: argparse.Namespace) -> list[Prompt]:
    listed = load_prompts(args.prompts)[: args.limit]
    return [replace(prompt, seed=prompt.seed + number) for prompt in listed for number in range(args.seeds)]


def check_models(models: Sequence[str | None]) -> None:
    """Raise GenerationError where rows could not tell the models apart, or one of them is not there."""
    names: dict[str, str | None] = {}
    for model in models:
        name = find_model(model).name
        if name in names:
            raise GenerationError(
                f"--models {names[name]} and {model} are both called {name}, by which rows tell models apart; make a "
                "table of each."
            )
        names[name] = model


def wanted_settings(args: argparse.Namespace, prompts: Sequence[Prompt]) -> list[Setting]:
    """The settings, dense first; without the ceiling where prompts are not of the synthetic world."""
    of_world = all(prompt.of_world for prompt in prompts)
    return [s for s in expand(args.methods, args.densities) if of_world or s.method != "ceiling"]


def run_options(args: argparse.Namespace, state: Any) -> dict[str, Any]:
    """Size, schedule, device and precision, as `settings_of` takes them."""
    device = f"cuda:{state.local_process_index}" if state.num_processes > 1 and args.device == "auto" else args.device
    if device.startswith("cuda:") and not torch.cuda.is_available():
        device = "cpu"
    names = ("frames", "height", "width", "steps", "guidance", "dtype")
    return {name: getattr(args, name) for name in names} | {"device": device}


def unavailable(settings: Sequence[Setting], run: Settings) -> dict[str, str]:
    """Names of the settings that cannot run on this device or in this precision, and why."""
    why = {s.name: s.unavailable(run.device, run.dtype, run.source.spec.head_dim) for s in settings}
    return {name: reason for name, reason in why.items() if reason is not None}


def runs_of(args: argparse.Namespace, state: Any, settings: list[Setting], store: RowStore) -> list[Settings]:
    """What each model is asked for; what needs no weights to be seen is told before the first one is loaded.

    Raises:
        ValueError: a size that a model cannot take, rows of another kind in the table, or no setting but dense that can
            run.
    """
    options = run_options(args, state)
    runs = [settings_of(model, **options) for model in args.models]
    for run in runs:
        store.check({"model": run.source.name, **kind_of(run, weights_of(run))})
        asked = [setting.name for setting in settings if not setting.is_reference]
        cannot = unavailable(settings, run)
        if asked and all(name in cannot for name in asked):
            raise GenerationError(f"{run.source.name}, {asked[0]}: {cannot[asked[0]]}")
    return runs


def chunks(prompts: Sequence[Prompt], size: int, processes: int) -> list[list[Prompt]]:
    """Batches of at most `size`, no fewer than there are processes where there are prompts for all."""
    size = max(1, min(size, -(-len(prompts) // processes)))
    return [list(prompts[at : at + size]) for at in range(0, len(prompts), size)]


class Plans:
    """PAROAttention's plans for one model and size, made when first needed, by the first process.

    Args:
        args: of the program.
        batches: the model.
        folder: for the files, which also serve a resumed run.
        state: of the processes.
        of_world: whether the prompts are of the synthetic world.
    """

    def __init__(self, args: argparse.Namespace, batches: Batches, folder: Path, state: Any, of_world: bool) -> None:
        self.args, self.batches, self.folder, self.state, self.of_world = args, batches, folder, state, of_world

    def __call__(self, density: float, orders: str = "metric") -> Path:
        """The file of the plan for a density and a way of choosing token orders, a value of `BY_PLAN`."""
        run, size = self.batches.settings, "x".join(map(str, self.args.block))
        about = [
            run.source.name,
            self.batches.weights,
            f"{run.num_frames}x{run.height}x{run.width}",
            run.steps,
            run.guidance,
            size,
        ]
        about += [] if orders == "metric" else [orders]
        path = self.folder / f"plan-{slug('-'.join(map(str, about)), WHOLE)}-{density:.4f}.safetensors"
        if not path.exists():
            self._calibrate(path, density, orders)
        return path

    def prepare(self, settings: Sequence[Setting], conditions: Conditions) -> None:
        """Make the plans that settings need, while the other processes wait."""
        needed = [s for s in settings if s.method in BY_PLAN and not any(o.startswith("plan=") for o in s.options)]
        wanted = {(density, BY_PLAN[s.method]) for s in needed if (density := conditions.density(s)) is not None}
        with self.state.main_process_first():
            for density, orders in sorted(wanted):
                self(density, orders)

    def _calibrate(self, path: Path, density: float, orders: str) -> None:
        if not self.of_world:
            raise GenerationError(
                "Plans are calibrated with prompts of the synthetic world; for other prompts make one with "
                "`videosparse calibrate` and say paro@D:plan=FILE, or use paro-online."
            )
        run = self.batches.settings
        others = load_prompts(PROMPTS / "world128_heldout.json")[:2]
        request = CalibrationRequest(
            [p.prompt for p in others], model=run.request.model, density=density, block=self.args.block,
            buckets=max(1, min(BUCKETS, run.steps // 2)), num_frames=run.num_frames, height=run.height,
            width=run.width, steps=run.steps, guidance=run.guidance, seed=others[0].seed, device=str(run.device),
            dtype=run.dtype, reorder=orders != "raster", order_by="mass" if orders == "mass" else "metric",
        )  # fmt: skip
        how = {"raster": " in raster order", "mass": ", orders by mass"}.get(orders, "")
        print(f"Calibrating PAROAttention at density {density:.4f}{how}", file=sys.stderr)
        try:
            calibrate(request, path, pipe=self.batches.pipe)
        except GenerationError as error:
            raise GenerationError(f"No plan can be calibrated: {error} paro-online needs none.") from error


def compare(args: argparse.Namespace, state: Any, submit: Any, store: RowStore, prompts: list[Prompt]) -> Any:
    """All models; returns (the keys of this comparison in the order of the table, what failed and why)."""
    settings = wanted_settings(args, prompts)
    of_world = all(prompt.of_world for prompt in prompts)
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    order: list[tuple[str, ...]] = []
    failed: dict[str, str] = {}
    for run in runs_of(args, state, settings, store):
        batches = Batches(run)
        plans = Plans(args, batches, args.output.with_name(f"{args.output.stem}-plans"), state, of_world)
        source = batches.settings.source
        conditions = Conditions(
            source.described, batches.settings.grid, source.spec.text, args.block, args.first_steps, plans,
            source.experts,
        )  # fmt: skip
        where = environment(args.commit)
        keep = args.videos if args.keep_videos else None
        work = Comparison(batches, conditions, settings, store, where, submit, keep, deadline, timed=not args.untimed)
        order += [store.key_of(work.identity(s, p)) for s in settings for p in prompts]
        cannot = unavailable([s for s in settings if work.missing(s, prompts)], batches.settings)
        leave_out(work, cannot, state)
        able = [s for s in settings if s.name not in cannot]
        if any(work.missing(s, prompts) for s in able):
            plans.prepare(able, conditions)
        every = chunks(prompts, args.batch or batches.size(len(prompts)), state.num_processes)
        kept = max(0, args.keep_videos) * args.seeds
        firsts = [sum(map(len, every[:n])) for n in range(len(every))]
        mine = list(zip(every, firsts, strict=True))[state.process_index :: state.num_processes]
        with bar(state, sum(len(chunk) for chunk, _ in mine) * len(able), source.name) as advance:
            for chunk, first in mine:
                if not work.run(chunk, max(0, kept - first), advance):
                    break
        failed |= {f"{source.name}, {name}": why for name, why in work.failed.items()}
    return order, failed


def leave_out(work: Comparison, cannot: dict[str, str], state: Any) -> None:
    """Count settings that cannot run as failed, and say so before the others begin."""
    work.failed |= cannot
    if state.is_main_process:
        for name, why in cannot.items():
            print(f"Left out: {work.batches.settings.source.name}, {name}: {why}", file=sys.stderr)


class bar:
    """A progress bar on stderr for the first process; call it with the number of videos that are done."""

    def __init__(self, state: Any, total: int, name: str) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("videos"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        from rich.console import Console

        self.shown = Progress(*columns, console=Console(stderr=True)) if state.is_main_process else nullcontext()
        self.total, self.name = total, name

    def __enter__(self) -> Any:
        progress = self.shown.__enter__()
        if progress is None:
            return lambda count: None
        return partial(progress.advance, progress.add_task(self.name, total=self.total))

    def __exit__(self, *error: Any) -> None:
        self.shown.__exit__(*error)


def quiet_libraries() -> None:
    """Hush what is said on loading; the bars say what happens."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def summarise(rows: Sequence[dict[str, str]], keys: set[tuple[str, ...]], store: RowStore) -> None:
    """Print the means of each setting of this comparison."""
    mine = [row for row in rows if store.key_of(row) in keys]
    for setting in dict.fromkeys(row["setting"] for row in mine):
        own = [row for row in mine if row["setting"] == setting]
        cells = [f"{setting:<40} {len(own):>4} videos"]
        for name, title, digits in (
            ("video_density", "density", 3), ("psnr_db", "PSNR", 1), ("ssim", "SSIM", 3), ("all_right", "all right", 2),
            ("denoise_seconds", "s", 3),
        ):  # fmt: skip
            values = [value for row in own if (value := number(row, name)) is not None]
            cells.append(f"{title} {sum(values) / len(values):.{digits}f}" if values else "")
        print("  ".join(filter(None, cells)))


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.merge:
        return merge_tables(args)
    quiet_libraries()
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(days=1))
    try:
        prompts = wanted_prompts(args)
        check_writable(args.output.parent)
        check_models(args.models)
        store = RowStore(args.output, COLUMNS, KEY, state.process_index, FIXED, SHARED)
        with workers(args.workers) as submit:
            order, failed = compare(args, state, submit, store, prompts)
    except (ValueError, OSError) as error:
        print(f"Error: {one_line(error, 1000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    for setting, why in failed.items():
        print(f"Failed: {setting}: {why}", file=sys.stderr)
    state.wait_for_everyone()
    if state.is_main_process:
        try:
            found = merge(args, store, order)
        except OSError as error:
            why = f"{args.output} cannot be written ({one_line(error, 1000)})"
            print(f"Error: {why}; its rows are in {store.folder}, the same command goes on.", file=sys.stderr)
            return 2
        if len(found) < len(order) and not failed:
            print("The time was up, or another process failed; the same command goes on.", file=sys.stderr)
            return 3
    return 1 if failed else 0


def merge_tables(args: argparse.Namespace) -> int:
    """Put the rows of other tables into one, or nothing where they are not of one comparison."""
    try:
        store = RowStore(args.output, COLUMNS, KEY, fixed=FIXED, shared=SHARED)
        store.take(args.merge, TIMED)
        rows = store.merge([])
    except (ValueError, OSError) as error:
        print(f"Error: {one_line(error, 1000)}", file=sys.stderr)
        return 2
    summarise(rows, {store.key_of(row) for row in rows}, store)
    print(f"{args.output}: {len(rows)} rows")
    return 0


def merge(args: argparse.Namespace, store: RowStore, order: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Make one table; returns the keys of this comparison that have a row."""
    rows = store.merge(order)
    found = {store.key_of(row) for row in rows} & set(order)
    summarise(rows, set(order), store)
    print(f"{args.output}: {len(found)} of {len(order)} rows of this comparison")
    return found


if __name__ == "__main__":
    run_program(main)
