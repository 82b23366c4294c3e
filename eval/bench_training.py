"""What a training step costs at twice and four times the length: dense attention against Radial Attention.

    python eval/bench_training.py                            all cases on one GPU: about seven minutes of an H200
    torchrun --nproc-per-node 2 eval/bench_training.py       the same with each clip shared by two GPUs (Ulysses)
    python eval/bench_training.py --only hunyuan             some cases; --seconds limits the time
    python eval/bench_training.py --smoke --output x.csv     tiny shapes, on a CPU too, in seconds
    python eval/bench_training.py --merge a.csv b.csv        put the rows of other machines into --output

One clip, LoRA on q, k, v, o, gradient checkpointing, bf16, random weights: as many layers as the measurement needs.
A step with one layer and with two tells what a layer costs, and what the rest does; the whole model's time is
extrapolated from that (`layers_timed`, `extrapolated_step_s`), since no single GPU holds its activations and optimizer
in reasonable time. Dense attention is timed with every kernel that is here (cuDNN and FlashAttention-2 through torch,
FlashAttention-4), on the same projected queries, keys and values; one that is not has a row that says so. `radial` has
its dense layers and its share of dense steps as in the recipes (`radial, sparse layers` is without these).

Rows go to `assets/results/lora_training.csv`, after every case; those of other cases stay there. Single measurements
are kept beside it in `lora_training.points.json`, so the same command goes on where it was stopped, and adds a kernel
that has been installed since. A time is kept only if the loss is finite and, for a dense kernel, within 2 % of the
first dense kernel's.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState

from videosparse import DenseProcessor, RadialProcessor, sparsify
from videosparse.attach import tracker_of
from videosparse.benchmark.rows import WHERE, environment, read_rows, write_rows
from videosparse.cases import MODELS, ModelSpec
from videosparse.files import write_json
from videosparse.kernels.dense import DENSE_KERNELS
from videosparse.training.adapters import add_adapters, trained
from videosparse.training.config import LoraConfig
from videosparse.training.families import TRAINING_FAMILIES
from videosparse.training.noise import NoiseLevels, RunSchedule
from videosparse.training.sharing import share_clips

OUTPUT = Path("assets/results/lora_training.csv")
KERNELS = ("cudnn", "fa2", "fa4")
COLUMNS = (
    "case", "frames", "times_length", "tokens", "gpus", "attention", "density", "layers_timed", "step_s", "layer_s",
    "rest_s", "peak_gib", "layers", "extrapolated_step_s", *(f"against_{k}" for k in KERNELS), "note", *WHERE,
)  # fmt: skip
# the recipes' schedule at these lengths, and the shifts of runs at 720x1280 (see the presets)
FIRST_STEPS, FIRST_LAYERS = 0.04, 2
SHIFTS = {"wan": 5.0, "hunyuan_video": 7.0}
OUT_OF_MEMORY = "out of memory"

Point = dict[str, float]
"""One measurement: seconds, loss and peak GiB of a step, and the density of Radial's map."""


@dataclass(frozen=True)
class Case:
    """A model at a length: pixel frames, how often the usual length that is, and pixels."""

    model: ModelSpec
    frames: int
    times: int
    height: int = 720
    width: int = 1280


CASES = (
    Case(MODELS["wan2.1-14b"], 161, 2),
    Case(MODELS["wan2.1-14b"], 321, 4),
    Case(MODELS["hunyuan-video"], 257, 2),
    Case(MODELS["hunyuan-video"], 509, 4),
)
SMOKE = (Case(MODELS["wan2.1-14b"], 17, 2, 128, 128), Case(MODELS["hunyuan-video"], 17, 4, 128, 128))


