"""`videosparse generate` and `videosparse demo`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from videosparse.cli.console import Debug, bars, guard, memory, rows, seconds

if TYPE_CHECKING:
    from videosparse.generation import Comparison, Generation, GenerationRequest, Settings
    from videosparse.generation.running import Run

DEMO_PROMPT = "a red circle bounces on a checker background"
# (frames, steps): what two CPU cores do in well under a minute, radial and dense together; and what a GPU does in
# seconds, at the longest video that the embedded model was trained on, where sparse attention has more to leave out
DEMO_ON_CPU = 33, 8
DEMO_ON_GPU = 81, 20

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="METHOD.OPTION=VALUE", help="An option of the method, such as radial.decay=0.5."),
]


Plan = Annotated[
    str | None, typer.Option(help="For paro: what videosparse calibrate made; short for --set paro.plan=FILE.")
]


def with_plan(plan: str | None, options: list[str] | None) -> list[str]:
    """What was --set, and the plan as one of them."""
    return [*(() if plan is None else (f"paro.plan={plan}",)), *(options or ())]


def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    model: Annotated[
        str | None,
        typer.Option(help="Diffusers folder, hub id or name (wan2.1-1.3b, ...).", show_default="the embedded model"),
    ] = None,
    method: Annotated[str, typer.Option(help="Attention: radial, adaspa, paro or dense.")] = "radial",
    frames: Annotated[int | None, typer.Option(help="Pixel frames.", show_default="the model's")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the model's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the model's")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What the video should not show.")] = "",
    seed: Annotated[int, typer.Option(help="Of the noise; the same seed gives the same video.")] = 0,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="An .mp4 file or a folder.", show_default="outputs/PROMPT-SEED-METHOD.mp4"),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.", show_default="the model's")] = None,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    offload: Annotated[str, typer.Option(help="none, or model: keep only the part in use on the GPU.")] = "none",
    plan: Plan = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA's file or folder; one of ours sets length and schedule. May be repeated."),
    ] = None,
    lora_scale: Annotated[
        list[float] | None, typer.Option(help="How much of each --lora is added, in their order.", show_default="1")
    ] = None,
    options: Set = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run dense from the same noise: times, PSNR, SSIM, side by side.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    debug: Debug = False,
) -> None:
    """Make a video from a prompt, and a JSON record of how it was made next to it."""
    with guard(debug):
        from videosparse.generation import GenerationRequest
        from videosparse.generation.methods import parse_overrides

        request = GenerationRequest(
            prompt=prompt,
            model=model,
            method=method,
            options=parse_overrides(with_plan(plan, options)),
            num_frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            negative_prompt=negative_prompt,
            seed=seed,
            device=device,
            dtype=dtype,
            fps=fps,
            offload=offload,
            loras=tuple(lora or ()),
            lora_scales=tuple(lora_scale or ()),
        )
        _carry_out(request, output, overwrite, compare)


def demo(
    frames: Annotated[int | None, typer.Option(help="Pixel frames, 4k+1.", show_default="25, on a GPU 81")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="6, on a GPU 20")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    output: Annotated[str | None, typer.Option("--output", "-o", help="An .mp4 file or a folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    debug: Debug = False,
) -> None:
    """Make one video with the embedded model, radial and dense from the same noise, and compare them."""
    with guard(debug):
        from videosparse.generation import GenerationRequest
        from videosparse.generation.environment import choose_device

        usual = DEMO_ON_CPU if choose_device(device).type == "cpu" else DEMO_ON_GPU
        request = GenerationRequest(
            DEMO_PROMPT,
            num_frames=usual[0] if frames is None else frames,
            steps=usual[1] if steps is None else steps,
            seed=seed,
            device=device,
        )
        _carry_out(request, output, overwrite, compare=True)


def _carry_out(request: GenerationRequest, output: str | None, overwrite: bool, compare: bool) -> None:
    """Check, run, write, print."""
    from videosparse import generation

    settings = request.resolve()
    place = generation.output_place(request, output, overwrite=overwrite, compare=compare)
    result: Comparison | Generation
    with bars() as progress:
        if compare:
            result = generation.compare(settings, progress=progress)
        else:
            result = generation.generate(settings, progress=progress)
    paths = result.save(place)
    for notice in (result.sparse if isinstance(result, generation.Comparison) else result.run).notices:
        typer.echo(f"Note: {notice}", err=True)
    if isinstance(result, generation.Comparison):
        _show(settings, result.sparse, result.load_seconds)
        _show_comparison(result)
    else:
        _show(settings, result.run, result.load_seconds)
    labels = {".mp4": "Video", "-dense.mp4": "Dense", "-compare.mp4": "Both", ".json": "Record"}
    rows([(labels[ending], str(path)) for ending, path in paths.items()])


def _show(settings: Settings, run: Run, load: float | None) -> None:
    report, timings = run.report, run.timings
    where = "on the GPU" if settings.device.type == "cuda" else "by this process"
    rows(
        [
            ("Model", f"{settings.source.name}, {settings.dtype} on {settings.device}"),
            (
                "Size",
                f"{settings.num_frames} frames of {settings.height}x{settings.width} "
                f"({settings.num_frames / settings.fps:.1f} s at {settings.fps:g} fps), "
                f"grid {report.grid}, {report.tokens} tokens",
            ),
            ("Method", f"{method_text(run.method, run.options)}; {settings.steps} steps, {report.backend} backend"),
            ("Density", density_text(report.video_density, report.density, report.average_density)),
            (
                "Time",
                f"denoising {seconds(timings.denoise)}, prompt {seconds(timings.prompt)}, decoding "
                f"{seconds(timings.decode)}" + ("" if load is None else f", loading {seconds(load)}"),
            ),
            ("Memory", f"{memory(run.peak_bytes)} at most, {where}"),
        ]
    )


def _show_comparison(result: Comparison) -> None:
    sparse, dense = result.sparse.timings.denoise, result.dense.timings.denoise
    scores = ", ".join(
        f"{row.metric.upper()} {row.value:.2f} dB" if row.metric == "psnr" else f"{row.metric.upper()} {row.value:.4f}"
        for row in result.fidelity
    )
    rows(
        [
            ("Speed", f"{seconds(dense)} dense, {seconds(sparse)} {result.sparse.method}: {result.speedup:.2f}x"),
            ("", f"({result.measured}; dense: {result.dense_backend})"),
            *([("", result.explanation)] if result.explanation else []),
            ("Fidelity", f"{scores} against dense (mean over frames, convention {result.fidelity[0].convention})"),
        ]
    )


def method_text(method: str, options: Mapping[str, object]) -> str:
    """A method and its options in one line."""
    return " ".join([method, *(f"{name}={value}" for name, value in options.items() if value is not None)])


def density_text(video: float, every: float, average: float) -> str:
    """The three densities in one line."""
    return (
        f"{video:.3f} video-video, {every:.3f} with text and forced blocks, {average:.3f} over the run with its dense "
        "steps and layers"
    )
