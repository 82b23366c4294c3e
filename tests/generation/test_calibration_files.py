"""What lies beside a plan while it is made: statistics that are refused, the lock, and folders that go again."""

import dataclasses
import json
import os
import subprocess
import sys

import folders
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from videosparse.generation import GenerationError
from videosparse.generation.calibrating import CalibrationRequest, calibrate
from videosparse.generation.claiming import claimed
from videosparse.generation.looking import Watch
from videosparse.generation.partial import Partial
from videosparse.generation.running import load_pipeline
from videosparse.policies.paro_plan import PAROPlan
from videosparse.policies.plan_metadata import checksum, parsed, sealed

METADATA = "videosparse_calibration"


def request_of(folder, **fields):
    small = {
        "prompts": ("a red circle",), "model": str(folder), "num_frames": 9, "height": 64, "width": 64, "steps": 4,
        "buckets": 2, "density": 0.4, "block": (64, 64), "device": "cpu", "dtype": "fp32",
    }  # fmt: skip
    return CalibrationRequest(**{**small, **fields})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.save_wan(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(request_of(folder).resolve().runs[0])[0]


@pytest.fixture(scope="module")
def begun(folder, pipe, tmp_path_factory):
    """The file of a calibration that was interrupted after its first map."""
    path, replay, done = tmp_path_factory.mktemp("begun") / "plan.safetensors", Watch.replay, []

    def interrupted(self, *args):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return replay(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "replay", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(request_of(folder), path, pipe=pipe)
    return Partial.path(path).read_bytes()


@pytest.fixture
def path(begun, tmp_path):
    """Of a plan beside which the statistics lie."""
    path = tmp_path / "plan.safetensors"
    Partial.path(path).write_bytes(begun)
    return path


def rewrite(path, about=None, tensors=None, seal=True):
    """Change statistics: their metadata, their tensors, and both checksums unless told otherwise."""
    with safe_open(path, "pt") as file:
        words = parsed(file.metadata()[METADATA])
    kept = load_file(path)
    (tensors or (lambda kept: None))(kept)
    (about or (lambda words: None))(words)
    if seal:
        words.pop("metadata_checksum")
        words["checksum"] = checksum(kept)
    save_file(kept, path, {METADATA: sealed(words) if seal else json.dumps(words)})


def test_what_was_begun_goes_on(path, folder, pipe):
    assert calibrate(request_of(folder), path, pipe=pipe).resumed
    assert os.listdir(path.parent) == ["plan.safetensors"]


@pytest.mark.parametrize(
    ("part", "name"), [("transformer", "blocks.1.attn1.to_q.weight"), ("text_encoder", "shared.weight")]
)
def test_other_weights_of_the_same_configuration_are_refused(path, folder, pipe, part, name):
    weight = getattr(pipe, part).get_parameter(name)
    with torch.no_grad():
        before = weight.clone()
        weight.mul_(1.5)
    message = (
        rf"partial is of an interrupted calibration with another set of {part} weights \([0-9a-f]{{12}}… there, "
        r"[0-9a-f]{12}… now\); delete it, or pass --overwrite to begin anew\."
    )
    try:
        with pytest.raises(GenerationError, match=message):
            calibrate(request_of(folder), path, pipe=pipe)
        assert not calibrate(request_of(folder), path, pipe=pipe, overwrite=True).resumed
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow_shift": 5.0}, r"with another shift \(3.0 there, 5.0 now\)"),
        ({"solver_order": 1}, r"with another scheduler \(UniPCMultistepScheduler \w{16} there, UniPC\w+ \w{16} now\)"),
    ],
)
def test_another_scheduler_is_refused(path, folder, pipe, change, message):
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config, **change)
    try:
        with pytest.raises(GenerationError, match=message):
            calibrate(request_of(folder), path, pipe=pipe)
    finally:
        pipe.scheduler = scheduler


def test_a_shift_that_is_the_models_own_goes_on(path, folder, pipe):
    assert calibrate(request_of(folder, shift=3.0), path, pipe=pipe).resumed


def test_offloaded_weights_are_the_same(path, folder):
    run = request_of(folder).resolve().runs[0]
    offloaded, _ = load_pipeline(dataclasses.replace(run, stack=dataclasses.replace(run.stack, offload="group")))
    assert calibrate(request_of(folder), path, pipe=offloaded).resumed


