"""The programs under `lora/`, as they are called: data, training, stopping, going on, and a video from the result."""

import errno
import importlib.util
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = [
    "--set", "data.synthetic=4", "--set", "data.holdout=1", "--set", "data.height=32", "--set", "data.width=32",
    "--set", "train.frames=[9, 17]", "--set", "train.batch_size=1", "--set", "validate.quantiles=[0.5]",
    "--set", "validate.height=32", "--set", "validate.width=32", "--set", "validate.steps=1", "--device", "cpu",
    "--set", "output.log_every=1",
]  # fmt: skip


def program(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "lora" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(tmp_path, *more):
    places = ["--set", f"data.path={tmp_path / 'data'}", "--set", f"output.folder={tmp_path / 'out'}"]
    return [str(ROOT / "lora/recipes/tiny-2x.toml"), *TINY, *places, *more]


@pytest.mark.slow
def test_from_nothing_to_a_video(tmp_path, monkeypatch, capsys):
    train = program("train_length_extension")
    monkeypatch.chdir(ROOT)
    often = ["--set", "validate.every=2", "--set", "validate.video_every=2"]
    argv = ["train", *arguments(tmp_path, "--set", "train.steps=3", *often, "--format", "comfy")]
    monkeypatch.setattr(sys, "argv", argv)
    assert train.main() == 0
    said = capsys.readouterr().out
    assert "17 frames: held-out loss" in said
    assert [line.split(": ")[0] for line in said.splitlines() if line.endswith(" at 0.5") and "17 frames" in line] == [
        "before", "step 2", "after",
    ]  # fmt: skip
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} >= {"pytorch_lora_weights.safetensors", "comfy.safetensors", "log.jsonl"}
    assert sorted(p.name for p in (out / "videos").iterdir()) == [
        "before-after-0.mp4", "step-000000-0.mp4", "step-000002-0.mp4", "step-000003-0.mp4",
    ]  # fmt: skip
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    wanted = {"loss", "tokens_per_second", "tflops", "peak_gib", "seconds_left"}
    assert sum(wanted <= set(line) for line in steps) == 3
    assert train.main() == 2
    assert "has checkpoints; pass --resume" in capsys.readouterr().err

    from videosparse.generation import GenerationRequest, generate

    made = generate(
        GenerationRequest("a red circle rests", loras=(str(out),), height=32, width=32, steps=1, device="cpu")
    )
    assert made.frames.shape[0] == 17
    assert made.run.options["first_steps"] == 0.1


def test_an_interrupted_synthetic_data_set_is_finished(tmp_path, monkeypatch):
    from videosparse.training.config import load_config

    train, calls, checked = program("train_length_extension"), [], []
    monkeypatch.setattr(train, "check_clips", lambda folder, size, count: checked.append((str(size), count)))

    def prepare(clips, folder, *_, **__):
        calls.append(len(clips))
        (folder / "dataset.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", prepare)
    assignments = [a for a in arguments(tmp_path)[1:] if "=" in a]
    config = load_config(ROOT / "lora/recipes/tiny-2x.toml", assignments)
    with pytest.raises(KeyboardInterrupt):
        train.render_clips(config, "cpu")
    for _ in range(2):
        train.render_clips(config, "cpu")
    assert calls == [4, 4], "once more, and not again when it is whole"
    assert checked == [("17x32x32", 4)]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["dataset.json"]