class Bench:
    """A model of few layers at one case, and the inputs of a step; the same on every process, which share the clip.

    Args:
        case: what is timed.
        layers: self-attentions.
        duals: how many of them are in dual-stream blocks, for HunyuanVideo, which needs one to be shared.
        state: of the processes.
        smoke: narrow, in fp32.
    """

    def __init__(self, case: Case, layers: int, duals: int, state: PartialState, smoke: bool) -> None:
        torch.manual_seed(0)
        self.case, self.device, self.ranks = case, state.device, state.num_processes
        self.family = TRAINING_FAMILIES[case.model.family]
        with torch.device(self.device):
            self.model = build(case.model, layers, duals, smoke).to(torch.float32 if smoke else torch.bfloat16)
        add_adapters(self.model, self.family, LoraConfig(rank=32), 0)
        self.model.enable_gradient_checkpointing()
        self.model.train()
        if self.ranks > 1:
            sparsify(self.model, DenseProcessor())
            share_clips(self.model, self.ranks, self.device)
        self.inputs, self.target = self.make_inputs(torch.float32 if smoke else torch.bfloat16)

    def make_inputs(self, dtype: torch.dtype) -> tuple[dict[str, Any], torch.Tensor]:
        """The transformer's arguments, and the target."""
        config, grid = self.model.config, self.case.model.grid(self.case.frames, self.case.height, self.case.width)
        make = partial(torch.randn, device=self.device, dtype=dtype)
        noisy = make(1, config.in_channels, grid.frames, 2 * grid.height, 2 * grid.width)
        if self.family.name == "wan":
            text = {"encoder_hidden_states": make(1, 512, config.text_dim)}
        else:
            text = {
                "encoder_hidden_states": make(1, 256, config.text_embed_dim),
                "encoder_attention_mask": torch.ones(1, 256, device=self.device, dtype=torch.long),
                "pooled_projections": make(1, config.pooled_projection_dim),
            }
        levels = torch.full((1,), 0.5, device=self.device)
        return self.family.inputs(config, noisy, levels, text), make(noisy.shape)

    def attend_with(self, attention: str) -> None:
        """Choose the attention: radial, or a dense kernel."""
        if attention == "radial":
            sparsify(self.model, RadialProcessor(decay=1.0, first_steps=0, first_layers=0))
            return
        sparsify(self.model, DenseProcessor())
        for _, layer in tracker_of(self.model).layers:
            vars(layer)["core"] = partial(dense_core, attention)

    def step(self) -> float:
        """Loss of one step, gradients included."""
        out = self.model(**self.inputs, return_dict=False)[0]
        loss = F.mse_loss(out.float(), self.target.float())
        loss.backward()
        for parameter in trained(self.model).values():
            if self.ranks > 1 and parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
            parameter.grad = None
        return float(loss.detach())

    def timed(self, attention: str) -> Point:
        """The best of two steps, the first of which compiles; of torch's kernels one, where a step is long."""
        self.attend_with(attention)
        on_gpu = self.device.type == "cuda"
        best, loss = math.inf, 0.0
        for _ in range(2):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            if self.ranks > 1:
                torch.distributed.barrier()
            begin = time.perf_counter()
            loss = self.step()
            if on_gpu:
                torch.cuda.synchronize()
            seconds = slowest(time.perf_counter() - begin, self.device, self.ranks)
            best = min(best, seconds)
            if attention in ("cudnn", "fa2") and seconds > 10:
                break
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        density = self.density() if attention == "radial" else 1.0
        return {"seconds": best, "loss": loss, "peak": peak, "density": density}

    def density(self) -> float:
        """Kept share of the blocks of the map."""
        layout = tracker_of(self.model).layers[0][1].plan.layout
        resolved = RadialProcessor(decay=1.0).resolve(self.case.model, grid=layout.grid)
        return float(resolved.policy.static_map(layout, self.device).density)


def dense_core(kernel: str, q: Any, k: Any, v: Any, plan: Any) -> torch.Tensor:
    """Plain dense attention; all text tokens are valid here, so no mask is needed."""
    if kernel == "math":
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return DENSE_KERNELS[kernel].attend(q, k, v, q.shape[3] ** -0.5)


def slowest(seconds: float, device: torch.device, ranks: int) -> float:
    """The longest time of all processes."""
    if ranks == 1:
        return seconds
    found = torch.tensor(seconds, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)


def build(spec: ModelSpec, layers: int, duals: int, smoke: bool) -> Any:
    """The published shape with few layers."""
    import diffusers

    heads, head_dim = (2, 32) if smoke else (spec.heads, spec.head_dim)
    if spec.family == "wan":
        return diffusers.WanTransformer3DModel(
            num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, in_channels=16, out_channels=16,
            text_dim=64 if smoke else 4096, ffn_dim=128 if smoke else 13824, freq_dim=256,
        )  # fmt: skip
    return diffusers.HunyuanVideoTransformer3DModel(
        num_layers=duals, num_single_layers=layers - duals, num_attention_heads=heads,
        attention_head_dim=head_dim, num_refiner_layers=1 if smoke else 2, text_embed_dim=64 if smoke else 4096,
        rope_axes_dim=(8, 12, 12) if smoke else (16, 56, 56), guidance_embeds=True,
    )  # fmt: skip


