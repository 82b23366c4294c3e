"""Requests that run: results, files, times, densities, and what they leave behind."""

import json
import math
import re
import shutil
from dataclasses import replace

import folders
import pytest
import torch

from videosparse.generation import (
    GenerationError,
    GenerationRequest,
    compare,
    generate,
    generate_to,
    generating,
    output_place,
    running,
)
from videosparse.generation.errors import memory_errors
from videosparse.generation.running import load_pipeline, run_method
from videosparse.generation.video import DIVIDER, read_mp4


@pytest.fixture(scope="module")
def pipe(model_folder):
    request = GenerationRequest("x", str(model_folder), num_frames=9, height=64, width=64, device="cpu")
    return load_pipeline(request.resolve())[0]


def stock(pipe):
    return {type(block.attn1.processor).__name__ for block in pipe.transformer.blocks} == {"WanAttnProcessor"}


def test_generate_and_save(ask, tmp_path):
    result = generate(ask(fps=8, options={"radial": {"decay": 0.5, "first_steps": 1}}))
    assert list(result.frames.shape) == [9, 3, 64, 64]
    assert result.frames.dtype == torch.float32
    assert 0 <= float(result.frames.min()) <= float(result.frames.max()) <= 1
    paths = result.save(tmp_path / "a.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4"]
    assert len(read_mp4(paths[".mp4"])) == 9
    record = json.loads(paths[".json"].read_text())
    assert (record["prompt"], record["seed"], record["video"]["fps"]) == (folders.PROMPT, 0, 8)
    assert record["settings"]["steps"] == 2
    assert record["settings"]["shift"] == 3, "the scheduler's"
    assert record["settings"]["max_sequence_length"] == 48
    assert record["method"]["set"] == {"decay": 0.5, "first_steps": 1}
    assert record["method"]["options"]["block"] == [64, 64]
    attention = record["attention"]
    assert (attention["grid"], attention["tokens"], attention["backend"]) == ([3, 8, 8], 192, "torch")
    # 2 layers x 2 branches; the first step and the first layer are dense
    assert (attention["dense_calls"], attention["sparse_calls"]) == (6, 2)
    assert attention["average_density"] == pytest.approx((6 + 2 * attention["density"]) / 8)
    assert len(record["seconds"]["steps"]) == 2
    assert record["seconds"]["denoise"] == pytest.approx(sum(record["seconds"]["steps"]))
    assert all(record["seconds"][phase] > 0 for phase in ("load", "prompt", "denoise", "decode"))
    assert record["versions"]["torch"] == torch.__version__


def test_the_same_seed_gives_the_same_video(ask, pipe, tmp_path):
    first, second = (generate(ask(seed=3), pipe=pipe) for _ in range(2))
    assert torch.equal(first.frames, second.frames)
    files = [result.save(f"{tmp_path}/{i}.mp4")[".mp4"].read_bytes() for i, result in enumerate((first, second))]
    assert files[0] == files[1]
    assert not torch.equal(first.frames, generate(ask(seed=4), pipe=pipe).frames)


def test_a_full_map_is_dense_attention(ask, pipe):
    """Two latent frames are neighbours, which attend to each other fully."""
    dense = generate(ask(num_frames=5, method="dense"), pipe=pipe).run
    assert (dense.report.density, dense.report.sparse_calls, dense.options) == (1.0, 0, {})
    full = generate(ask(num_frames=5, options={"radial": {"first_steps": 0, "first_layers": 0}}), pipe=pipe).run
    assert (full.report.density, full.report.dense_calls, full.report.sparse_calls) == (1.0, 0, 8)
    torch.testing.assert_close(full.frames, dense.frames, atol=1e-4, rtol=0)


def test_the_pipeline_gets_its_attention_back(ask, pipe):
    hooks = len(pipe.transformer._forward_pre_hooks)
    generate(ask(), pipe=pipe)
    assert stock(pipe)
    settings = ask().resolve()
    with pytest.raises(GenerationError, match="majority"):
        run_method(pipe, settings, "radial", {"coverage": "majorities"})
    assert stock(pipe)
    assert len(pipe.transformer._forward_pre_hooks) == hooks


