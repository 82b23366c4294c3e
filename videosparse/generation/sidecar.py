"""The JSON record next to a video: everything needed to make it again, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from videosparse.generation.environment import device_name, versions
from videosparse.generation.filing import RECORD_FORMAT
from videosparse.generation.request import Settings
from videosparse.generation.running import Run
from videosparse.generation.states import digest, file_state
from videosparse.metrics.fidelity import FidelityRow


def record(settings: Settings, run: Run, load_seconds: float | None) -> dict[str, Any]:
    """What made a video, as plain JSON values."""
    request, source = settings.request, settings.source
    return {
        "format": RECORD_FORMAT,
        "fingerprint": fingerprint(settings),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "model": {
            "name": source.name,
            "asked": request.model,
            "location": source.location,
            "pipeline": source.pipeline_class,
            "files": run.model_files,
        },
        "video": {
            "num_frames": settings.num_frames,
            "height": settings.height,
            "width": settings.width,
            "fps": settings.fps,
        },
        "settings": {
            "steps": settings.steps,
            "guidance": settings.guidance,
            "guidance_2": settings.guidance_2,
            "max_sequence_length": source.defaults.max_sequence_length,
            "dtype": settings.dtype,
            "device": str(settings.device),
            "device_name": device_name(settings.device),
            "offload": settings.stack.offload,
            "speed": request.speed,
            "linears": settings.stack.linears,
            "compile": settings.stack.compiled,
            "shift": run.shift,
            "rope": request.rope,
            "trained_frames": settings.trained_frames,
            "ultravico": _logit(settings),
            "windows": _windows(settings),
        },
        "loras": [{"file": str(lora.path), "scale": lora.scale} for lora in settings.loras],
        "method": {"name": run.method, "set": dict(run.given), "options": dict(run.options)},
        "attention": _attention(run),
        "step_cache": _step_cache(settings, run),
        "seconds": {"load": load_seconds, **_seconds(run)},
        "peak_memory_bytes": run.peak_bytes,
        "notices": list(run.notices),
        "versions": versions(),
    }


def fingerprint(settings: Settings) -> str:
    """A hash of all that decides a video, by which a batch knows what it has made already.

    The device is not part of it: another one rounds otherwise, and makes the same video. LoRAs and plans count by what
    their files are now: one that was trained again under the same name makes another video. So does a model, but its
    files stand by themselves (`Run.model_files`), since records of before have none.
    """
    request = settings.request
    options = dict(request.options.get(request.method, {}))
    plan = options.get("plan")
    cache = settings.stack.step_cache
    decides = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "location": settings.source.location,
        "video": [settings.num_frames, settings.height, settings.width, settings.fps],
        "steps": settings.steps,
        "guidance": [settings.guidance, settings.guidance_2],
        "shift": settings.shift,
        "rope": [request.rope, settings.trained_frames],
        **({} if settings.logit is None else {"ultravico": _logit(settings)}),
        **({} if settings.windows is None else {"windows": _windows(settings)}),
        "dtype": settings.dtype,
        "step_cache": None if cache is None else [cache.kind, cache.threshold, cache.magnitudes],
        "linears": settings.stack.linears,
        "method": [request.method, options],
        "loras": [[file_state(lora.path), lora.scale] for lora in settings.loras],
        "plan": file_state(plan) if isinstance(plan, str | Path) else None,
    }
    return digest(decides)


def _logit(settings: Settings) -> dict[str, Any] | None:
    return None if settings.logit is None else asdict(settings.logit)


def _windows(settings: Settings) -> dict[str, Any] | None:
    return None if settings.windows is None else asdict(settings.windows)


def comparison_record(
    dense: Run, backend: str, rows: Iterable[FidelityRow], speedup: float, measured: str
) -> dict[str, Any]:
    """The part of a record that is about the dense twin."""
    return {
        "layout": "dense left, method right",
        "dense_backend": backend,
        "dense_seconds": _seconds(dense),
        "dense_peak_memory_bytes": dense.peak_bytes,
        "denoise_speedup": speedup,
        "measured": measured,
        "fidelity": [row.as_json() for row in rows],
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a record, readable by people and by strict parsers (no NaN, no Infinity)."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _attention(run: Run) -> dict[str, Any]:
    report = run.report
    return {
        "grid": [report.grid.frames, report.grid.height, report.grid.width],
        "tokens": report.tokens,
        "video_density": report.video_density,
        "density": report.density,
        "average_density": report.average_density,
        "dense_calls": report.dense_calls,
        "sparse_calls": report.sparse_calls,
        "search_calls": report.search_calls,
        "backend": report.backend,
    }


def _step_cache(settings: Settings, run: Run) -> dict[str, Any] | None:
    cache = settings.stack.step_cache
    if cache is None or run.cache is None:
        return None
    return {
        "kind": cache.kind,
        "threshold": cache.threshold,
        "magnitudes": None if cache.file is None else str(cache.file),
        "forwards": run.cache.forwards,
        "skipped": run.cache.skipped,
    }


def _seconds(run: Run) -> dict[str, Any]:
    timings = run.timings
    return {
        "prompt": timings.prompt,
        "denoise": timings.denoise,
        "decode": timings.decode,
        "steps": list(timings.steps),
    }