def whole_model(case: Case, one: Mapping[str, float], two: float, dual: float | None) -> Callable[[str], float]:
    """Seconds of a step of the whole model by attention: from steps of one layer with each and of two with radial; for
    HunyuanVideo of one dual-stream layer with each, of one and a single-stream layer, and of two (`dual`) with radial.
    """
    layer = two - one["radial"]
    first = layer if dual is None else dual - one["radial"]
    rest = one["radial"] - first
    count, duals = case.model.layers, 0 if dual is None else 20

    def extrapolated(attention: str) -> float:
        more = one[attention] - one["radial"]
        return rest + duals * first + (count - duals) * layer + count * more

    return extrapolated


class Points:
    """The measurements made so far, in a file beside the rows; of this GPU and these versions only.

    Args:
        path: of the file.
        main: whether this process writes it.
        commit: of the code.
    """

    def __init__(self, path: Path, main: bool, commit: str | None) -> None:
        self.path, self.main, self.where = path, main, environment(commit)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        same = ("gpu", "driver", "torch", "triton", "cuda", "commit")
        self.found: dict[str, Any] = {
            name: point for name, point in kept.items() if all(point["where"][k] == self.where[k] for k in same)
        }

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def __getitem__(self, name: str) -> Any:
        return self.found[name]

    def add(self, name: str, point: Mapping[str, Any]) -> None:
        """Keep a measurement, or the reason why there is none."""
        self.found[name] = {**point, "where": environment(self.where["commit"])}
        if self.main:
            write_json(self.path, self.found)


def parts_of(case: Case, kernels: Sequence[str]) -> list[tuple[str, int, int, str]]:
    """(name, layers, dual-stream ones, attention) of what is measured, what everything rests on first."""
    duals = int(case.model.family == "hunyuan_video")
    found = [("one", 1, duals, "radial"), ("two", 2, duals, "radial")]
    if duals:
        found.append(("dual", 2, 2, "radial"))
    return found + [(kernel, 1, duals, kernel) for kernel in kernels]


def measure(
    case: Case, points: Points, state: PartialState, late: Callable[[], bool], args: argparse.Namespace
) -> bool:
    """Make the measurements of a case that are missing; returns whether there was time for all."""
    for part, layers, duals, attention in parts_of(case, args.kernels):
        name = point_name(case, state, part)
        if name in points or (attention in DENSE_KERNELS and DENSE_KERNELS[attention].missing(state.device)):
            continue
        if late():
            return False
        bench = None
        try:
            bench = Bench(case, layers, duals, state, args.smoke)
            points.add(name, bench.timed(attention))
            told = f"{points[name]['seconds']:.2f} s, {points[name]['peak']:.1f} GiB"
        except torch.OutOfMemoryError:
            points.add(name, {"note": OUT_OF_MEMORY})
            told = OUT_OF_MEMORY
        del bench
        free(state.device)
        if state.is_main_process:
            print(f"{name}: {told}", flush=True)
        if attention == "radial" and told == OUT_OF_MEMORY:  # nothing can be reckoned without it
            break
    return True


def point_name(case: Case, state: PartialState, part: str) -> str:
    return f"{case.model.name} {case.height}x{case.width}x{case.frames}, {state.num_processes} GPUs, {part}"


