"""Options that several commands have, each under one name."""

from __future__ import annotations

from typing import Annotated

import typer

Preset = Annotated[
    list[str] | None,
    typer.Option(help="By name: settings of a model, a speed (exact, balanced, fast), or both; see presets."),
]

Method = Annotated[str | None, typer.Option(help="Attention: radial, adaspa, paro or dense.", show_default="radial")]

Frames = Annotated[int | None, typer.Option(help="Pixel frames: 4k+1, of Mochi 6k+1.", show_default="the model's")]

Height = Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")]

Width = Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")]

Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the model's")]

Guidance = Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the model's")]

Shift = Annotated[float | None, typer.Option(help="Of the noise schedule.", show_default="the model's")]

Linears = Annotated[str | None, typer.Option(help="Linear layers of the blocks: none or fp8.", show_default="none")]

Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Compile the blocks.", show_default="no")]

Offload = Annotated[
    str | None,
    typer.Option(help="none, model: keep the part in use on the GPU, or group: a block.", show_default="none"),
]

Lora = Annotated[
    list[str] | None,
    typer.Option(help="A LoRA's file, folder or hub id; one of ours sets length and schedule. May be repeated."),
]

LoraScale = Annotated[
    list[float] | None, typer.Option(help="How much of each --lora is added, in their order.", show_default="1")
]

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="METHOD.OPTION=VALUE", help="An option of the method, such as radial.decay=0.5."),
]

Plan = Annotated[
    str | None,
    typer.Option("--plan", help="For paro: what videosparse calibrate made; short for --set paro.plan=FILE."),
]

Ultravico = Annotated[
    float | None,
    typer.Option(
        metavar="ALPHA",
        help="Beyond the trained length: factor of positive scores of far tokens, such as 0.9.",
        show_default=False,
    ),
]

TrainedFrames = Annotated[int | None, typer.Option(help="Pixel frames of that length.", show_default="the model's")]

ContextFrames = Annotated[
    int | None,
    typer.Option(help="Call the model on windows of so many pixel frames and blend them.", show_default="whole video"),
]

ContextOverlap = Annotated[
    int | None, typer.Option(help="Pixel frames that neighbouring windows share.", show_default="16, for Mochi 18")
]


def with_plan(plan: str | None, options: list[str] | None) -> list[str]:
    """What was --set, and the plan as one of them."""
    if plan is not None and not plan.strip():
        from videosparse.generation.errors import GenerationError

        raise GenerationError("--plan must not be empty; give what videosparse calibrate made.")
    if plan is not None and plan.lower() == "none":
        plan = f"./{plan}"  # a file: the word alone would be the method's default
    return [*(() if plan is None else (f"paro.plan={plan}",)), *(options or ())]
