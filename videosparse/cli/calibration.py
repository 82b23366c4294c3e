"""`videosparse calibrate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from videosparse.cli.console import Debug, bars, guard, memory, rows, seconds
from videosparse.cli.options import Frames, Guidance, Height, Lora, LoraScale, Offload, Shift, Steps, Width

if TYPE_CHECKING:
    from videosparse.generation.calibrating import Calibration


def calibrate(
    prompts: Annotated[Path, typer.Option(help="Text file with one or two typical prompts, a line each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan, a .safetensors file.")],
    model: Annotated[
        str | None,
        typer.Option(help="Diffusers folder, hub id or name (wan2.1-1.3b, ...).", show_default="the embedded model"),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the blocks that every row keeps.", show_default="0.2")
    ] = None,
    mass: Annotated[
        float | None, typer.Option(help="Instead: share of the attention that each head keeps, such as 0.95.")
    ] = None,
    block: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a block: 64 or 128, or queries x keys.", show_default="128x64; 64 for small frames"
        ),
    ] = None,
    buckets: Annotated[
        int,
        typer.Option(help="Parts of the first half of a run with maps of their own; a run needs twice as many steps."),
    ] = 5,
    order_by: Annotated[
        str,
        typer.Option(
            help="How each head's order is chosen: metric is the paper's; mass, by the attention that its map keeps."
        ),
    ] = "metric",
    alpha: Annotated[
        float | None,
        typer.Option(help="Weight of sparsity against evenness in the paper's metric.", show_default="0.5"),
    ] = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    seed: Annotated[int, typer.Option(help="Of the noise; the same seed gives the same plan.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    offload: Offload = None,
    lora: Lora = None,
    lora_scale: LoraScale = None,
    ultravico: Annotated[float | None, typer.Option(hidden=True)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing plan.")] = False,
    debug: Debug = False,
) -> None:
    """Make a plan for --method paro: token orders and block maps of a model at one size, from a few dense runs.

    A run needs at least twice as many steps as buckets, 10 by default. A plan of Wan2.2-A14B holds both experts, and
    each of them needs as many. There is no --ultravico here: maps are of scores as they are.

    An interrupted calibration goes on where it was when the same command is given again.
    """
    own = ("density", "mass", "block", "buckets", "order_by", "alpha")
    with guard(debug, "Interrupted; the same command goes on after the last finished prompt or map.", own):
        from videosparse.generation.calibrating import CalibrationRequest
        from videosparse.generation.calibrating import calibrate as run
        from videosparse.generation.errors import GenerationError

        if ultravico is not None:
            raise GenerationError(
                "calibrate has no --ultravico: maps are made from scores as they are, and far ones would count less in "
                "such a run; drop it, or let maps be found in the run: generate --method paro without --plan."
            )
        if density is not None and mass is not None:
            raise GenerationError(
                f"--density and --mass both say how many blocks are kept (got {density} and {mass}); give one of them."
            )
        request = CalibrationRequest(
            prompts=_prompts(prompts),
            model=model,
            density=density,
            mass=mass,
            block=None if block is None else _block(block),
            buckets=buckets,
            order_by=order_by,
            alpha=alpha,
            num_frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            shift=shift,
            seed=seed,
            device=device,
            dtype=dtype,
            offload=offload or "none",
            loras=tuple(lora or ()),
            lora_scales=tuple(lora_scale or ()),
        )
        with bars() as progress:
            result = run(request, output, overwrite=overwrite, progress=progress)
        _show(result)


def _prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file; calibration has one size and seed for all."""
    from videosparse.generation.errors import GenerationError
    from videosparse.generation.runfile import read_prompts

    lines = read_prompts(path)
    if given := next((line for line in lines if line.values), None):
        raise GenerationError(
            f"{path}: calibration takes no values of a line ({', '.join(given.values)} after {given.prompt!r}); give "
            "them as options."
        )
    return tuple(line.prompt for line in lines)


def _block(text: str) -> tuple[int, int]:
    from videosparse.generation.errors import GenerationError

    found = re.fullmatch(r"(\d{1,4})(?:\s*[x×,]\s*(\d{1,4}))?", text.strip())
    if found is None:
        raise GenerationError(f"block must be one size or two, such as 64 or 128x64 (got {text!r}).")
    return int(found[1]), int(found[2] or found[1])


_CHOSEN_BY = {"metric": "the paper's metric", "mass": "the attention that the map keeps"}


def _show(result: Calibration) -> None:
    from videosparse.ordering import AXIS_ORDERS

    plan, run = result.plan, result.settings.runs[0]
    facts = plan.facts
    codes = plan.codes.flatten().tolist()
    layers = f"{facts.layers} layers" if facts.experts == 1 else f"{facts.experts} experts of {facts.layers} layers"
    chosen = ", ".join(f"{name} {codes.count(code)}" for code, name in enumerate(AXIS_ORDERS) if code in codes)
    recall = facts.method["recall"]
    load = "" if result.load_seconds is None else f", loading {seconds(result.load_seconds)}"
    rows(
        [
            ("Model", f"{run.source.name}, {run.dtype} on {run.device}; {layers} of {facts.heads} heads"),
            ("Size", f"{run.num_frames} frames of {run.height}x{run.width}, grid {plan.grid}; {run.steps} steps"),
            ("Prompts", f"{len(result.settings.runs)}, {facts.method['calls']} calls looked at"),
            ("Orders", f"{chosen} (heads of {len(codes)}); by {_CHOSEN_BY[facts.method['order_by']]}"),
            ("Density", f"{plan.density:.3f} video-video, in blocks of {facts.block[0]}x{facts.block[1]}"),
            (
                "Recall",
                f"{min(recall):.3f} to {max(recall):.3f} of the attention among video tokens, by part of the run",
            ),
            ("Time", f"{seconds(result.seconds)}{load}" + ("; went on from an interrupted run" * result.resumed)),
            ("Plan", f"{result.path} ({memory(result.path.stat().st_size)})"),
        ]
    )
