"""How long a denoising step of a whole transformer takes, at full size with random weights, on one GPU.

    python eval/bench_model.py                                       Wan2.1-14B, 720x1280: 81 and 161 frames
    python eval/bench_model.py --model wan2.1-1.3b --height 480 --width 832 --frames 81 --compile
    python eval/bench_model.py --layers 2 --frames 5 --height 64 --width 64    a try on a CPU

Contenders, each on the same transformer, in bfloat16, from the same random latents and text:
    stock           Diffusers as it ships
    dense           DenseProcessor(): the fastest dense kernel that is here
    radial          RadialProcessor(), a sparse step: by its default, the first layer is dense
    adaspa          AdaSpaProcessor(), a sparse step, after a step that searched (timed, too: `search_s`)
`forward_s` is the median of the timed forwards after a first one; every kernel was compiled before, on a short video. A
step has two under guidance, and one of HunyuanVideo. `run_s` is no measurement: it is what 50 steps take by the
method's own schedule, so many dense ones at the rate of `dense` here, so many sparse ones, and one search, with all
layers where --layers took fewer; text encoder and VAE are not in it. `difference` is the relative L2 distance of the
output from that of `stock`: of dense contenders it is rounding, of sparse ones what random weights make of the blocks
left out, which says nothing about videos. Random weights do not change how long a call takes. An output that is not
finite is an error.

Rows go to `assets/results/models.csv` as they are measured; --seconds bounds the time: what does not fit is left out,
and said to be.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, MochiTransformer3DModel, WanTransformer3DModel

from videosparse import AdaSpaProcessor, DenseProcessor, RadialProcessor, restore, sparsify
from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.cases import MODELS, ModelSpec
from videosparse.processors import Processor

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/models.csv"
STEPS = 50
MOST_TIMED, MOST_SECONDS = 3, 25.0
"""Of one contender: timed forwards, and seconds after which no further one begins."""
COLUMNS = (
    "case", "model", "frames", "height", "width", "tokens", "layers", "contender", "compiled", "backend", "density",
    "difference", "forward_s", "step_s", "search_s", "dense_steps", "run_s", "run_is", "speedup_step", "peak_gb",
    "timed", *WHERE,
)  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A processor, None for Diffusers' own; `searches`: its first forward searches for the maps of the others."""

    name: str
    processor: Processor | None
    searches: bool = False


def contenders() -> list[Contender]:
    return [
        Contender("stock", None),
        Contender("dense", DenseProcessor()),
        Contender("radial", RadialProcessor(first_steps=0)),
        Contender("adaspa", AdaSpaProcessor(first_steps=0, refresh=(), num_steps=STEPS), searches=True),
    ]


def main() -> None:
    args = parse()
    spec, start = MODELS[args.model], time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(spec, args.layers or spec.layers, device)
    if args.compile:
        compile_blocks(model)
    rows: list[dict[str, Any]] = []
    short = make_inputs(spec, 2 * spec.stride[0] + 1, args.height, args.width, device)
    for contender in contenders():
        if not args.only or contender.name in args.only:
            measure(model, contender, short, 1, most=1)  # so that no kernel is compiled while a search is timed
    for frames in args.frames:
        inputs = make_inputs(spec, frames, args.height, args.width, device)
        grid = spec.grid(frames, args.height, args.width)
        stock, seconds = None, {}
        for contender in contenders():
            if args.only and contender.name not in args.only:
                continue
            left = args.seconds - (time.perf_counter() - start)
            if left < 0:
                print(f"{frames} frames, {contender.name}: left out, {args.seconds:.0f} s are over", flush=True)
                continue
            print(f"{frames} frames, {contender.name} ...", flush=True)
            try:
                row, out = measure(model, contender, inputs, branches_of(spec))
            except torch.OutOfMemoryError:
                print("left out: it needs more memory than there is", flush=True)
                continue
            stock = out if stock is None else stock
            seconds[contender.name] = row["forward_s"]
            row |= {
                "case": f"{args.model} {args.height}x{args.width}x{frames}", "model": args.model, "frames": frames,
                "height": args.height, "width": args.width, "tokens": grid.tokens, "compiled": args.compile,
                "layers": args.layers or spec.layers,
                "difference": float((out - stock).norm() / stock.norm()) if stock is not out else "",
            }  # fmt: skip
            row |= whole_run(contender, row, seconds, spec)
            rows.append({**row, **environment()})
            print({key: row[key] for key in ("forward_s", "search_s", "run_s", "density", "peak_gb")}, flush=True)
            write_rows(Path(args.output), rows, COLUMNS)
    print(f"{len(rows)} rows in {args.output}, {time.perf_counter() - start:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in MODELS if name != "tiny-wan"], default="wan2.1-14b")
    parser.add_argument("--frames", type=int, nargs="+", default=[81, 161])
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in contenders()])
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--output", default=str(OUTPUT))
    return parser.parse_args()


