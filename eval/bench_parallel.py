"""What a second GPU gains: one transformer at full width, with few layers and random weights, alone and shared.

    torchrun --nproc-per-node 2 eval/bench_parallel.py
    torchrun --nproc-per-node 2 eval/bench_parallel.py --layers 1 --tiny       a try on CPUs

Every rank first runs each contender alone, on the whole sequence. Then the ranks share the transformer by
`videosparse.parallelize`, and run the same inputs. `difference` is the relative L2 distance of the shared output from
the one alone; `yardstick` the same between two dense kernels on one GPU, which is what rounding alone makes. A row says
"equal" when the first is at most twice the second; else the program ends with an error after writing it. AdaSpa is run
without head adaptation here, which is decided within each rank's heads otherwise.
Rows go to `assets/results/multi_gpu.csv`; times are seconds of one forward, medians of --rounds after a first.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

from videosparse import AdaSpaProcessor, DenseProcessor, RadialProcessor, parallelize, restore, sparsify
from videosparse.benchmark.rows import WHERE, environment, write_rows

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/multi_gpu.csv"
# name: (family, heads, feed-forward width, latent frames, rows and columns of latents)
SHAPES = {
    "wan2.1-1.3b 480x832x81": ("wan", 12, 8960, 21, 60, 104),
    "wan2.1-14b 720x1280x81": ("wan", 40, 13824, 21, 90, 160),
    "hunyuan-video 720x1280x129": ("hunyuan_video", 24, 0, 33, 90, 160),
}
TINY = {"wan": ("wan", 4, 64, 4, 16, 16), "hunyuan-video": ("hunyuan_video", 4, 0, 4, 16, 16)}
FIRST_TIMESTEP = 900.0
COLUMNS = (
    "case", "layers", "tokens", "contender", "gpus", "alone_s", "shared_s", "scaling", "difference", "yardstick",
    "verdict", "density", "peak_gb_alone", "peak_gb_shared", *WHERE,
)  # fmt: skip


def processors() -> dict[str, Any]:
    return {
        "dense": DenseProcessor(),
        "radial": RadialProcessor(first_steps=0, first_layers=0),
        "adaspa": AdaSpaProcessor(first_steps=0, refresh=(), num_steps=50, head_adaptive=False),
    }


def main() -> None:
    args = parse()
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes < 2:
        sys.exit("Run me with torchrun --nproc-per-node 2 (or more).")
    rows: list[dict[str, Any]] = []
    for case, shape in (TINY if args.tiny else SHAPES).items():
        if args.only and args.only not in case:
            continue
        found = run_case(case, shape, args, state)
        rows += found
        if state.is_main_process:
            write_rows(Path(args.output), rows, COLUMNS)
            for row in found:
                print({key: row[key] for key in COLUMNS[:13]}, flush=True)
    wrong = [row for row in rows if row["verdict"] != "equal"]
    state.wait_for_everyone()
    state.destroy_process_group()
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} rows differ by more than rounding.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="part of a case's name")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", default=str(OUTPUT))
    return parser.parse_args()


def run_case(case: str, shape: tuple, args: argparse.Namespace, state: PartialState) -> list[dict[str, Any]]:
    """All contenders at one shape, alone and then shared."""
    model, inputs = build(shape, args.layers, state.device)
    inputs["timestep"].fill_(last_timestep(args.rounds))
    with torch.no_grad():
        other = model(**inputs, return_dict=False)[0].float() if shape[0] == "wan" else None
    alone = {name: measure(model, processor, inputs, args.rounds) for name, processor in processors().items()}
    if other is None:  # HunyuanVideo's stock attention holds a mask for all pairs of tokens: too much here
        sparsify(model, DenseProcessor(fused_norm="off"))
        with torch.no_grad():
            other = model(**inputs, return_dict=False)[0].float()
        restore(model)
    dense = alone["dense"]["out"]
    yardstick = float((dense - other).norm() / other.norm())
    parallelize(model)
    rows = []
    for name, processor in processors().items():
        shared = measure(model, processor, inputs, args.rounds, keep=True)
        one = alone[name]
        difference = float((shared["out"] - one["out"]).norm() / one["out"].norm())
        rows.append(
            {
                "case": case, "layers": args.layers, "tokens": shape[3] * shape[4] * shape[5] // 4, "contender": name,
                "gpus": state.num_processes, "alone_s": one["seconds"], "shared_s": shared["seconds"],
                "scaling": one["seconds"] / shared["seconds"], "difference": difference, "yardstick": yardstick,
                "verdict": "equal" if difference <= max(2 * yardstick, 1e-6) else "differs",
                "density": one["density"], "peak_gb_alone": one["peak"], "peak_gb_shared": shared["peak"],
                **environment(),
            }
        )  # fmt: skip
    return rows


def last_timestep(rounds: int) -> float:
    """Of the output that `measure` returns."""
    return FIRST_TIMESTEP - rounds


def build(shape: tuple, layers: int, device: torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
    """A transformer and its inputs, the same on every rank."""
    family, heads, ffn, frames, rows, columns = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    half = {"device": device, "dtype": dtype}
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        if family == "wan":
            model: Any = WanTransformer3DModel(
                num_attention_heads=heads, num_layers=layers, ffn_dim=ffn, cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
            )  # fmt: skip
        else:
            dual = max(1, layers // 2)
            model = HunyuanVideoTransformer3DModel(
                num_attention_heads=heads, num_layers=dual, num_single_layers=max(1, layers - dual), text_embed_dim=64,
                num_refiner_layers=1,
            )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    if family == "wan":
        model.rope = type(model.rope)(128, (1, 2, 2), 1024).to(device)  # tables in full precision
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, rows, columns, **half),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(1, 256, 4096 if family == "wan" else 64, **half),
    }
    if family == "hunyuan_video":
        mask = torch.zeros(1, 256, device=device)
        mask[:, :77] = 1
        inputs |= {"encoder_attention_mask": mask, "pooled_projections": torch.randn(1, 768, **half)}
        inputs["guidance"] = torch.full((1,), 6000.0, **half)
    return model.eval().requires_grad_(False), inputs


def measure(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], rounds: int, keep: bool = False
) -> dict[str, Any]:
    """The last output on the device, median seconds, density and peak memory; `keep` leaves the processor there."""
    on_gpu = inputs["hidden_states"].is_cuda
    sparsify(model, processor)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(rounds + 1):
        inputs["timestep"].fill_(FIRST_TIMESTEP - number)  # a bare transformer tells steps by their timestep
        torch.distributed.barrier()
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            out = model(**inputs, return_dict=False)[0]
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    density = processor.report().density
    if not keep:
        restore(model)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else ""
    return {"out": out.float(), "seconds": statistics.median(times[1:]), "density": density, "peak": peak}


if __name__ == "__main__":
    run_program(main)
