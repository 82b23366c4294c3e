"""Going on from a checkpoint: what the log keeps, and what is no run to go on with."""

import errno
import json

import pytest
from safetensors import SafetensorError

from videosparse.training import checkpoint

LOSS = '{"step": %d, "loss": 1.0}\n'


def saved(run, count=1):
    """A run after some steps, with a checkpoint."""
    for _ in range(count):
        run.train_step()
    run.save()
    return run


def logged(run):
    return [json.loads(line)["step"] for line in (run.folder / "log.jsonl").read_text().splitlines()]


def test_a_log_that_a_full_disk_cut_short_is_mended(lora_run):
    run = saved(lora_run(), 2)
    torn = "".join(LOSS % n for n in (0, 1, 2, 3)) + 'no line\n[2]\n{"step": 2, "lo'
    (run.folder / "log.jsonl").write_text(torn)
    again = lora_run()
    assert again.resume() == 2
    again.cut_log()
    again.log({"loss": 1.0})
    assert logged(run) == [0, 1, 2, 2]


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