def rows_of(case: Case, points: Points, state: PartialState, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a case, as far as it was measured; none before Radial and one dense kernel are."""
    grid = case.model.grid(case.frames, case.height, case.width)
    common = {
        "case": f"{case.model.name} {case.height}x{case.width}", "frames": case.frames, "times_length": case.times,
        "tokens": grid.tokens + case.model.text, "gpus": state.num_processes, "layers_timed": 1,
        "layers": case.model.layers,
    }  # fmt: skip
    found = {
        part: points[point_name(case, state, part)]
        for part, *_ in parts_of(case, args.kernels)
        if point_name(case, state, part) in points
    }
    absent = [absent_row(kernel, found, state) for kernel in args.kernels]
    notes = [{**common, **row, **points.where} for row in absent if row]
    base = ["one", "two", *(["dual"] if case.model.family == "hunyuan_video" else [])]
    kernels = [kernel for kernel in args.kernels if "seconds" in found.get(kernel, {})]
    if any("note" in found.get(part, {}) for part in base):
        return [{**common, "attention": "radial", "note": OUT_OF_MEMORY, **points.where}, *notes]
    if not kernels or any(part not in found for part in base):
        return []
    check_losses(case, found, kernels)
    one = {"radial": found["one"]["seconds"], **{kernel: found[kernel]["seconds"] for kernel in kernels}}
    two = found["two"]["seconds"]
    dual = found["dual"]["seconds"] if "dual" in found else None
    seconds = whole_model(case, one, two, dual)
    whole = {attention: seconds(attention) for attention in one}
    whole["radial, sparse layers"] = whole["radial"]
    whole["radial"], share = with_schedule(case, whole["radial"], min(whole[kernel] for kernel in kernels))
    rows = []
    for attention in (*kernels, "radial", "radial, sparse layers"):
        timed = attention.split(",")[0]
        point = found["one" if timed == "radial" else timed]
        rows.append({
            **common,
            "attention": attention,
            "density": f"{point['density']:.4f}" if timed == "radial" else 1,
            "step_s": f"{one[timed]:.3f}",
            "layer_s": f"{two + one[timed] - 2 * one['radial']:.3f}",
            "rest_s": f"{2 * one['radial'] - (two if dual is None else dual):.3f}",
            "peak_gib": f"{point['peak']:.2f}",
            "extrapolated_step_s": f"{whole[attention]:.2f}",
            **{f"against_{k}": f"{whole[k] / whole[attention]:.3f}" for k in kernels if k in KERNELS},
            "note": f"{FIRST_LAYERS} dense layers, {share:.3f} of the steps dense" if attention == "radial" else "",
            **point["where"],
        })  # fmt: skip
    return rows + notes


def absent_row(kernel: str, found: Mapping[str, Any], state: PartialState) -> dict[str, Any] | None:
    """The row of a dense kernel that was not timed, with the reason; None where it was, or is still to be."""
    reason = found.get(kernel, {}).get("note")
    if reason is None and kernel in DENSE_KERNELS and kernel not in found:
        reason = DENSE_KERNELS[kernel].missing(state.device)
    return None if reason is None else {"attention": kernel, "note": reason}


def with_schedule(case: Case, sparse: float, dense: float) -> tuple[float, float]:
    """(seconds of a step with the recipes' dense layers, over sparse and dense steps, share of dense steps)."""
    family = TRAINING_FAMILIES[case.model.family]
    above = RunSchedule(SHIFTS[family.name], family.halves).dense_above(FIRST_STEPS)
    share = NoiseLevels(family.draw, family.shift).share_above(above)
    with_layers = sparse + FIRST_LAYERS * (dense - sparse) / case.model.layers
    return share * dense + (1 - share) * with_layers, share


def check_losses(case: Case, found: Mapping[str, Any], kernels: Sequence[str]) -> None:
    """Raise RuntimeError for a loss that is not finite, or dense ones that differ."""
    reference = found[kernels[0]]["loss"]
    for attention in ("one", "two", *kernels):
        loss = found[attention]["loss"]
        off = abs(loss - reference) / reference if attention in kernels else 0.0
        if not math.isfinite(loss) or off > 0.02:
            raise RuntimeError(f"{case.model.name} {case.frames} {attention}: loss {loss}, expected {reference}.")


def merged(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows, and those of a file that are of other cases."""
    keys = ("case", "frames", "gpus")
    mine = {tuple(str(row[key]) for key in keys) for row in rows}
    before = (
        [{"gpus": "1", **row} for row in read_rows(path, ("case", "frames", "attention"))] if path.is_file() else []
    )
    kept = [row for row in before if tuple(row[key] for key in keys) not in mine]
    return [{column: row.get(column, "") for column in COLUMNS} for row in (*kept, *rows)]


def free(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    args = arguments()
    if args.merge:
        for path in args.merge:
            write_rows(args.output, merged(args.output, read_rows(path, COLUMNS)), COLUMNS)
        return
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.device.type == "cpu":
        args.kernels = ["math"]
    points = Points(args.output.with_suffix(".points.json"), state.is_main_process, args.commit)
    started = time.monotonic()

    def late() -> bool:
        """Whether no new measurement may begin, by the clock of the first process."""
        return slowest(float(state.is_main_process and time.monotonic() - started > args.seconds), state.device,
                       state.num_processes) > 0  # fmt: skip

    rows: list[dict[str, Any]] = []
    for case in SMOKE if args.smoke else CASES:
        if args.only not in f"{case.model.name} {case.frames}":
            continue
        complete = measure(case, points, state, late, args)
        rows += (found := rows_of(case, points, state, args))
        if found and state.is_main_process:
            write_rows(args.output, merged(args.output, rows), COLUMNS)
            for row in found:
                print({k: row.get(k) for k in ("case", "frames", "gpus", "attention", "extrapolated_step_s", "note")})
        if not complete:
            break
    if state.is_main_process:
        print(f"{len(rows)} rows for {args.output}, {time.monotonic() - started:.0f} s", flush=True)
    state.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose model or frames contain this")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--seconds", type=float, default=1e9, help="no new measurement is begun after these")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="CSV", help="measure nothing; see above")
    parser.add_argument("--commit", help="of the code; asked of git unless given")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
