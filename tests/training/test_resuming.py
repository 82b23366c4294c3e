"""Going on from a checkpoint: what the log keeps, and what is no run to go on with."""

import errno
import json
import shutil
import signal
from types import SimpleNamespace

import lora_runs
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from videosparse.training import checkpoint
from videosparse.training.clips import Size
from videosparse.training.config import ConfigError
from videosparse.training.dataset import write_shard
from videosparse.training.run import LoraRun
from videosparse.training.validation import Validation

LOSS = '{"step": %d, "loss": 1.0}\n'


def saved(run, count=1):
    """A run after some steps, with a checkpoint."""
    for _ in range(count):
        run.train_step()
    run.save()
    return run


def logged(folder, key="loss"):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if key in line]


def test_a_log_that_a_full_disk_cut_short_is_mended(lora_run):
    run = saved(lora_run(), 2)
    torn = "".join(LOSS % n for n in (0, 1, 2, 3)) + 'no line\n[2]\n{"step": 2, "lo'
    (run.folder / "log.jsonl").write_text(torn)
    again = lora_run()
    assert again.resume() == 2
    again.cut_log()
    again.log({"loss": 1.0})
    assert logged(run.folder) == [0, 1, 2, 2]


def test_the_log_of_a_run_that_begins_again_is_empty(lora_run):
    run = lora_run()
    run.cut_log()
    run.folder.mkdir()
    (run.folder / "log.jsonl").write_text("".join(LOSS % n for n in (0, 1, 2)))
    assert run.resume() == 0
    run.cut_log()
    run.log({"loss": float("nan")})
    assert (run.folder / "log.jsonl").read_text() == '{"step": 0, "loss": null}\n', "JSON knows no NaN"


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(lora_run, monkeypatch):
    run = saved(lora_run())
    run.train_step()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_too(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/checkpoints/step-000002'"):
            run.save()
    with monkeypatch.context() as patch:
        patch.setattr("diffusers.WanPipeline.save_lora_weights", full_too)
        with pytest.raises(OSError, match=r"No space left on device .os error 28.: '.*/step-000002'"):
            run.save()
        with pytest.raises(OSError, match=r"No space left .*/run/pytorch_lora_weights.safetensors'"):
            run.export()
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-000001"]
    assert [path.name for path in run.folder.iterdir()] == ["checkpoints"]
    assert lora_run().resume() == 1


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("videosparse.training.validation.write_mp4", full)
    validation = object.__new__(Validation)
    validation.run = SimpleNamespace(folder=tmp_path, fps=16)
    with pytest.raises(OSError, match=r"No space left on device: '.*/videos/name.mp4'"):
        validation._write("name", torch.zeros(1, 3, 16, 16))
    assert not list((tmp_path / "videos").iterdir())


def test_incomplete_checkpoints_are_damaged(lora_run):
    run = saved(lora_run(train={"ema": 0.9}))
    (path,) = checkpoint.checkpoints(run.folder)

    def refused(message):
        with pytest.raises(ConfigError, match=rf"step-000001 is damaged .{message}.; delete it to go on"):
            checkpoint.read_checkpoint(path)

    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.EMA):
        file, tensors = path / name, load_file(path / name)
        file.rename(path / "aside")
        refused(f"{name} is missing")
        if name != checkpoint.WEIGHTS:
            save_file({"other": torch.zeros(1)}, file)
            refused(f"{name} (has other, which )?is not of .* in trained.safetensors")
        if name == checkpoint.OPTIMIZER:
            save_file({key: torch.zeros(1) for key in tensors}, file)
            refused(f"{name} has .*:exp_avg(_sq)?, which is not of a parameter in trained.safetensors")
        (path / "aside").replace(file)
    checkpoint.read_checkpoint(path)
    for text, message in (
        ("{}", "state.json has no step"),
        ("[]", "state.json has no step"),
        ('{"step": 1}', ".*config"),
    ):
        (path / "state.json").write_text(text)
        refused(message)


def test_a_run_that_has_done_no_step_has_no_optimizer_to_bring_back(lora_run):
    lora_run().save()
    assert lora_run().resume() == 0


def test_other_clips_are_another_run(lora_run, wan_folder, wan_data, tmp_path):
    data = shutil.copytree(wan_data, tmp_path / "data")
    run = saved(lora_run(data=data))
    assert lora_run(data=data).resume() == 1
    (path,) = checkpoint.checkpoints(run.folder)
    more = lora_runs.random_data(tmp_path / "more", wan_folder, clips=9)

    def refused(others):
        message = rf"/data has other clips than it had in .*step-000001, so that others would be {others}; give it back"
        with pytest.raises(ConfigError, match=message):
            lora_run(data=data).resume()

    (taken,) = data.glob("33x*.safetensors")
    shutil.copy(next(more.glob("33x*.safetensors")), data)
    refused("trained")
    taken.unlink()
    write_shard(data, Size(33, 32, 32), [("0", "the first", "", torch.zeros(16, 9, 4, 4), {})], torch.float32)
    refused("held out")
    state = json.loads((path / "state.json").read_text())
    del state["clips"]  # as before they were kept
    (path / "state.json").write_text(json.dumps(state))
    assert lora_run(data=data).resume() == 1


def test_a_checkpoint_beyond_the_last_step_is_refused(lora_run):
    saved(lora_run(), 2)
    assert lora_run(train={"steps": 2}).resume() == 2
    with pytest.raises(ConfigError, match=r"step-000002 has 2 steps behind it, and train.steps is 1; raise it"):
        lora_run(train={"steps": 1}).resume()


def test_what_was_due_at_a_stop_is_done_on_going_on(program, wan_folder, wan_data, tmp_path, monkeypatch):
    def config(steps):
        train, validate = {"frames": [17], "steps": steps}, {"every": 1, "quantiles": [0.5]}
        more = {"train": train, "validate": validate, "output": {"save_every": 1}, "data_": {"holdout": 1}}
        return lora_runs.make_config(wan_folder, wan_data, tmp_path / "run", **more)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(LOSS % 1)  # of a run that was killed before its first checkpoint
    program.module.stopped_by = signal.SIGTERM
    assert program(config(3)) == 143
    program.module.stopped_by = None

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LoraRun, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):  # in the step after what was due
            program(config(3), resume=True)
    for steps in (3, 3, 4, 4):  # a run that has ended measures its last step again
        assert program(config(steps), resume=True) == 0
    assert logged(tmp_path / "run", "held_out/17/0.5") == [0, 1, 2, 3, 4]
    assert logged(tmp_path / "run") == [1, 2, 3, 4]
