"""Videos straight into files, batches that go on, latents that are decoded later, shifts and long rotary embeddings."""

import json
import math
import os
import shutil

import folders
import pytest
import torch

from videosparse.generation import GenerationError, GenerationRequest, generate, generate_to, output_place
from videosparse.generation.batch import plan_batch, run_batch
from videosparse.generation.latents import decode_latents, load_latents, save_latents
from videosparse.generation.output import destination
from videosparse.generation.running import load_pipeline
from videosparse.generation.sidecar import fingerprint as fingerprint_of
from videosparse.generation.states import model_state
from videosparse.generation.video import read_mp4


@pytest.fixture(scope="module")
def pipe(model_folder):
    request = GenerationRequest("x", str(model_folder), num_frames=9, height=64, width=64, device="cpu")
    return load_pipeline(request.resolve())[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_streamed_video_is_the_file_of_a_whole_one(ask, pipe, tmp_path):
    whole = generate(ask(), pipe=pipe).save(tmp_path / "whole.mp4")
    made, paths = generate_to(output_place(ask(), tmp_path / "streamed.mp4"), ask(), pipe=pipe)
    assert paths[".mp4"].read_bytes() == whole[".mp4"].read_bytes()
    with pytest.raises(RuntimeError, match="not kept"):
        _ = made.frames
    one, two = (json.loads(p[".json"].read_text()) for p in (whole, paths))
    assert one["fingerprint"] == two["fingerprint"]
    assert names(tmp_path) == ["streamed.json", "streamed.mp4", "whole.json", "whole.mp4"]


def test_a_vae_that_cannot_stream_is_told(ask, pipe, tmp_path):
    pipe.vae.enable_tiling()
    try:
        made, paths = generate_to(output_place(ask(), tmp_path / "a.mp4"), ask(), pipe=pipe)
    finally:
        pipe.vae.disable_tiling()
    assert len(read_mp4(paths[".mp4"])) == 9
    assert "decoded before any was written: a tiled Wan VAE" in made.run.notices[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_video_leaves_nothing(ask, pipe, tmp_path, monkeypatch, error):
    from videosparse.generation.video import Mp4Writer

    add = Mp4Writer.add

    def interrupted(self, part):
        add(self, part)
        if self.frames > 1:
            raise error

    monkeypatch.setattr(Mp4Writer, "add", interrupted)
    with pytest.raises(error):
        generate_to(output_place(ask(), tmp_path / "a.mp4"), ask(), pipe=pipe)
    assert names(tmp_path) == []
    assert "decode" not in vars(pipe.vae)


def test_frames_that_are_not_finite_are_refused_while_they_stream(ask, pipe, tmp_path, monkeypatch):
    handle = pipe.vae.decoder.register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(GenerationError, match="not finite in fp32"):
        generate_to(output_place(ask(), tmp_path / "a.mp4"), ask(), pipe=pipe)
    handle.remove()
    assert names(tmp_path) == []


def test_latents_are_decoded_to_the_same_file(ask, pipe, tmp_path):
    request = ask(fps=8)
    place = output_place(request, tmp_path / "a.mp4", latents=True)
    _, paths = generate_to(place, request, pipe=pipe)
    assert sorted(paths) == [".json", ".mp4", ".safetensors"]
    latents = load_latents(paths[".safetensors"])
    assert list(latents.tensor.shape) == [1, 8, 3, 16, 16]
    assert latents.about["prompt"] == folders.PROMPT
    again = decode_latents(latents, destination(tmp_path / "b.mp4", "x", (".mp4",)), device="cpu")
    assert again[".mp4"].read_bytes() == paths[".mp4"].read_bytes()
    assert names(tmp_path) == ["a.json", "a.mp4", "a.safetensors", "b.mp4"]
    for stem in "ab":  # its own files stay, those of another run go
        record = {**latents.about, "fingerprint": latents.about["fingerprint"] if stem == "a" else "another"}
        (tmp_path / f"{stem}.json").write_text(json.dumps(record))
        decode_latents(latents, destination(tmp_path / f"{stem}.mp4", "x", (".mp4",), overwrite=True), device="cpu")
    assert names(tmp_path) == ["a.json", "a.mp4", "a.safetensors", "b.mp4"]


def test_latents_that_are_decoded_stay(ask, pipe, tmp_path):
    """Also where they do not tell of which run they are."""
    _, paths = generate_to(output_place(ask(), tmp_path / "a.mp4", latents=True), ask(), pipe=pipe)
    latents = load_latents(paths[".safetensors"])
    about = {key: value for key, value in latents.about.items() if key != "fingerprint"}
    save_latents(tmp_path / "b.safetensors", latents.tensor, about)
    (tmp_path / "b.mp4").touch()
    for stem in "ab":
        read = load_latents(tmp_path / f"{stem}.safetensors")
        decode_latents(read, destination(tmp_path / f"{stem}.mp4", "x", (".mp4",), overwrite=True), device="cpu")
    assert names(tmp_path) == ["a.json", "a.mp4", "a.safetensors", "b.mp4", "b.safetensors"]


def test_latents_of_something_else(tmp_path, ask, pipe):
    from safetensors.torch import save_file

    with pytest.raises(GenerationError, match="There are no latents at"):
        load_latents(tmp_path / "none.safetensors")
    save_file({"latents": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(GenerationError, match=r"holds no latents of videosparse \(none of ours\); use a file"):
        load_latents(tmp_path / "other.safetensors")
    _, paths = generate_to(output_place(ask(), tmp_path / "a.mp4", latents=True), ask(), pipe=pipe)
    latents = load_latents(paths[".safetensors"])
    with pytest.raises(GenerationError, match=r"fps must be 1 to 240 \(got nan\)"):
        decode_latents(latents, destination(tmp_path / "b.mp4", "x", (".mp4",)), device="cpu", fps=float("nan"))
    about = {**latents.about, "latents_format": "videosparse-latents-1"}
    for tensor, record in ((latents.tensor * math.nan, about), (latents.tensor, {**about, "model": {}})):
        save_latents(tmp_path / "damaged.safetensors", tensor, record)
        with pytest.raises(GenerationError, match="of another version, or damaged"):
            load_latents(tmp_path / "damaged.safetensors")
    narrow = type(latents)(latents.tensor[:, :4], latents.about)
    with pytest.raises(GenerationError, match="These latents have 4 channels, and the VAE of small takes 8"):
        decode_latents(narrow, destination(tmp_path / "b.mp4", "x", (".mp4",)), device="cpu")


def batch_of(ask, folder, **more):
    return plan_batch([ask(seed=seed, **more) for seed in range(3)], folder)


def test_a_killed_batch_goes_on(ask, tmp_path, monkeypatch):
    loads, told = [], []
    load = load_pipeline
    monkeypatch.setattr(
        "videosparse.generation.batch.load_pipeline", lambda *a: (loads.append(1), load(*a))[1]
    )  # fmt: skip

    def stop_after_one(number, made, paths):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(batch_of(ask, tmp_path / "out"), stop_after_one)
    first = (tmp_path / "out" / "001-a-red-circle-bounces-0-radial.mp4").stat().st_mtime_ns
    run_batch(batch_of(ask, tmp_path / "out"), lambda number, made, paths: told.append((number, made is None)))
    assert told == [(0, True), (1, False), (2, False)]
    assert loads == [1, 1]
    assert (tmp_path / "out" / "001-a-red-circle-bounces-0-radial.mp4").stat().st_mtime_ns == first
    assert len(names(tmp_path / "out")) == 6
    told.clear()
    run_batch(batch_of(ask, tmp_path / "out"), lambda number, made, paths: told.append(made is None))
    assert told == [True] * 3
    assert loads == [1, 1]  # nothing to do needs no model


def test_what_counts_as_made(ask, tmp_path):
    batch = batch_of(ask, tmp_path)
    run_batch(batch, lambda *_: None)
    assert len(batch.done()) == 3
    assert len(batch_of(ask, tmp_path, steps=3).done()) == 3  # other videos are there, not these
    video = next(tmp_path.glob("001*.mp4"))
    video.unlink()
    (tmp_path / "notes.json").write_text("no JSON")
    assert len(batch.done()) == 2
    assert plan_batch([ask()], tmp_path, latents=True).done() == {}
    for seed, fingerprint in ((1, fingerprint_of(ask(seed=1).resolve())), (2, "of another run")):
        path = next(tmp_path.glob(f"*-{seed}-radial.mp4")).with_suffix(".safetensors")
        save_latents(path, torch.zeros(1, 8, 3, 16, 16), {"fingerprint": fingerprint})
    assert len(plan_batch([ask()], tmp_path, latents=True).done()) == 1, "latents are the video's own"
    assert plan_batch([ask()], tmp_path, overwrite=True).done() == {}


def test_a_batch_of_a_model_that_has_changed_is_made_again(ask, model_folder, tmp_path):
    model, told = tmp_path / "model", []
    shutil.copytree(model_folder, model)

    def made():
        told.clear()
        run_batch(plan_batch([ask(model=str(model), steps=1)], tmp_path), lambda n, result, _: told.append(result))
        return told[0] is not None

    assert made()
    assert not made()
    weights = next((model / "transformer").glob("*.safetensors"))
    later = weights.stat().st_mtime_ns + 10**9
    os.utime(weights, ns=(later, later))
    assert made()
    assert not made()
    assert len(list(tmp_path.glob("*.mp4"))) == 2
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        del record["model"]["files"]
        path.write_text(json.dumps({**record, "settings": {**record["settings"], "shift": None}}))
    assert not made(), "records of before say nothing of the files, and no shift"
    assert model_state("org/name") is None


def test_a_model_that_changes_during_a_batch_is_not_taken_for_the_one_that_was_loaded(ask, model_folder, tmp_path):
    model, made = tmp_path / "model", []
    shutil.copytree(model_folder, model)
    weights = next((model / "transformer").glob("*.safetensors"))

    def batch():
        return plan_batch([ask(seed=seed, model=str(model), steps=1) for seed in range(2)], tmp_path / "out")

    def trained_again(number, result, paths):
        if number:
            return
        later = weights.stat().st_mtime_ns + 10**9
        os.utime(weights, ns=(later, later))

    run_batch(batch(), trained_again)
    run_batch(batch(), lambda number, result, paths: made.append(result is not None))
    assert made == [True, True], "both are of the old weights"
    made.clear()
    run_batch(batch(), lambda number, result, paths: made.append(result is not None))
    assert made == [False, False]


def test_a_batch_into_the_folder_of_its_model_goes_on(ask, model_folder, tmp_path, monkeypatch):
    model, made = tmp_path / "model", []
    shutil.copytree(model_folder, model)
    monkeypatch.chdir(model)
    for output in (".", "outputs"):
        for expected in (True, False):
            (model / "notes.json").write_text(str(expected))
            made.clear()
            run_batch(plan_batch([ask(model=".", steps=1)], output), lambda n, result, _: made.append(result))
            assert (made[0] is not None) == expected


def test_batches_that_cannot_be(ask, tmp_path):
    with pytest.raises(GenerationError, match="Prompt 2 of 2: num_frames must be"):
        plan_batch([ask(), ask(num_frames=10)], tmp_path)
    with pytest.raises(GenerationError, match=r"must be a folder for a prompt file.*use a/"):
        plan_batch([ask()], "a.mp4")


def test_shift_changes_the_schedule_and_is_undone(ask, pipe):
    scheduler = pipe.scheduler
    usual, same, other = (generate(ask(shift=shift), pipe=pipe).frames for shift in (None, 3.0, 9.0))
    assert torch.equal(usual, same)  # the folder's own is 3
    assert not torch.equal(usual, other)
    assert pipe.scheduler is scheduler


def test_rope_changes_long_videos_only(ask, pipe):
    def video(**more):
        return generate(ask(num_frames=17, method="dense", **more), pipe=pipe).frames

    usual = video()
    assert torch.equal(usual, video(rope="pi", trained_frames=17))
    assert not torch.equal(usual, video(rope="pi", trained_frames=9))
    assert not pipe.transformer.rope._forward_hooks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope": "yarn"}, "Unknown rope 'yarn'; use none, riflex, ntk or pi"),
        ({"trained_frames": 9}, "trained_frames is for --rope"),
        ({"rope": "pi", "trained_frames": 8}, r"trained_frames must be 4k\+1"),
        ({"shift": 0}, r"shift must be 0.01 to 100 \(got 0\)\."),
    ],
)
def test_requests_that_cannot_be_carried_out(ask, fields, message):
    with pytest.raises(GenerationError, match=message):
        ask(**fields).resolve()