def test_an_interrupted_run_leaves_a_clean_pipeline(ask, pipe):
    def stop(phase, done, total):
        if (phase, done) == ("denoise", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(ask(), pipe=pipe, progress=stop)
    assert stock(pipe)
    generate(ask(), pipe=pipe)


def test_progress_tells_every_phase(ask):
    told = []
    generate(ask(), progress=lambda *event: told.append(event))
    assert told == [
        ("load", 0, 1), ("load", 1, 1), ("prompt", 0, 1), ("prompt", 1, 1), ("denoise", 1, 2),
        ("denoise", 2, 2), ("decode", 0, 1), ("decode", 1, 1),
    ]  # fmt: skip


def test_compare(ask, pipe, tmp_path):
    told = []
    result = compare(ask(num_frames=17), pipe=pipe, progress=lambda phase, *_: told.append(phase))
    assert {phase.split(" ")[0] for phase in told} == {"radial", "dense"}
    paths = result.save(tmp_path)
    stem = "a-red-circle-bounces-0-radial"
    assert {path.name for path in paths.values()} == {
        f"{stem}.mp4", f"{stem}-dense.mp4", f"{stem}-compare.mp4", f"{stem}.json",
    }  # fmt: skip
    assert list(read_mp4(paths["-compare.mp4"]).shape) == [17, 3, 64, 128 + DIVIDER]
    assert len(read_mp4(paths["-dense.mp4"])) == 17
    record = json.loads(paths[".json"].read_text())["comparison"]
    assert [row["metric"] for row in record["fidelity"]] == ["psnr", "ssim"]
    assert {row["convention"] for row in record["fidelity"]} == {"videosparse"}
    assert record["denoise_speedup"] == pytest.approx(result.speedup)
    assert "no warm-up" in record["measured"]
    assert result.dense.report.density == 1.0
    assert result.sparse.report.density < 1.0


def test_the_baseline_of_a_comparison_is_named(ask, pipe, tmp_path):
    result = compare(ask(), pipe=pipe)
    assert result.dense_backend == "native SDPA"
    record = json.loads(result.save(tmp_path / "a.mp4")[".json"].read_text())
    assert record["comparison"]["dense_backend"] == "native SDPA"


def test_a_comparison_that_gains_nothing_says_why(ask, pipe):
    result = compare(ask(num_frames=17), pipe=pipe)
    sparse, dense = result.sparse, result.dense
    slow, fast = (
        replace(result, dense=replace(dense, timings=replace(dense.timings, denoise=times * sparse.timings.denoise)))
        for times in (0.9, 2.0)
    )
    assert f"{sparse.report.density:.0%} of the blocks" in slow.explanation
    assert "Longer videos gain more" in slow.explanation
    assert fast.explanation == ""


@pytest.mark.parametrize("warm_up", [True, False, None])
def test_warm_up_uses_every_kernel_once_and_is_not_timed(ask, pipe, monkeypatch, warm_up):
    seen = []

    def run(pipe, settings, method, options, progress):
        seen.append((method, settings.steps, dict(options)))
        return run_method(pipe, settings, method, options, progress)

    monkeypatch.setattr("videosparse.generation.generating.run_method", run)
    told = []
    request = ask(steps=3, options={"radial": {"decay": 0.5, "first_steps": 1}})
    result = compare(request, pipe=pipe, warm_up=warm_up, progress=lambda phase, *_: told.append(phase))
    timed = [("radial", 3, {"decay": 0.5, "first_steps": 1}), ("dense", 3, {})]
    first = [("radial", 2, {"decay": 0.5, "first_steps": 0, "last_steps": 0}), ("dense", 2, {})]
    assert seen == (first if warm_up else []) + timed
    assert result.warmed_up == bool(warm_up)
    assert ("no warm-up" in result.measured) == (not warm_up)
    assert ("warm-up radial denoise" in told) == bool(warm_up)
    assert len(result.sparse.timings.steps) == 3


def test_compare_refuses_dense(ask):
    with pytest.raises(GenerationError, match="sets a sparse method against dense"):
        compare(ask(method="dense"))


def test_equal_videos_still_make_strict_json(ask, pipe, tmp_path):
    result = compare(ask(options={"radial": {"first_steps": 1.0}}), pipe=pipe)
    assert result.fidelity[0].value == math.inf
    json.loads(result.save(tmp_path / "a.mp4")[".json"].read_text(), parse_constant=pytest.fail)


def test_missing_weights_are_one_clear_error(ask, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(GenerationError, match=r"Cannot load.*download the model again"):
        generate(ask(model=str(folder)))


def test_a_file_that_lacks_a_weight_is_one_clear_error(ask, model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = next((folder / "transformer").glob("*.safetensors"))
    weights = load_file(path)
    del weights["proj_out.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(GenerationError, match="weights of its transformer are missing"):
        generate(ask(model=str(folder)))


def test_damaged_weights_are_one_clear_error(ask, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    next((folder / "vae").glob("*.safetensors")).write_bytes(b"\xff" * 100)
    with pytest.raises(GenerationError, match=r"Cannot load.*download the model again"):
        generate(ask(model=str(folder)))


def test_frames_that_are_not_finite_are_refused(ask, pipe, monkeypatch):
    monkeypatch.setattr(pipe.video_processor, "postprocess_video", lambda video, output_type: video * math.nan)
    with pytest.raises(GenerationError, match="not finite in fp32"):
        generate(ask(), pipe=pipe)


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_what_goes_wrong_inside_the_pipeline_is_no_error_of_the_request(ask, pipe, monkeypatch, error):
    def fail(*_, **__):
        raise error("a bug")

    monkeypatch.setattr(pipe.video_processor, "postprocess_video", fail)
    with pytest.raises(error, match="a bug") as caught:
        generate(ask(), pipe=pipe)
    assert not isinstance(caught.value, GenerationError)
    assert stock(pipe)


def test_what_sparsify_refuses_is_an_error_of_the_request(ask, pipe, monkeypatch):
    def refuse(*_):
        raise TypeError("blocks.0.attn1 has a FancyProcessor")

    monkeypatch.setattr(running, "sparsify", refuse)
    with pytest.raises(GenerationError, match="FancyProcessor"):
        generate(ask(), pipe=pipe)


def test_a_full_gpu_says_what_to_do():
    with pytest.raises(GenerationError, match=r"too little memory.*--offload model"), memory_errors():
        raise torch.OutOfMemoryError


def test_knobs_have_numbers(ask, pipe, monkeypatch):
    """Of the weights that did not fit: what each option would leave, and none that is set already."""
    from dataclasses import replace

    from videosparse.generation import memory
    from videosparse.generation.stack import Stack

    monkeypatch.setattr(memory, "_GIB", 2**10)
    monkeypatch.setattr(memory, "unavailable", lambda device, dtype: None)
    monkeypatch.setattr(memory, "suitable", lambda transformer: ["blocks.0.ffn.net.2"])
    settings = ask().resolve()
    parts = {
        name: sum(4 * weight.numel() for weight in part.parameters())
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    block = sum(4 * weight.numel() for weight in pipe.transformer.blocks[0].parameters())
    name, most = max(parts.items(), key=lambda part: part[1])
    with pytest.raises(GenerationError) as error, memory_errors(lambda: memory.knobs(pipe, settings)):
        raise torch.OutOfMemoryError
    assert (
        f"; try --offload model ({most / 1024:.1f} GiB of weights at a time, the {name}, instead of "
        f"{sum(parts.values()) / 1024:.1f} GiB), --linears fp8 (1.5 GiB less), --offload group (two blocks of "
        f"{block / 1024:.1f} GiB at a time), fewer frames or a smaller size (these are 192 tokens). videosparse plan"
    ) in str(error.value)
    most_saving = replace(settings, stack=Stack(None, "fp8", False, "group"))
    assert memory.knobs(pipe, most_saving) == "try fewer frames or a smaller size (these are 192 tokens)"


@pytest.mark.parametrize("when", ["a step", "frames"])
def test_an_interrupted_run_leaves_no_file(ask, pipe, tmp_path, monkeypatch, when):
    """Ctrl-C between steps, or once frames are being written: no part of a video, and stock attention."""
    place = output_place(ask(), tmp_path / "a.mp4")
    add, written = generating.Mp4Writer.add, []

    def interrupt(*_):
        raise KeyboardInterrupt

    def write_once(writer, frames):
        if written:
            interrupt()
        add(writer, frames)
        written.append(len(frames))

    if when == "frames":
        monkeypatch.setattr(generating.Mp4Writer, "add", write_once)
    progress = interrupt_at_step if when == "a step" else running.quiet
    with pytest.raises(KeyboardInterrupt):
        generate_to(place, ask(), pipe=pipe, progress=progress)
    assert not list(tmp_path.iterdir())
    assert stock(pipe)
    assert bool(written) == (when == "frames")


def interrupt_at_step(phase, done, total):
    if phase == "denoise":
        raise KeyboardInterrupt


def test_a_full_machine_says_what_to_do():
    with pytest.raises(GenerationError, match=r"too little memory.*fewer frames"), memory_errors():
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="other"), memory_errors():
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "  "}, "The prompt is empty"),
        ({"prompt": "\udcff"}, "The prompt is no valid UTF-8"),
        ({"negative_prompt": "\udcff"}, "The negative prompt is no valid UTF-8"),
        ({"method": "sparse"}, "Unknown method 'sparse'"),
        ({"steps": -1}, r"steps must be 1 to 1000 \(got -1\); the model's is 50"),
        ({"steps": 10**9}, "steps must be 1 to 1000"),
        ({"guidance": math.nan}, r"guidance must be 0 to 100 \(got nan\); the model's is 5"),
        ({"guidance": 1e30}, "guidance must be 0 to 100"),
        ({"fps": 0}, r"fps must be 1 to 240 \(got 0\)"),
        ({"fps": math.inf}, "fps must be 1 to 240"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"num_frames": 10}, "use 9 or 13"),
        ({"height": 60}, "use 48 or 64"),
        ({"dtype": "fp16"}, "fp16 is slow and inexact on a CPU"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"device": "gpu"}, "Unknown device 'gpu'"),
        ({"device": "meta"}, "Unsupported device 'meta'"),
        ({"offload": "disk"}, "Unknown offload 'disk'"),
        ({"offload": "model"}, "frees GPU memory, and this run is on cpu"),
        ({"options": {"dense": {}}}, "this run uses radial"),
        ({"options": {"radial": {"decay": 0}}}, "decay must be positive"),
        ({"options": {"radial": {"first_layers": 3}}}, "the model has 2"),
        ({"options": {"radial": {"backend": "triton"}}}, "backend=triton cannot run on cpu"),
    ],
)
def test_requests_that_cannot_be_carried_out(ask, fields, message):
    with pytest.raises(GenerationError, match=message):
        ask(**fields).resolve()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(ask):
    with pytest.raises(GenerationError, match=r"device cuda needs an NVIDIA GPU.*--device cpu"):
        ask(device="cuda").resolve()


