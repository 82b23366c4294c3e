"""What a training step costs at twice and four times the length: dense attention against Radial Attention.

    python eval/bench_training.py                          all cases: about five minutes of an H200
    python eval/bench_training.py --only wan2.1-14b        some; --seconds limits the time
    python eval/bench_training.py --smoke                  tiny shapes, on a CPU too, in seconds; rows to --output only

One clip, LoRA on q, k, v, o, gradient checkpointing, bf16, random weights: as many layers as the measurement needs.
A step with one layer and with two tells what a layer costs, and what the rest does; the whole model's time is
extrapolated from that (`layers_timed`, `extrapolated`), since no single GPU holds its activations and optimizer in
reasonable time. Dense attention is timed with cuDNN and with FlashAttention-2, both through torch, on the same
projected queries, keys and values; `radial` has its dense layers and its share of dense steps as in
the recipes (`radial` in the column attention; `radial, sparse layers` is without these).
Rows go to `assets/results/lora_training.csv`. A time is kept only if the loss is finite and within 2 % of the
first dense kernel's for the other.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from videosparse import DenseProcessor, RadialProcessor, sparsify
from videosparse.attach import tracker_of
from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.cases import MODELS, ModelSpec
from videosparse.training.adapters import add_adapters, trained
from videosparse.training.config import LoraConfig
from videosparse.training.families import TRAINING_FAMILIES
from videosparse.training.noise import NoiseLevels, dense_above

OUTPUT = Path("assets/results/lora_training.csv")
COLUMNS = (
    "case", "frames", "times_length", "tokens", "attention", "density", "layers_timed", "step_s", "layer_s", "rest_s",
    "peak_gib", "layers", "extrapolated_step_s", "against_cudnn", "against_fa2", "note", *WHERE,
)  # fmt: skip
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
# the recipes' schedule at these lengths
FIRST_STEPS, FIRST_LAYERS = 0.04, 2


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
    """A model of few layers at one case, and the inputs of a step.

    Args:
        case: what is timed.
        layers: self-attentions; for HunyuanVideo single-stream blocks, but one dual-stream block where `dual`.
        smoke: narrow, in fp32.
    """

    def __init__(self, case: Case, layers: int, dual: bool, device: torch.device, smoke: bool) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.family = TRAINING_FAMILIES[case.model.family]
        with torch.device(device):
            self.model = build(case.model, layers, dual, smoke).to(torch.float32 if smoke else torch.bfloat16)
        add_adapters(self.model, self.family, LoraConfig(rank=32), 0)
        self.model.enable_gradient_checkpointing()
        self.model.train()
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
        """Choose the attention: radial, or a dense kernel of torch."""
        if attention == "radial":
            sparsify(self.model, RadialProcessor(decay=1.0, first_steps=0, first_layers=0))
            return
        sparsify(self.model, DenseProcessor())
        for _, layer in tracker_of(self.model).layers:
            vars(layer)["core"] = partial(dense_core, KERNELS[attention])

    def step(self) -> float:
        """Loss of one step, gradients included."""
        out = self.model(**self.inputs, return_dict=False)[0]
        loss = F.mse_loss(out.float(), self.target.float())
        loss.backward()
        value = float(loss.detach())
        for parameter in trained(self.model).values():
            parameter.grad = None
        return value

    def timed(self, attention: str) -> tuple[float, float, float]:
        """(seconds, loss, peak GiB) of a step: of one after another, where a step is long, the first compiles apart."""
        self.attend_with(attention)
        on_gpu = self.device.type == "cuda"
        best, loss = math.inf, 0.0
        for turn in range(3):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            begin = time.perf_counter()
            loss = self.step()
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            best = min(best, seconds)
            if turn >= 1 or (attention != "radial" and seconds > 10):  # library kernels are not compiled first
                break
        return best, loss, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0

    def density(self) -> float:
        """Kept share of the blocks of the map."""
        plans = [layer.plan for _, layer in tracker_of(self.model).layers]
        layout = plans[0].layout
        resolved = RadialProcessor(decay=1.0).resolve(self.case.model, grid=layout.grid)
        return float(resolved.policy.static_map(layout, self.device).density)


def dense_core(kernel: SDPBackend, q: Any, k: Any, v: Any, plan: Any) -> torch.Tensor:
    """Plain dense attention; all text tokens are valid here, so no mask is needed."""
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2)


def build(spec: ModelSpec, layers: int, dual: bool, smoke: bool) -> Any:
    """The published shape with few layers."""
    import diffusers

    heads, head_dim = (2, 32) if smoke else (spec.heads, spec.head_dim)
    if spec.family == "wan":
        return diffusers.WanTransformer3DModel(
            num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, in_channels=16, out_channels=16,
            text_dim=64 if smoke else 4096, ffn_dim=128 if smoke else 13824, freq_dim=256,
        )  # fmt: skip
    return diffusers.HunyuanVideoTransformer3DModel(
        num_layers=int(dual), num_single_layers=layers - int(dual), num_attention_heads=heads,
        attention_head_dim=head_dim, num_refiner_layers=1 if smoke else 2, text_embed_dim=64 if smoke else 4096,
        rope_axes_dim=(8, 12, 12) if smoke else (16, 56, 56), guidance_embeds=True,
    )  # fmt: skip


def whole_model(case: Case, one: dict[str, float], two: float, dual: float | None) -> Callable[[str], float]:
    """Seconds of a step of the whole model by attention: from steps of one layer with each, of two layers, and of one
    dual-stream and one single-stream layer, with radial."""
    layer = two - one["radial"]
    rest = one["radial"] - layer
    first = layer if dual is None else dual - one["radial"]
    count, duals = case.model.layers, 0 if dual is None else 20

    def extrapolated(attention: str) -> float:
        more = one[attention] - one["radial"]
        return rest + duals * first + (count - duals) * layer + count * more

    return extrapolated


def measure(case: Case, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    hunyuan = case.model.family == "hunyuan_video"
    grid = case.model.grid(case.frames, case.height, case.width)
    kernels = ["math"] if device.type == "cpu" else args.kernels
    bench = Bench(case, 1, False, device, args.smoke)
    one: dict[str, float] = {}
    losses: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for attention in ("radial", *kernels):
        one[attention], losses[attention], peaks[attention] = bench.timed(attention)
        print(f"{case.model.name} {case.frames} {attention}: {one[attention]:.2f} s a step of one layer", flush=True)
    density = bench.density()
    del bench
    free(device)
    bench = Bench(case, 2, False, device, args.smoke)
    two, _, peak_two = bench.timed("radial")
    del bench
    free(device)
    dual = None
    if hunyuan:
        bench = Bench(case, 2, True, device, args.smoke)
        dual = bench.timed("radial")[0]
        del bench
        free(device)
    reference = losses[kernels[0]]
    for attention, loss in losses.items():
        off = abs(loss - reference) / reference
        if not math.isfinite(loss) or (attention != "radial" and off > 0.02):
            raise RuntimeError(f"{case.model.name} {case.frames} {attention}: loss {loss}, expected {reference}.")
    seconds = whole_model(case, one, two, dual)
    whole = {attention: seconds(attention) for attention in one}
    fastest = min(kernels, key=whole.__getitem__)
    layers = case.model.layers
    dense_layer = (whole[fastest] - whole["radial"]) / layers
    family = TRAINING_FAMILIES[case.model.family]
    share = NoiseLevels(family.draw, family.shift).share_above(dense_above(FIRST_STEPS, family.shift))
    with_layers = whole["radial"] + FIRST_LAYERS * dense_layer
    whole["radial, sparse layers"] = whole["radial"]
    whole["radial"] = share * whole[fastest] + (1 - share) * with_layers
    rows = []
    for attention in (*kernels, "radial", "radial, sparse layers"):
        timed = attention.split(",")[0]
        rows.append(
            {
                "case": f"{case.model.name} {case.height}x{case.width}",
                "frames": case.frames,
                "times_length": case.times,
                "tokens": grid.tokens + case.model.text,
                "attention": attention,
                "density": f"{density:.4f}" if timed == "radial" else 1,
                "layers_timed": 1,
                "step_s": f"{one[timed]:.3f}",
                "layer_s": f"{two - one['radial'] + one[timed] - one['radial']:.3f}",
                "rest_s": f"{2 * one['radial'] - two:.3f}",
                "peak_gib": f"{peaks[timed]:.2f}",
                "layers": layers,
                "extrapolated_step_s": f"{whole[attention]:.2f}",
                **{f"against_{k}": f"{whole[k] / whole[attention]:.3f}" for k in kernels if k in ("cudnn", "fa2")},
                "note": f"{FIRST_LAYERS} dense layers, {share:.3f} of the steps dense" if attention == "radial" else "",
                **environment(args.commit),
            }
        )
        print({k: rows[-1][k] for k in ("case", "frames", "attention", "extrapolated_step_s", "peak_gib")}, flush=True)
    print(f"peak of two layers: {peak_two:.2f} GiB", flush=True)
    return rows


def free(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose model or frames contain this")
    parser.add_argument("--kernels", nargs="+", default=["cudnn", "fa2"], choices=list(KERNELS))
    parser.add_argument("--seconds", type=float, default=1e9, help="no new case is begun after these")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--commit", help="of the code; asked of git unless given")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    for case in SMOKE if args.smoke else CASES:
        if args.only not in f"{case.model.name} {case.frames}" or time.monotonic() - started > args.seconds:
            continue
        try:
            rows += measure(case, device, args)
        except torch.OutOfMemoryError as error:
            print(f"{case.model.name} {case.frames}: out of memory ({str(error)[:120]})", flush=True)
        free(device)
        if rows:
            write_rows(args.output, rows, COLUMNS)
    print(f"{len(rows)} rows in {args.output}, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
