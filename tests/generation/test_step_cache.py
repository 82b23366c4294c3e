"""Step caches in requests: what a user writes, the file of magnitudes, and what is told."""

import json

import pytest
import torch

from videosparse.cases import MODELS
from videosparse.generation import GenerationError, compare, generate
from videosparse.generation.generating import check_comparable
from videosparse.generation.presets import PRESETS, SPEEDS
from videosparse.generation.runfile import merge, preset_values, request_from
from videosparse.generation.sidecar import fingerprint, record
from videosparse.generation.sources import find_spec
from videosparse.generation.step_cache import (
    THRESHOLDS,
    StepCache,
    parse_step_cache,
    read_magnitudes,
    step_cached,
    write_magnitudes,
)


def test_what_a_user_writes():
    assert parse_step_cache("none") is None
    assert parse_step_cache("first-block") == StepCache("first-block", 0.05)
    assert parse_step_cache(" magcache = 0.1 ") == StepCache("magcache", 0.1)
    assert parse_step_cache("first-block=0") == StepCache("first-block", 0.0)


def test_thresholds_are_those_of_diffusers():
    from diffusers import FirstBlockCacheConfig, MagCacheConfig

    assert FirstBlockCacheConfig().threshold == THRESHOLDS["first-block"]
    assert MagCacheConfig(calibrate=True).threshold == THRESHOLDS["magcache"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "first_block",
            r"Unknown step cache 'first_block'; use none, first-block or magcache\. Did you mean 'first-b",
        ),
        (
            "first-block=x",
            r"threshold of first-block must be a number of 0 or more, .*first-block=0\.05 \(got 'x'\)",
        ),
        ("magcache=-1", r"got '-1'"),
        ("magcache=nan", r"got 'nan'"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(GenerationError, match=message):
        parse_step_cache(text)


def test_a_run_with_a_step_cache(ask):
    settings = ask(steps=5, step_cache="first-block=1000").resolve()
    made = generate(settings)
    assert (made.run.cache.forwards, made.run.cache.skipped) == (10, 8)
    data = record(settings, made.run, None)
    assert data["step_cache"] == {
        "kind": "first-block", "threshold": 1000.0, "magnitudes": None, "forwards": 10, "skipped": 8,
    }  # fmt: skip
    plain = generate(ask(steps=5))
    assert plain.run.cache is None
    assert record(plain.settings, plain.run, None)["step_cache"] is None
    assert not torch.equal(made.frames, plain.frames)
    assert torch.equal(generate(ask(steps=5, step_cache="first-block=0")).frames, plain.frames)
    assert fingerprint(settings) != fingerprint(plain.settings)


def test_magnitudes_are_measured_once(ask, tmp_path):
    """The run that measures is whole; the next skips by what it found, also with other steps."""
    path = tmp_path / "folder" / "magnitudes.json"
    asked = {"steps": 5, "magnitudes": str(path)}
    measuring = generate(ask(step_cache="magcache", **asked))
    assert torch.equal(measuring.frames, generate(ask(steps=5)).frames)
    assert measuring.run.cache.skipped == 0
    assert measuring.run.notices == (f"No step was skipped: this run measured magnitudes for later ones into {path}.",)
    found = json.loads(path.read_text())
    assert len(found["magnitudes"]) == 5
    assert found["magnitudes"][0] == 1
    skipping = generate(ask(step_cache="magcache=1000", **asked))
    # a fifth of the steps is kept, and no more than three in a row are skipped
    assert skipping.run.cache.skipped == 2 * 3
    assert not skipping.run.notices
    assert generate(ask(step_cache="magcache=1000", **{**asked, "steps": 8})).run.cache.skipped > 0


def test_magnitudes_are_measured_by_one_video(ask, tmp_path):
    """Not while others are made or compared, which would be whole, too."""
    from videosparse.generation.batch import plan_batch

    asked = ask(step_cache="magcache", magnitudes=str(tmp_path / "m.json"))
    with pytest.raises(GenerationError, match=r"m\.json is not there yet: make one video first, by the same options"):
        compare(asked)
    with pytest.raises(GenerationError, match=r"Prompt 1 of 1: .*m\.json is not there yet: make one video"):
        plan_batch([asked], tmp_path)


def test_files_of_magnitudes_that_do_not_fit(tmp_path):
    path = tmp_path / "m.json"
    write_magnitudes(path, MODELS["wan2.1-14b"], (1.0, 1.1))
    assert read_magnitudes(path, MODELS["wan2.1-14b"]) == (1.0, 1.1)
    with pytest.raises(GenerationError, match=r"another model \(wan, 40 layers, 40 heads; here wan, 30 layers, 12"):
        read_magnitudes(path, MODELS["wan2.1-1.3b"])
    for text in ("{", "[]", '{"format": "other"}', path.read_text().replace("1.1", "-1.1")):
        path.write_text(text)
        with pytest.raises(GenerationError, match="delete it to measure anew"):
            read_magnitudes(path, MODELS["wan2.1-14b"])
    with pytest.raises(GenerationError, match="Cannot write magnitudes"):
        write_magnitudes(path / "below", MODELS["wan2.1-14b"], (1.0,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_cache": "magcache"}, r"needs the magnitudes of this model: add --magnitudes FILE"),
        ({"magnitudes": "x.json"}, "--magnitudes is for --step-cache magcache"),
        ({"linears": "fp8"}, "linears=fp8 cannot run: "),
        ({"linears": "int4"}, "Unknown linears 'int4'"),
        ({"offload": "group"}, "frees GPU memory, and this run is on cpu"),
        ({"offload": "groups"}, r"use none, model or group\. Did you mean 'group'"),
        ({"speed": "quick"}, "Unknown speed 'quick'; use exact, balanced, fast"),
        ({"speed": "exact"}, r"--preset exact runs dense attention \(got --method radial\)"),
        (
            {"method": "adaspa", "options": {"adaspa": {"offload_state": True}}, "compile": True},
            "adaspa.offload_state and --compile do not go together: .*lse_dtype=bfloat16",
        ),
    ],
)
def test_requests_that_are_refused(ask, fields, message):
    with pytest.raises(GenerationError, match=message):
        ask(**fields).resolve()


@pytest.mark.parametrize("speed", SPEEDS)
def test_what_a_speed_leaves_out_on_a_cpu(ask, speed):
    """Told in one line, and what was asked for wins."""
    method = SPEEDS[speed].values.get("method", "radial")
    settings = ask(speed=speed, method=method).resolve()
    (notice,) = settings.notices
    assert notice.startswith(f"Preset {speed} leaves out here: ")
    assert "--compile (it is for GPUs, and this run is on cpu)" in notice
    assert not settings.stack.compiled
    assert settings.stack.linears == "none"
    if speed == "fast":
        assert "quant=int8 (plain torch computes it on cpu, no faster)" in notice
        assert "--linears fp8 (" in notice
        assert settings.stack.step_cache == StepCache("first-block", 0.05)
    else:
        assert settings.stack.step_cache is None
    asked = ask(speed=speed, method=method, compile=False, step_cache="none", linears="none").resolve()
    assert asked.stack.step_cache is None
    assert "compile" not in "".join(asked.notices)


def test_what_a_speed_takes_on_a_gpu(ask, monkeypatch):
    from videosparse.generation import request, stack

    monkeypatch.setattr(request, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(request, "choose_dtype", lambda name, device: "bf16")
    monkeypatch.setattr(request, "check_method_fits", lambda *_: None)
    monkeypatch.setattr(stack, "unavailable", lambda device, dtype: None)
    monkeypatch.setattr(stack.int8_path, "unavailable", lambda *_: None)
    settings = ask(speed="fast", options={"radial": {"decay": 0.5}}).resolve()
    assert settings.request.options == {"radial": {"quant": "int8", "decay": 0.5}}
    assert (settings.stack.linears, settings.stack.compiled, settings.notices) == ("fp8", True, ())
    kept = ask(speed="fast", compile=False, options={"radial": {"quant": "int8-fp8"}}, offload="group").resolve()
    assert kept.request.options == {"radial": {"quant": "int8-fp8"}}
    assert (kept.stack.offload, kept.stack.compiled) == ("group", False)
    exact = ask(speed="exact", method="dense").resolve()
    assert (exact.stack.compiled, exact.stack.linears, exact.stack.step_cache) == (True, "none", None)
    monkeypatch.setattr(stack, "unavailable", lambda device, dtype: "torchao is missing; install it, or drop it")
    (notice,) = ask(speed="fast").resolve().notices
    assert notice == "Preset fast leaves out here: --linears fp8 (torchao is missing; install it)."


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_of_a_model_goes_with_every_speed(preset, speed, monkeypatch):
    """On a GPU that can do all; what does not go with the model's preset is left out, and told."""
    request, stack, left_out = on_a_gpu(monkeypatch, {}, preset, speed)
    model = PRESETS[preset].values
    kept = request.options.get(request.method, {})
    assert ("quant" in kept) == (speed == "fast" and "ultravico" not in model)
    assert (stack.step_cache is not None) == (speed == "fast" and "context_frames" not in model)
    assert stack.compiled
    clash = {"ultravico", "context_frames"} & model.keys() if speed == "fast" else ()
    assert len(left_out) == bool(clash)
    if "ultravico" in clash:
        sign = "one looks at the sign of scores, which the other shifts and rounds"
        assert left_out == (f"Preset fast leaves out here: quant=int8 (with --ultravico: {sign}).",)


def test_what_a_speed_leaves_out_beside_what_was_asked_for(monkeypatch):
    """What was asked for twice over is refused all the same."""
    state = {"method": "adaspa", "adaspa": {"offload_state": True}}
    for speed in ("balanced", "fast"):
        _, stack, (notice,) = on_a_gpu(monkeypatch, state, speed)
        assert not stack.compiled
        assert notice.startswith(f"Preset {speed} leaves out here: --compile (with adaspa.offload_state: maps are ")
    with pytest.raises(GenerationError, match=r"adaspa.offload_state and --compile do not go together"):
        on_a_gpu(monkeypatch, {**state, "compile": True}, "fast")
    with pytest.raises(GenerationError, match=r"--step-cache first-block and --context-frames do not go together"):
        on_a_gpu(monkeypatch, {"context_frames": 81, "step_cache": "first-block"}, "fast")


def on_a_gpu(monkeypatch, values, *presets):
    """What a request by presets comes to on a GPU that can do all."""
    from videosparse.generation import stack

    monkeypatch.setattr(stack, "unavailable", lambda device, dtype: None)
    monkeypatch.setattr(stack.int8_path, "unavailable", lambda *_: None)
    merged = merge([preset_values(presets), {"prompt": "a cat", **values}])
    source = find_spec(merged.get("model", "wan2.1-14b"))
    request = request_from(merged)
    if request.num_frames is not None:
        grid = source.grid(request.num_frames, request.height or 128, request.width or 128)
        request, _ = request.with_usual_logits(source, grid, ())
    return stack.resolve_stack(request, source, torch.device("cuda"), torch.bfloat16)


def test_the_dense_twin_runs_every_step_whole(ask):
    result = compare(ask(steps=4, step_cache="first-block=1000"))
    assert result.sparse.cache.skipped == 6
    assert result.dense.cache is None
    check_comparable("radial")


def test_a_cache_of_ones_own_is_not_taken_away(ask):
    from diffusers import FirstBlockCacheConfig

    from videosparse.generation.running import load_pipeline

    settings = ask().resolve()
    pipe = load_pipeline(settings)[0]
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with (
        pytest.raises(GenerationError, match="has a cache already; call its disable_cache"),
        step_cached(pipe, StepCache("first-block", 0.1), 4),
    ):
        pass
    assert pipe.transformer.is_cache_enabled