def test_a_prompt_that_is_cut_is_noticed(ask, pipe, tmp_path):
    result = generate(ask(prompt="red circle " * 200, negative_prompt="x" * 60, steps=1), pipe=pipe)
    assert result.frames.shape[0] == 9
    prompt, negative = result.run.notices
    assert re.fullmatch(r"The prompt has \d+ tokens and the model reads 48: its end was cut off\.", prompt)
    assert negative.startswith("The negative prompt has")
    assert json.loads(result.save(tmp_path / "a.mp4")[".json"].read_text())["notices"] == [prompt, negative]


def test_a_prompt_that_just_fits_is_not_noticed(ask, pipe):
    def length(text):
        return len(pipe.tokenizer(text).input_ids)

    text = next("a" * n for n in range(1, 99) if length("a" * n) == 48)
    assert generate(ask(prompt=text, steps=1), pipe=pipe).run.notices == ()
    assert len(generate(ask(prompt=text + "a", steps=1), pipe=pipe).run.notices) == 1


def test_the_warm_up_of_a_search(ask, pipe, monkeypatch):
    """Two steps, a search and a refresh, whatever refresh was asked for."""
    seen = []

    def run(pipe, settings, method, options, progress):
        result = run_method(pipe, settings, method, options, progress)
        seen.append((method, settings.steps, result.report.dense_calls, result.report.sparse_calls))
        return result

    monkeypatch.setattr("videosparse.generation.generating.run_method", run)
    compare(ask(steps=8, method="adaspa", options={"adaspa": {"refresh": (0.3,)}}), pipe=pipe, warm_up=True)
    assert seen == [("adaspa", 2, 4, 4), ("dense", 2, 8, 0), ("adaspa", 8, 8, 24), ("dense", 8, 32, 0)]


def test_the_warm_up_has_no_step_cache(ask, pipe, monkeypatch):
    """It would skip the kernels that are to be warmed up."""
    seen = []

    def run(pipe, settings, method, options, progress):
        result = run_method(pipe, settings, method, options, progress)
        seen.append((settings.steps, method, None if result.cache is None else result.cache.skipped))
        return result

    monkeypatch.setattr("videosparse.generation.generating.run_method", run)
    compare(ask(steps=4, step_cache="first-block=1000"), pipe=pipe, warm_up=True)
    assert seen == [(2, "radial", None), (2, "dense", None), (4, "radial", 6), (4, "dense", None)]
