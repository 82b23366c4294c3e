"""What a calibration of PAROAttention costs: seconds, and the size of its plan.

    python eval/bench_calibration.py                                              about two minutes of one H200
    python eval/bench_calibration.py --only embedded --device cpu --output some.csv   the embedded model alone

`measured` rows are whole calibrations of the embedded model, as `videosparse calibrate` does them, two prompts of 50
steps, loading left out. `extrapolated` rows are Wan2.1-14B at 81 frames of 720x1280: a transformer of its shapes with
random weights and only a few layers runs the very parts of a calibration, each is timed by itself after a first time
that is not counted, and seconds are multiplied by how many layers there are and how often a calibration does it. What a
forward does outside its layers is multiplied along, so that the sum is rather too high. The plan of that size is really
written and read; its maps are those of the few layers, again and again. Rows go to
`assets/results/paro_calibration.csv`.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.cases import CASES, Case
from videosparse.generation.calibrating import BUCKETS, CalibrationRequest, calibrate, keep_blocks
from videosparse.generation.looking import Call, Figures, MapSums, Watch, watching
from videosparse.kernels.order_search import ORDERS, OrderMetric
from videosparse.layout import TokenLayout
from videosparse.policies.base import BLOCK
from videosparse.policies.paro import DENSITY
from videosparse.policies.paro_plan import PAROPlan, PlanFacts, plain_config

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/paro_calibration.csv"
CASE = "wan2.1-14b 720x1280x81"
FRAMES = (33, 81)
PROMPTS = ("a big yellow star bounces on a grey background", "two circles, one green and one purple, orbit")
STEPS = 50
BRANCHES = 2
COLUMNS = (
    "case", "kind", "part", "seconds", "times", "total_s", "plan_mb", "layers", "layers_run", "heads", "tokens",
    "block", "density", "prompts", "steps", "maps", *WHERE,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of a calibration: seconds for the layers that ran, and how often a whole one does it."""

    name: str
    seconds: float
    times: int

    def columns(self) -> dict[str, Any]:
        """Of its row."""
        total = f"{self.seconds * self.times:.2f}" if self.times else ""
        return {"part": self.name, "seconds": f"{self.seconds:.3f}", "times": self.times, "total_s": total}


def clock(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, what: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what it returned)."""
    begin = clock(device)
    found = what()
    return clock(device) - begin, found


def random_pipeline(layers: int, device: torch.device, dtype: torch.dtype, **config: Any) -> WanPipeline:
    """A pipeline of nothing but a transformer with random weights; its defaults are the shapes of Wan2.1-14B."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = WanTransformer3DModel(num_layers=layers, **config).eval()
    # not its own `to`, which warns that published weights have small parts that stay in fp32
    torch.nn.Module.to(transformer, dtype)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments_of(pipe: WanPipeline, case: Case, device: torch.device) -> dict[str, Any]:
    """Of a call with random text."""
    text = torch.randn(2, 1, 512, pipe.transformer.config.text_dim, device=device, dtype=pipe.transformer.dtype)
    return {
        "prompt_embeds": text[0], "negative_prompt_embeds": text[1], "num_frames": case.num_frames,
        "height": case.height, "width": case.width, "num_inference_steps": 4, "guidance_scale": 5.0,
    }  # fmt: skip


def denoising(watch: Watch, device: torch.device, arguments: dict[str, Any]) -> tuple[dict[str, float], list[Call]]:
    """Seconds of a forward that is looked at and of one that is not, and the calls that were looked at.

    Steps 0 and 1 are looked at, 2 and 3 are not; of both kinds the first warms up.
    """
    seconds: list[float] = []
    transformer = watch.pipe.transformer
    begin = transformer.register_forward_pre_hook(lambda *_: seconds.append(-clock(device)), prepend=True)
    end = transformer.register_forward_hook(lambda *_: seconds.append(seconds.pop() + clock(device)))
    heads = int(watch.tracker.config["num_attention_heads"])
    try:
        calls = watch.run({0: 0, 1: 0}, Figures(watch.layers, heads, OrderMetric()), arguments)
    finally:
        begin.remove()
        end.remove()
    found = {"looked at": seconds[2:4], "plain": seconds[6:8]}
    return {name: sum(values) / len(values) for name, values in found.items()}, calls


def parts_of(watch: Watch, case: Case, device: torch.device) -> tuple[list[Part], torch.Tensor]:
    """The parts of a calibration on the layers that there are, and the bits of a map, [layers, heads, M, bytes]."""
    looked_at = (BUCKETS + 1) * BRANCHES * len(PROMPTS)
    forwards = STEPS * BRANCHES * len(PROMPTS)
    denoise, calls = denoising(watch, device, arguments_of(watch.pipe, case, device))
    heads = int(watch.tracker.config["num_attention_heads"])
    codes = torch.randint(len(ORDERS), (watch.layers, heads), dtype=torch.uint8)
    for call in calls[:2]:  # the first warms up
        sums = MapSums(codes, case.grid, BLOCK)
        replay, _ = timed(device, lambda call=call, sums=sums: watch.replay([call], sums))
    keep_blocks(sums.sums[0], DENSITY, None, device)
    keep, found = timed(device, lambda: [keep_blocks(x, DENSITY, None, device) for x in sums.sums])
    parts = [
        Part("dense forward", denoise["plain"], forwards - looked_at),
        Part("forward looked at in six orders", denoise["looked at"], looked_at),
        Part("forward again, for the sums of blocks", replay, looked_at),
        Part("choice of blocks", keep, BUCKETS + 1),
    ]
    return parts, torch.stack([bits for _, bits, _ in found])