def put(*place):
    """A change of metadata: the last of `place` is set at the keys before it."""
    *keys, last, value = place

    def change(words):
        for key in keys:
            words = words[key]
        words[last] = value

    return change


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (put("asked", None), "it does not say of what it is"),
        (put("asked", [1]), "it does not say of what it is"),
        (put("calls_seen", [0]), "calls_seen does not count its calls"),
        (put("calls_seen", None), "calls_seen does not count its calls"),
        (put("calls_seen", 6), "calls_seen does not count its calls"),
        (put("calls", None), "NoneType"),
        (put("calls", []), "its prompts are others"),
        (put("calls", [[], []]), "its prompts are others"),
        (put("calls", [[]]), "calls_seen does not count its calls"),
        (put("calls", [[1]]), ""),
        (put("calls", 0, 0, "bucket", "x"), "its calls are others"),
        (put("calls", 0, 0, "bucket", 9), "its calls are others"),
        (put("calls", 0, 0, "expert", 1), "its calls are others"),
        (put("calls", 0, 0, "inputs", None), "NoneType"),
        (put("calls", 0, 0, "inputs", "timestep", {"tensor": "none"}), "none"),
        (put("figures", None), "NoneType"),
        (put("figures", ["sparse"]), "its figures must be sparse, uneven"),
        (put("figures", [["sparse"], "uneven"]), ""),
        (put("maps", "x"), ""),
        (put("maps", 9), "counts 1"),
        (put("maps", None), ""),
        (put("recall", None), "its recall is not a share for each map"),
        (put("recall", ["x"]), "its recall is not a share for each map"),
        (put("recall", []), "its recall is not a share for each map"),
        (put("text", "x"), "its prompts are others"),
        (put("format", [1]), "this version reads videosparse-calibration-4"),
        (put("format", "videosparse-calibration-3"), "its format is videosparse-calibration-3, this version reads"),
    ],
)
def test_statistics_of_another_form_are_damaged(path, folder, pipe, about, message):
    rewrite(Partial.path(path), about)
    damaged = rf"partial is damaged \(.*{message}.*\); delete it, or pass --overwrite to begin anew\."
    with pytest.raises(GenerationError, match=damaged) as error:
        calibrate(request_of(folder), path, pipe=pipe)
    assert "\n" not in str(error.value)
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("figure sparse", lambda x: x.fill_(float("nan")), "figure sparse is not finite"),
        ("figure uneven", lambda x: x[:1], r"figure uneven must be torch.float64 \[2, 2, 6\], got torch.float64 \[1, "),
        ("figure uneven", torch.Tensor.float, "figure uneven must be torch.float64"),
        ("counts 0", lambda x: x + 1, "map 0 keeps other numbers of blocks than its counts"),
        ("counts 0", lambda x: x * 0, "map 0 keeps other numbers of blocks than its counts"),
        ("bits 0", lambda x: x[..., :1, :], r"bits 0 must be torch.uint8 \[2, 2, 3, 1\]"),
    ],
)
def test_statistics_that_no_calibration_has_are_damaged(path, folder, pipe, name, change, message):
    rewrite(Partial.path(path), tensors=lambda kept: kept.update({name: change(kept[name]).contiguous()}))
    with pytest.raises(GenerationError, match=rf"partial is damaged \({message}"):
        calibrate(request_of(folder), path, pipe=pipe)


def test_any_other_byte_is_noticed(path, folder, pipe):
    partial, whole = Partial.path(path), Partial.path(path).read_bytes()
    rewrite(partial, put("asked", "seed", 1), seal=False)
    with pytest.raises(GenerationError, match=r"partial is damaged \(its metadata does not match its checksum\)"):
        calibrate(request_of(folder, seed=1), path, pipe=pipe)
    partial.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(GenerationError, match=r"partial is damaged \(its contents do not match their checksum\)"):
        calibrate(request_of(folder), path, pipe=pipe)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_its_place_is_told_first(folder, tmp_path, overwrite):
    (tmp_path / "plan.safetensors.partial").mkdir()
    with pytest.raises(GenerationError, match=r"Cannot write to .*partial: it is a folder; choose another name\."):
        calibrate(request_of(folder), tmp_path / "plan.safetensors", overwrite=overwrite)


def test_one_process_at_a_time_makes_a_plan(folder, pipe, tmp_path):
    path = tmp_path / "plan.safetensors"
    with claimed(path):
        for overwrite in (False, True):
            with pytest.raises(GenerationError, match=r"Another process is making .*plan\.safetensors just now; wait"):
                calibrate(request_of(folder), path, pipe=pipe, overwrite=overwrite)
        with claimed(tmp_path / "other.safetensors"):
            pass
        assert os.listdir(tmp_path) == [".plan.safetensors.lock"]
    assert os.listdir(tmp_path) == []
    with claimed(path):
        pass


def test_a_killed_process_keeps_nobody_away(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from videosparse.generation.claiming import claimed\n"
        "with claimed(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "plan.safetensors"
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -9
    assert os.listdir(tmp_path) == [".plan.safetensors.lock"]
    with claimed(path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_system_without_such_locks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with claimed(tmp_path / "plan.safetensors"), claimed(tmp_path / "plan.safetensors"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_plan_that_appears_meanwhile_is_kept(path, folder, pipe, monkeypatch):
    save = PAROPlan.save

    def late(self, place, overwrite):
        path.write_text("theirs")
        save(self, place, overwrite)

    monkeypatch.setattr(PAROPlan, "save", late)
    with pytest.raises(GenerationError) as error:
        calibrate(request_of(folder), path, pipe=pipe)
    assert str(error.value) == (
        f"{path} was written by something else meanwhile; give the same command with --overwrite, or move it away "
        f"first: all of this calibration is in {path}.partial."
    )
    assert path.read_text() == "theirs"
    monkeypatch.setattr(PAROPlan, "save", save)
    monkeypatch.setattr(Watch, "run", None)  # nothing is done again
    monkeypatch.setattr(Watch, "replay", None)
    assert calibrate(request_of(folder), path, pipe=pipe, overwrite=True).resumed
    PAROPlan.load(path)


def test_a_calibration_that_fails_leaves_no_folders(folder, pipe, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(request_of(folder), tmp_path / "new" / "sub" / "plan.safetensors", pipe=pipe)
    assert os.listdir(tmp_path) == []
