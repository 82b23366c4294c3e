"""`videosparse plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from videosparse.cli.console import Debug, flops, guard, memory, rows, seconds
from videosparse.cli.generation import density_text, method_text
from videosparse.cli.options import (
    Compile,
    ContextFrames,
    ContextOverlap,
    Frames,
    Guidance,
    Height,
    Linears,
    Lora,
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
    from videosparse.generation.planning import GenerationPlan


def plan(
    model: Annotated[
        str | None,
        typer.Option(help="Name (wan2.1-14b, ...), Diffusers folder or hub id.", show_default="the embedded model"),
    ] = None,
    preset: Preset = None,
    config: Annotated[
        str | None, typer.Option(help="A run file (TOML), without its prompts; options given here win.")
    ] = None,
    method: Method = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    linears: Linears = None,
    compile: Compile = None,
    offload: Offload = None,
    ultravico: Ultravico = None,
    trained_frames: TrainedFrames = None,
    context_frames: ContextFrames = None,
    context_overlap: ContextOverlap = None,
    plan_file: Plan = None,
    lora: Lora = None,
    options: Set = None,
    png: Annotated[str | None, typer.Option(help="Also draw the block map to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing picture.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a run will cost, without weights: tokens, densities, attention work, and the block map.

    Takes those options of generate that change the cost; the rest of a preset or run file is left alone.
    """
    with guard(debug):
        from videosparse.generation.methods import parse_overrides
        from videosparse.generation.output import picture_place
        from videosparse.generation.planning import plan_request
        from videosparse.generation.runfile import merged_sources, request_from

        given: dict[str, object] = {
            "model": model, "method": method, "frames": frames, "height": height, "width": width, "steps": steps,
            "guidance": guidance, "shift": shift, "linears": linears, "compile": compile, "offload": offload,
            "ultravico": ultravico, "trained_frames": trained_frames, "context_frames": context_frames,
            "context_overlap": context_overlap, "lora": lora or None,
        }  # fmt: skip
        chosen = {key: value for key, value in given.items() if value is not None}
        chosen |= parse_overrides(with_plan(plan_file, options))
        values, _ = merged_sources(chosen, preset or (), config)
        request = request_from({**values, "prompt": "any"})  # what it says costs nothing
        place = None if png is None else picture_place(png, overwrite)
        result = plan_request(request)
        for notice in result.notices:
            typer.echo(f"Note: {notice}", err=True)
        _show(result, request.method)
        if place is not None:
            written = place.publish({".png": result.save_png})
            rows([("Picture", str(written[".png"]))])


def _show(result: GenerationPlan, method: str) -> None:
    spec, grid = result.source.spec, result.grid
    text = f" + {result.layout.text} text" if result.layout.text else ""
    rows(
        [
            ("Model", f"{result.source.name}: {spec.layers} layers, {spec.heads} heads of {spec.head_dim}"),
            ("Grid", f"{grid} latent frames x rows x columns, {grid.tokens}{text} tokens"),
            ("Method", method_text(method, result.method)),
            *_length(result),
        ]
    )
    if result.blocks is not None and result.block is not None:
        count = " x ".join(str(n) for n in result.blocks)
        size = " x ".join(str(n) for n in result.block)
        rows(
            [
                ("Blocks", f"{count} of {size} tokens"),
                ("Density", density_text(result.video_density, result.density, result.average_density)),
                ("Dense", f"{_steps(result)}, {_layers(result)} layers"),
            ]
        )
    step = f"{flops(result.dense_flops)} dense"
    run = f"{flops(result.dense_run_flops)} dense"
    if result.blocks is not None:
        step += f", {flops(result.sparse_flops)} sparse"
        run += f", {flops(result.run_flops)} with this method"
    if result.search:
        run += f", of which {flops(result.search_flops)} to search"
    rows(
        [
            ("A step", f"{step} (self-attention, {result.forwards} forward{'s' if result.forwards > 1 else ''})"),
            ("A run", f"{run} ({result.steps} steps)"),
            *_estimate(result),
        ]
    )
    if result.blocks is None:
        return
    bound = f"attention at most {result.attention_bound:.2f}x faster over the run; the rest gains nothing"
    rows([("Bound", bound), *_state(result)])
    if result.block_map is None:
        return
    rows(
        [
            (
                "Memory",
                f"map {memory(result.map_bytes)}, lists {memory(result.index_bytes)}; one for all heads and layers",
            ),
            ("Built in", f"{seconds(result.build_seconds)} on this CPU"),
        ]
    )
    typer.echo(f"\n{result.block_map.picture()}")


def _length(result: GenerationPlan) -> list[tuple[str, str]]:
    """Rows on how the video gets longer than the model was trained for."""
    rows, logit = [], result.logit
    if result.windows > 1:
        rows.append(("Windows", f"{result.windows} of {result.grid.frames} latent frames, blended at every step"))
    if logit is not None:
        rows.append((
            "UltraViCo",
            f"positive scores times {logit.alpha:g} beyond half of {logit.trained} latent frames; by the portable "
            "kernel, in dense calls, too",
        ))  # fmt: skip
    return rows


def _estimate(result: GenerationPlan) -> list[tuple[str, str]]:
    """Rows on time and memory, where measured rates tell."""
    from videosparse.generation.estimating import estimate

    found = estimate(result)
    if found is None:
        return []
    time = f"about {found.seconds / 60:.0f} min on one {found.gpu}"
    if result.blocks is not None:
        time += f", {found.dense_seconds / 60:.0f} min dense"
    blocks = "compiled" if result.compiled else "eager"
    linears = "bfloat16" if result.linears == "none" else "FP8 linears"
    how = f"{blocks}, {linears}, the fastest dense kernel where dense"
    needed = f"about {memory(round(found.weights))} of weights and {memory(round(found.activations))} beside them"
    return [
        ("Time", f"{time} (transformer alone, {how})"),
        ("Peak", f"{needed} (transformer alone, {blocks}, {linears}{_place(result)})"),
    ]


def _place(result: GenerationPlan) -> str:
    """Where weights are, which is what their share of the peak depends on."""
    if result.offload != "none":
        return f", offload {result.offload}"
    return ", both experts on the GPU" if result.source.spec.experts > 1 else ""


def _state(result: GenerationPlan) -> list[tuple[str, str]]:
    """Rows on what a method keeps between steps, where it keeps something."""
    if not result.kept_bytes:
        return []
    one = sum(result.state_bytes.values())
    layers = result.kept_bytes // (one * result.forwards)
    parts = ", ".join(f"{kind} {memory(size * layers)}" for kind, size in result.state_bytes.items())
    branch = "a branch" if result.branches == 1 else f"each of {result.branches} branches"
    branch += "" if result.windows == 1 else f" and {result.windows} windows"
    kept = f"{memory(result.kept_bytes)} between steps: {parts} for {branch} of {layers} layers"
    lse = result.method.get("lse_dtype")
    during = f"{memory(result.sums_bytes)} more while a layer searches"
    return [("State", f"{kept} (lse in {lse})" if lse else kept), ("", during)]


def _steps(result: GenerationPlan) -> str:
    """Dense steps, those included that search outside the schedule."""
    more = result.searching_steps
    dense = min(result.steps, sum(result.schedule.dense_steps(result.steps)) + more)
    return f"{dense} of {result.steps} steps" + (f" ({more} of them beside the schedule, to search)" if more else "")


def _layers(result: GenerationPlan) -> str:
    layers = result.source.spec.layers
    return f"{result.schedule.first_layers + result.schedule.last_layers} of {layers}"