def plan_of(bits: torch.Tensor, config: Any, case: Case, layers: int) -> PAROPlan:
    """A plan for all layers out of the maps of a few."""
    own, heads = bits.shape[:2]
    repeated = bits[torch.arange(layers) % own][:, None].expand(-1, BUCKETS + 1, -1, -1, -1)
    columns = -(-case.grid.tokens // BLOCK[1])
    counts = torch.full((layers, BUCKETS + 1, heads), max(1, int(DENSITY * columns + 0.5)), dtype=torch.int32)
    facts = PlanFacts(
        model_class="WanTransformer3DModel", config=plain_config(config), text=0, layers=layers, heads=heads,
        grid=(case.grid.frames, case.grid.height, case.grid.width), block=BLOCK, buckets=BUCKETS, density=DENSITY,
        mass=None, video=(case.num_frames, case.height, case.width),
    )  # fmt: skip
    codes = torch.randint(len(ORDERS), (layers, heads), dtype=torch.uint8)
    return PAROPlan(codes, counts, repeated.contiguous(), facts)


def file_parts(plan: PAROPlan, path: Path, device: torch.device) -> list[Part]:
    """Writing, reading, and bringing the maps of one part of a run to the device."""
    layout = TokenLayout(plan.grid).aligned(BLOCK)
    plan.index(layout, 0, 0, device)
    upload, _ = timed(device, lambda: [plan.index(layout, n, 0, device) for n in range(plan.facts.layers)])
    save, _ = timed(device, lambda: plan.save(path))
    load, _ = timed(device, lambda: PAROPlan.load(path))
    return [
        Part("plan written", save, 1),
        Part("plan read and checked", load, 0),
        Part("maps of a part of the run to the device", upload, 0),
    ]


def extrapolated(case: Case, layers_run: int, device: torch.device, pipe: WanPipeline) -> Iterator[dict[str, Any]]:
    """The rows of a large model."""
    layers = case.model.layers
    with watching(pipe, device) as watch, torch.inference_mode():
        parts, bits = parts_of(watch, case, device)
        config = watch.tracker.config
    common = {
        "case": case.name, "kind": "extrapolated", "layers": layers, "layers_run": layers_run,
        "heads": case.model.heads, "tokens": case.grid.tokens, **_asked(),
    }  # fmt: skip
    whole = [Part(p.name, p.seconds * layers / layers_run, p.times) for p in parts]
    yield from (common | part.columns() for part in whole)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.safetensors"
        of_file = file_parts(plan_of(bits, config, case, layers), path, device)
        size = f"{path.stat().st_size / 1e6:.3f}"
    yield from (common | part.columns() for part in of_file)
    whole += of_file
    total = sum(p.seconds * p.times for p in whole)
    yield common | {"part": "all", "total_s": f"{total:.1f}", "plan_mb": size}


def measured(frames: int, device: str, steps: int, folder: Path) -> dict[str, Any]:
    """The row of one calibration of the embedded model."""
    request = CalibrationRequest(
        PROMPTS, num_frames=frames, steps=steps, device=device, buckets=min(BUCKETS, steps // 2)
    )
    found = calibrate(request, folder / "plan.safetensors", overwrite=True)
    facts = found.plan.facts
    return {
        "case": f"tiny-wan {facts.video[1]}x{facts.video[2]}x{frames}", "kind": "measured", "part": "all",
        "total_s": f"{found.seconds:.2f}", "plan_mb": f"{found.path.stat().st_size / 1e6:.3f}",
        "layers": facts.layers, "layers_run": facts.layers, "heads": facts.heads,
        "tokens": found.plan.grid.tokens, **_asked(), "steps": steps, "maps": facts.buckets + 1,
    }  # fmt: skip


def _asked() -> dict[str, Any]:
    return {
        "block": "x".join(map(str, BLOCK)), "density": DENSITY, "prompts": len(PROMPTS), "steps": STEPS,
        "maps": BUCKETS + 1,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    one = f"{row['seconds']:>8} s x {row['times']}" if "seconds" in row else ""
    size = f"plan {row['plan_mb']} MB" if "plan_mb" in row else ""
    return f"{row['case']:26} {row['kind']:12} {row['part']:40} {one:18} {row['total_s']:>8} s {size}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help='"embedded", "wan": cases whose name matches')
    parser.add_argument("--layers", type=int, default=2, help="of the large model that are run")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the embedded model's runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    args = parser.parse_args(argv)
    if args.output == OUTPUT and (args.only or args.steps != STEPS or not args.device.startswith("cuda")):
        parser.error(f"other cases or devices would replace the rows of {OUTPUT}; give another --output.")
    rows: list[dict[str, Any]] = []
    where = environment(args.commit)

    def keep(row: dict[str, Any]) -> None:
        """Written at once: a run that is cut off keeps what it has."""
        rows.append(row | where)
        write_rows(args.output, rows, COLUMNS)
        print(line(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for frames in FRAMES if re.search(args.only, "embedded") else ():
            if not rows:  # a first one, for what is compiled and loaded once
                measured(frames, args.device, 2, Path(folder))
            keep(measured(frames, args.device, args.steps, Path(folder)))
    if re.search(args.only, CASE):
        device = torch.device(args.device)
        pipe = random_pipeline(args.layers, device, torch.bfloat16)
        for row in extrapolated(CASES[CASE], args.layers, device, pipe):
            keep(row)
    return 0


if __name__ == "__main__":
    run_program(main)