def build(spec: ModelSpec, layers: int, device: torch.device) -> torch.nn.Module:
    """The transformer of a published model with random weights, made where it runs."""
    common = {"num_attention_heads": spec.heads, "attention_head_dim": spec.head_dim}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            if spec.family == "wan":
                channels = 48 if spec.variant == "wan2.2-5b" else 16
                model: Any = WanTransformer3DModel(
                    **common, num_layers=layers, in_channels=channels, out_channels=channels,
                    ffn_dim=spec.ffn, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
                )  # fmt: skip
            elif spec.family == "hunyuan_video":
                dual = max(1, layers // 3)
                model = HunyuanVideoTransformer3DModel(
                    **common, num_layers=dual, num_single_layers=max(1, layers - dual), guidance_embeds=True
                )
            else:
                model = MochiTransformer3DModel(**common, num_layers=layers)
    finally:
        torch.set_default_dtype(before)
    if spec.family == "wan":
        model.rope = type(model.rope)(spec.head_dim, (1, 2, 2), 1024).to(device)  # tables in full precision
    return model.eval().requires_grad_(False)


def compile_blocks(model: Any) -> None:
    """Regional compilation, which Mochi does not declare."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True)
        return
    for block in model.transformer_blocks:
        block.compile(fullgraph=True)


def make_inputs(spec: ModelSpec, frames: int, height: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One branch of guidance; Mochi's transformer gets both in one batch, here one."""
    torch.manual_seed(0)
    time_stride, space = spec.stride
    channels = {"wan": 48 if spec.variant == "wan2.2-5b" else 16, "hunyuan_video": 16, "mochi": 12}[spec.family]
    half = {"device": device, "dtype": torch.bfloat16}
    latents = torch.randn(1, channels, (frames - 1) // time_stride + 1, height // space, width // space, **half)
    inputs = {"hidden_states": latents, "timestep": torch.full((1,), 500.0, device=device)}
    if spec.family == "wan":
        return {**inputs, "encoder_hidden_states": torch.randn(1, 512, 4096, **half)}
    text = torch.randn(1, 256, 4096, **half)
    inputs |= {"encoder_hidden_states": text, "encoder_attention_mask": torch.ones(1, 256, device=device)}
    if spec.family == "hunyuan_video":
        inputs |= {
            "pooled_projections": torch.randn(1, 768, **half),
            "guidance": torch.full((1,), 6000.0, **half),
        }
    return inputs


def measure(
    model: Any, contender: Contender, inputs: dict[str, torch.Tensor], branches: int, most: int = MOST_TIMED
) -> tuple[dict[str, Any], torch.Tensor]:
    """A row, and the last output."""
    if contender.processor is not None:
        sparsify(model, contender.processor)
    on_gpu = inputs["hidden_states"].is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times, search = [], 0.0
    try:
        begin = time.perf_counter()
        for number in range(most + 1):
            inputs["timestep"].fill_(900.0 - number)  # a bare transformer tells steps by their timestep
            out, seconds = timed(model, inputs)
            if number == 0 and contender.searches:
                search = seconds
            if number:
                times.append(seconds)
            if times and time.perf_counter() - begin + max(times) > MOST_SECONDS:
                break
        report = None if contender.processor is None else contender.processor.report()
    finally:
        restore(model)
    if not bool(out.isfinite().all()):
        raise RuntimeError(f"{contender.name}: the output is not finite.")
    forward = statistics.median(times)
    row = {
        "contender": contender.name, "forward_s": forward, "step_s": branches * forward,
        "search_s": search or "", "timed": len(times),
        "density": "" if report is None else report.density,
        "backend": "" if report is None else f"{report.backend}, dense {report.dense_backend}",
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else "",
    }  # fmt: skip
    return row, out.float()


def branches_of(spec: ModelSpec) -> int:
    """Forwards of a step: HunyuanVideo was distilled to need no second branch."""
    return 1 if spec.family == "hunyuan_video" else 2


def timed(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """A forward and its seconds."""
    wait = torch.cuda.synchronize if inputs["hidden_states"].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    wait()
    return out, time.perf_counter() - start


def whole_run(contender: Contender, row: dict[str, Any], seconds: dict[str, float], spec: ModelSpec) -> dict[str, Any]:
    """What 50 steps of all layers take by the schedule of the method, worked out from what was measured."""
    scale = branches_of(spec) * spec.layers / row["layers"]
    of_layers = "" if row["layers"] == spec.layers else f" and {spec.layers} layers"
    columns: dict[str, Any] = {"run_is": f"extrapolated to {STEPS} steps{of_layers}, transformer only"}
    if contender.name in ("stock", "dense"):
        return {**columns, "dense_steps": STEPS, "run_s": scale * STEPS * row["forward_s"], "speedup_step": ""}
    dense = seconds.get("dense", seconds.get("stock"))
    usual = {"radial": RadialProcessor, "adaspa": AdaSpaProcessor}[contender.name]().resolve(spec)
    steps = sum(usual.schedule.dense_steps(STEPS))
    if dense is None:  # nothing to work it out from
        return {"run_is": "", "dense_steps": steps, "run_s": "", "speedup_step": ""}
    search = max(0.0, float(row["search_s"] or dense) - dense)  # on top of the last dense step
    run = scale * (dense * steps + search + row["forward_s"] * (STEPS - steps))
    return {**columns, "dense_steps": steps, "run_s": run, "speedup_step": dense / row["forward_s"]}


if __name__ == "__main__":
    main()
