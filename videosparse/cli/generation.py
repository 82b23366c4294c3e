"""`videosparse generate` and `videosparse demo`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from videosparse.cli.console import Debug, bars, guard, memory, rows, seconds
from videosparse.cli.options import (
    Compile,
    ContextFrames,
    ContextOverlap,
    Frames,
    Guidance,
    Height,
    Linears,
    Lora,
    LoraScale,
    Method,
    Offload,
    Plan,
    Preset,
    Set,
    Shift,
    Steps,
    TrainedFrames,
    Ultravico,
    Width,
    with_plan,
)

if TYPE_CHECKING:
    from pathlib import Path

    from videosparse.generation import Comparison, Generation, GenerationRequest, Settings
    from videosparse.generation.batch import Batch
    from videosparse.generation.running import Run

DEMO_PROMPT = "a red circle bounces on a checker background"
# (frames, steps): what two CPU cores do in well under a minute, radial and dense together; and what a GPU does in
# seconds, at the longest video that the embedded model was trained on, where sparse attention has more to leave out
DEMO_ON_CPU = 33, 8
DEMO_ON_GPU = 81, 20


def _demo_default(place: int) -> str:
    return f"{DEMO_ON_CPU[place]}, on a GPU {DEMO_ON_GPU[place]}"


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Diffusers folder, hub id or name (wan2.1-1.3b, ...).", show_default="the embedded model"),
    ] = None,
    preset: Preset = None,
    config: Annotated[str | None, typer.Option(help="A run file (TOML); options given here win.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A file with a prompt a line, which may end in --w --h --f --s --seed.")
    ] = None,
    method: Method = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the video should not show.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the noise; the same seed gives the same video.", show_default="0")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="An .mp4 file or a folder.", show_default="outputs/PROMPT-SEED-METHOD.mp4"),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.", show_default="the model's")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.", show_default="auto")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", show_default="auto")] = None,
    offload: Offload = None,
    step_cache: Annotated[
        str | None,
        typer.Option(
            metavar="KIND[=THRESHOLD]",
            help="Skip blocks where steps change little: none, first-block or magcache.",
            show_default="none",
        ),
    ] = None,
    magnitudes: Annotated[
        str | None, typer.Option(help="For magcache: a file; one that is not there is measured.", show_default=False)
    ] = None,
    linears: Linears = None,
    compile: Compile = None,
    rope: Annotated[
        str | None,
        typer.Option(help="Beyond the trained length: none, riflex, ntk or pi.", show_default="none"),
    ] = None,
    trained_frames: TrainedFrames = None,
    ultravico: Ultravico = None,
    context_frames: ContextFrames = None,
    context_overlap: ContextOverlap = None,
    plan: Plan = None,
    lora: Lora = None,
    lora_scale: LoraScale = None,
    options: Set = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run dense from the same noise: times, PSNR, SSIM, side by side.")
    ] = False,
    save_latents: Annotated[
        bool, typer.Option("--save-latents", help="Also keep what the VAE was given, as .safetensors.")
    ] = False,
    from_latents: Annotated[
        str | None, typer.Option(help="Only decode such a file; neither prompt nor transformer is needed.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    debug: Debug = False,
) -> None:
    """Make a video from a prompt, or many from a file of them, each with a JSON record of how it was made.

    A batch that was interrupted goes on with the videos that are missing when the same command is given again, without
    --overwrite.
    """
    with guard(debug):
        from videosparse.generation.methods import parse_overrides

        given: dict[str, object] = {
            "prompt": prompt, "model": model, "method": method, "frames": frames, "height": height, "width": width,
            "steps": steps, "guidance": guidance, "shift": shift, "negative_prompt": negative_prompt, "seed": seed,
            "fps": fps, "dtype": dtype, "device": device, "offload": offload, "rope": rope,
            "trained_frames": trained_frames, "ultravico": ultravico, "context_frames": context_frames,
            "context_overlap": context_overlap, "lora": lora or None, "lora_scale": lora_scale or None,
            "step_cache": step_cache, "magnitudes": magnitudes, "linears": linears, "compile": compile,
        }  # fmt: skip
        if from_latents is not None:
            more = {
                "preset": preset or None, "config": config, "prompts": prompts, "plan": plan, "set": options or None,
                "compare": compare or None, "save_latents": save_latents or None,
            }  # fmt: skip
            _decode(from_latents, given | more, output, overwrite)
            return
        chosen = {key: value for key, value in given.items() if value is not None}
        chosen |= parse_overrides(with_plan(plan, options))
        many = _generate(chosen, tuple(preset or ()), config, prompts, output, overwrite, compare, save_latents)
        if many is not None:
            command = "the same command" + (" without --overwrite" if overwrite else "")
            with guard(debug, f"Interrupted; {command} goes on with the videos that are missing."):
                _carry_out_batch(many)


def _generate(
    chosen: Mapping[str, object],
    preset: tuple[str, ...],
    config: str | None,
    prompts: str | None,
    output: str | None,
    overwrite: bool,
    compare: bool,
    latents: bool,
) -> Batch | None:
    """Make one video from values of all sources; many are planned and returned."""
    from videosparse.generation.batch import plan_batch
    from videosparse.generation.errors import GenerationError, calling
    from videosparse.generation.runfile import KEYS, merge, merged_sources, read_prompts, request_from

    values, file = merged_sources(chosen, preset, config)
    output = file.output if output is None else output
    many = file.prompts if prompts is None and "prompt" not in chosen else prompts
    lines = []
    if many is not None:
        for given, name in (("prompt" in chosen, "a prompt"), (compare, "--compare")):
            if given:
                raise GenerationError(f"A file of prompts and {name} do not go together; leave one.")
        lines = read_prompts(many)
    typed = {*chosen, *(key for line in lines for key in line.values)}
    with calling({KEYS[key][0]: f"{key} in {config}" for key in file.values if key in KEYS and key not in typed}):
        if many is None:
            _carry_out(request_from(values), output, overwrite, compare, latents)
            return None
        requests = [request_from(merge([values, line.values, {"prompt": line.prompt}])) for line in lines]
        labels = [f"{many}, line {line.number}" for line in lines]
        return plan_batch(requests, output, latents=latents, overwrite=overwrite, labels=labels)


def demo(
    frames: Annotated[int | None, typer.Option(help="Pixel frames, 4k+1.", show_default=_demo_default(0))] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default=_demo_default(1))] = None,
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


def _carry_out(
    request: GenerationRequest, output: str | None, overwrite: bool, compare: bool, latents: bool = False
) -> None:
    """Check, run, write, print."""
    from videosparse import generation

    if compare and latents:
        raise generation.GenerationError("--save-latents and --compare do not go together; leave one.")
    settings = request.resolve()
    place = generation.output_place(request, output, overwrite=overwrite, compare=compare, latents=latents)
    _notices(settings.notices)
    if not compare:
        with bars() as progress:
            made, paths = generation.generate_to(place, settings, progress=progress)
        _notices(made.run.notices, told=settings.notices)
        _show(settings, made.run, made.load_seconds)
    else:
        with bars() as progress:
            result = generation.compare(settings, progress=progress)
        paths = result.save(place)
        _notices(result.sparse.notices, told=settings.notices)
        _show(settings, result.sparse, result.load_seconds)
        _show_comparison(result)
    _files(paths)


def _carry_out_batch(batch: Batch) -> None:
    """Make what is missing, telling first what is known before, then of each video when it is there."""
    from videosparse.generation.batch import run_batch

    count = len(batch.runs)
    before = dict.fromkeys(notice for settings in batch.runs for notice in settings.notices)
    _notices(before)

    def told(number: int, made: Generation | None, paths: dict[str, Path]) -> None:
        if made is not None:
            _notices(made.run.notices, told=before)
        how = "was there already" if made is None else f"denoising {seconds(made.run.timings.denoise)}"
        rows([(f"{number + 1} of {count}", f"{paths['.mp4']} ({how})")])

    with bars() as progress:
        run_batch(batch, told, progress)


def _decode(path: str, given: Mapping[str, object], output: str | None, overwrite: bool) -> None:
    """Latents to a video."""
    from pathlib import Path

    from videosparse.generation.errors import GenerationError
    from videosparse.generation.latents import decode_latents, load_latents
    from videosparse.generation.output import destination

    model, device, fps = (given[key] for key in ("model", "device", "fps"))
    others = [key for key, value in given.items() if value is not None and key not in ("model", "device", "fps")]
    if others:
        raise GenerationError(f"--from-latents only decodes: {others[0].replace('_', '-')} is decided there; drop it.")
    latents = load_latents(path)
    place = destination(output, Path(path).stem, (".mp4",), overwrite, latents.about.get("fingerprint"))
    with bars() as progress:
        progress("decode", 0, 1)
        paths = decode_latents(latents, place, model=model, device=device or "auto", fps=fps)  # type: ignore[arg-type]
    _files(paths)


def _notices(notices: Iterable[str], told: Collection[str] = ()) -> None:
    for notice in notices:
        if notice not in told:
            typer.echo(f"Note: {notice}", err=True)


def _files(paths: Mapping[str, Path]) -> None:
    labels = {
        ".mp4": "Video", "-dense.mp4": "Dense", "-compare.mp4": "Both", ".json": "Record", ".safetensors": "Latents",
    }  # fmt: skip
    rows([(labels[ending], str(path)) for ending, path in paths.items()])


def _show(settings: Settings, run: Run, load: float | None) -> None:
    report, timings = run.report, run.timings
    where = "on the GPU" if settings.device.type == "cuda" else "by this process"
    backend = report.dense_backend if run.method == "dense" else report.backend
    rows(
        [
            ("Model", f"{settings.source.name}, {settings.dtype} on {settings.device}"),
            (
                "Size",
                f"{settings.num_frames} frames of {settings.height}x{settings.width} "
                f"({settings.num_frames / settings.fps:.1f} s at {settings.fps:g} fps), "
                f"grid {report.grid}, {report.tokens} tokens" + (" a window" if _windows(settings) > 1 else ""),
            ),
            (
                "Method",
                f"{method_text(run.method, run.options)}; {settings.steps} steps, {backend} backend"
                + (f", {report.search_calls} searches" if report.search_calls else ""),
            ),
            ("Density", density_text(report.video_density, report.density, report.average_density)),
            *_dense_rows(settings, run),
            *_length_rows(settings),
            *_lora_rows(settings),
            *_stack_rows(settings, run),
            (
                "Time",
                f"denoising {seconds(timings.denoise)}, prompt {seconds(timings.prompt)}, decoding "
                f"{seconds(timings.decode)}" + ("" if load is None else f", loading {seconds(load)}"),
            ),
            ("Memory", f"{memory(run.peak_bytes)} at most, {where}"),
        ]
    )


def _dense_rows(settings: Settings, run: Run) -> list[tuple[str, str]]:
    """How many steps and layers were dense, which a share of the run does not say."""
    from videosparse.policies.base import DenseSchedule

    names = ("first_steps", "last_steps", "first_layers", "last_layers")
    if not set(names) <= set(run.options):
        return []
    schedule = DenseSchedule(**{name: run.options[name] for name in names})  # type: ignore[arg-type]
    steps, layers = sum(schedule.dense_steps(settings.steps)), settings.source.spec.layers
    dense = min(layers, schedule.first_layers + schedule.last_layers)
    return [("Dense", f"{min(settings.steps, steps)} of {settings.steps} steps, {dense} of {layers} layers")]


def _windows(settings: Settings) -> int:
    """How many windows the transformer was called on at each step."""
    frames = settings.source.spec.latent_frames(settings.num_frames)
    return 1 if settings.windows is None else len(settings.windows.starts(frames))


def _length_rows(settings: Settings) -> list[tuple[str, str]]:
    """What was done for the length, where something was."""
    stride, windows, logit = settings.source.spec.stride[0], settings.windows, settings.logit
    parts = [
        *([f"rope {settings.request.rope}"] if settings.request.rope != "none" else []),
        *([f"far scores times {logit.alpha:g}"] if logit is not None else []),
    ]
    trained = settings.trained_frames if logit is None else (logit.trained - 1) * stride + 1
    if parts and trained is not None:
        parts[-1] += f" beyond {trained} frames"
    if windows is not None and (count := _windows(settings)) > 1:
        parts.append(
            f"{count} windows of {(windows.size - 1) * stride + 1} frames that share {windows.shared * stride}"
        )
    return [("Length", ", ".join(parts))] if parts else []


def _lora_rows(settings: Settings) -> list[tuple[str, str]]:
    return [
        ("LoRA" if not place else "", f"{lora.path}, scale {lora.scale:g}") for place, lora in enumerate(settings.loras)
    ]


def _stack_rows(settings: Settings, run: Run) -> list[tuple[str, str]]:
    """What was combined with attention, where something was."""
    stack, cache = settings.stack, settings.stack.step_cache
    parts = [
        *([f"linears in {stack.linears}"] if stack.linears != "none" else []),
        *(["compiled blocks"] if stack.compiled else []),
        *([f"offload {stack.offload}"] if stack.offload != "none" else []),
    ]
    if cache is not None and run.cache is not None:
        skipped = f"{run.cache.skipped} of {run.cache.forwards} forwards skipped"
        parts.insert(0, f"{cache.kind}={cache.threshold:g}: {skipped}")
    return [("Beside it", ", ".join(parts))] if parts else []


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