@pytest.mark.parametrize(
    ("height", "has", "fits"),
    [
        (32, [(4, 17)], True),
        (32, [(4, 33)], True),
        (32, [(4, 9)], False),
        (32, [(5, 17)], False),
        (48, [(4, 17)], False),
    ],
)
def test_synthetic_clips_that_are_there_must_be_those_of_the_recipe(tmp_path, height, has, fits):
    import torch

    from videosparse.training.clips import Size
    from videosparse.training.dataset import write_shard

    for count, frames in has:
        clips = [(f"{n}", f"{n}", "", torch.zeros(1, 1, 1, 1), {}) for n in range(count)]
        write_shard(tmp_path, Size(frames, height, 32), clips, torch.float32)
    train = program("train_length_extension")
    if fits:
        train.check_clips(tmp_path, Size(17, 32, 32), 4)
        return
    (count, frames) = has[0]
    message = rf"asks for 4 .*17x32x32, and {tmp_path} has {count} of {frames}x{height}x32; choose another data.path"
    with pytest.raises(train.ConfigError, match=message):
        train.check_clips(tmp_path, Size(17, 32, 32), 4)


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    import torch

    from videosparse.training.run import LoraRun

    train, loss = program("train_length_extension"), LoraRun.loss
    calls = []

    def diverging(self, batch, dense):
        calls.append(self.done)
        return loss(self, batch, dense) * (torch.nan if self.done == 2 else 1.0)

    monkeypatch.setattr(LoraRun, "loss", diverging)
    monkeypatch.chdir(ROOT)
    more = ["--set", "train.steps=5", "--set", "validate.prompts=[]", "--set", "data.holdout=0"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tmp_path, *more)])
    assert train.main() == 2
    error = capsys.readouterr().err
    assert "Error: The loss is not finite at step 2" in error
    assert calls == [0, 1, 2]
    (saved,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert saved.name == "step-000002"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_signal_saves_and_its_number_is_the_exit_code(tmp_path, monkeypatch, capsys, number, code):
    from videosparse.training.run import LoraRun

    train, step = program("train_length_extension"), LoraRun.train_step
    monkeypatch.setattr(LoraRun, "train_step", lambda self: (signal.raise_signal(number), step(self))[1])
    monkeypatch.chdir(ROOT)
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    more = ["--set", "train.steps=5", "--set", "validate.prompts=[]", "--set", "data.holdout=0"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tmp_path, *more)])
    try:
        assert train.main() == code
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert "Stopped after step 1" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.slow
def test_sigterm_saves_and_resume_goes_on(tmp_path):
    command = [sys.executable, "lora/train_length_extension.py", *arguments(tmp_path, "--set", "train.steps=400")]
    command += ["--set", "validate.prompts=[]", "--set", "data.holdout=0", "--resume"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        noted = False
        for line in run.stdout:
            noted |= "has no checkpoint to resume; training starts at step 0" in line
            if line.startswith("step 2/"):
                run.send_signal(signal.SIGTERM)
                break
        said = run.stdout.read()
        assert run.wait(timeout=120) == 143, said
    finally:
        run.kill()
    assert noted
    assert "--resume goes on from there" in said
    (saved,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert (saved / "pytorch_lora_weights.safetensors").is_file()
    step = int(saved.name.removeprefix("step-"))
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--set", f"train.steps={step + 1}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"steps {step} to {step + 1}" in done.stdout
    assert time.monotonic() - began < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "train.lrr=1"], "Did you mean 'lr'?"),
        (["--set", "model.path=nowhere"], "No model folder at nowhere"),
        (["--set", f"output.folder={__file__}/out"], "is not a folder; choose another folder"),
        (["--set", "data.synthetic=1", "--set", "train.frames=[9, 18]"], "Error: train.frames must be 4k+1"),
        (["--set", "data.synthetic=1", "--set", "data.height=33"], "Error: data.height must be a multiple of 16"),
        (["--set", "data.synthetic=1", "--set", "data.fps=0.5"], "Error: data.fps must be 1 to 240"),
        (
            ["--set", "data.synthetic=1", "--set", f"data.path={__file__}/data"],
            "is not a folder; choose another folder",
        ),
    ],
)
def test_mistakes_end_with_one_line(change, message, tmp_path, monkeypatch, capsys):
    train = program("train_length_extension")
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tmp_path, "--set", "data.synthetic=0", *change)])
    assert train.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert message in error


def test_all_keys_are_listed(monkeypatch, capsys):
    train = program("train_length_extension")
    monkeypatch.setattr(sys, "argv", ["train", "--keys"])
    assert train.main() == 0
    assert "train.lr = 0.0001\n    highest learning rate" in capsys.readouterr().out


def test_preparing_refuses_a_bad_size(monkeypatch, capsys, tmp_path):
    prepare = program("prepare_dataset")
    argv = ["prepare", "--synthetic", "1", "--frames", "9", "--size", "64", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert prepare.main() == 2
    assert "--size must be HEIGHTxWIDTH" in capsys.readouterr().err


def test_preparing_nothing_is_an_error(monkeypatch, capsys, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "bad.txt").write_text("bad")
    argv = ["prepare", "--videos", str(tmp_path), "--frames", "9", "--size", "64x64", "--output", str(tmp_path / "d")]
    monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu"])
    monkeypatch.chdir(ROOT)
    assert program("prepare_dataset").main() == 1
    said = capsys.readouterr()
    assert "bad.mp4 cannot be decoded" in said.out
    assert said.err.count("\n") == 1, "no bars of what was loaded"
    assert said.err.startswith(f"Error: none of 1 clips could be used, and {tmp_path}/d has none to train on")


def test_checkpoints_of_before_are_found_before_anything_is_made(monkeypatch, capsys, tmp_path):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tmp_path)])
    assert program("train_length_extension").main() == 2
    assert "has checkpoints; pass --resume" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_preparing_needs_a_folder_that_can_be_written(monkeypatch, capsys):
    argv = ["prepare", "--synthetic", "1", "--frames", "9", "--size", "64x64", "--output", f"{__file__}/data"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT)
    assert program("prepare_dataset").main() == 2
    assert "is not a folder; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("train_length_extension", "--resume goes on from the newest checkpoint."),
        ("prepare_dataset", "call it again: it adds what is missing."),
    ],
)
def test_a_full_disk_is_one_line(name, advice, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "out/file")

    module = program(name)
    monkeypatch.setattr(module, {"prepare_dataset": "prepare"}.get(name, "train"), full)
    argv = ["--synthetic", "1", "--frames", "9", "--size", "64x64", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [name, *(argv if name == "prepare_dataset" else arguments(tmp_path))])
    assert module.main() == 2
    said = f"Error: [Errno {errno.ENOSPC}] No space left on device: 'out/file'; once that is mended, {advice}\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("time", ["first", "again"])
def test_libraries_that_a_test_hushed_are_heard_in_the_next(time):
    from videosparse.program import quiet_loading

    import diffusers
    import transformers

    for library in (diffusers, transformers):
        assert library.utils.logging.get_verbosity() <= logging.WARNING
        assert library.utils.logging.is_progress_bar_enabled()
    quiet_loading()
