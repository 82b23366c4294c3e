"""The generation programs, each run once as a user runs it, on tiny pipelines that were saved to a folder."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from pipes import hunyuan, image, mochi, wan, wan22, wan_i2v

import pytest
import torch

from videosparse.generation.video import read_mp4

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.name for path in (ROOT / "pipelines").glob("*.py"))
TINY = ["--height", "32", "--width", "32", "--steps", "2", "--fps", "8"]
SMALL = ["--frames", "9", *TINY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


def command(name, *arguments):
    return [str(ROOT / "pipelines" / name), *(str(a) for a in arguments)]


def run(*parts, given=None):
    """What a program prints; it sees no GPU and has one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *parts], capture_output=True, text=True, timeout=300, env=environment, input=given
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "pipelines" / name), run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python pipelines/{name}" in text or f"pipelines/{name}" in text
    for option in ("--model", "--method", "--frames", "--steps", "--seed", "--output"):
        assert option in text


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ("multi_gpu.py", "wan_i2v.py")])
def test_mistakes_end_with_one_line(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", [name, "a cat", "--model", str(tmp_path / "nowhere")])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert re.fullmatch("Error: .*\n", mistake(name, capsys))


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_interrupt_is_one_line(name, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("videosparse.generation.video_place", interrupted)
    image = ["--image", "a.png"] if name == "wan_i2v.py" else []
    monkeypatch.setattr(sys, "argv", [name, "a cat", "--model", "none", *image])
    assert mistake(name, capsys, 130) == "Interrupted; no file is left half-written.\n"


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "wan_i2v.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "8"], "Error: --frames must be .k.1 for .* .got 8.; use "),
        (["--height", "33"], "Error: --height must be a multiple of"),
        (["--output", "taken.mp4"], "Error: taken.mp4 exists; choose another name, or pass --overwrite."),
        (["--output", "a.gif"], "Error: --output must end in .mp4"),
    ],
)
def test_sizes_and_names_are_checked_before_anything_is_loaded(
    name, arguments, message, monkeypatch, tmp_path, models, capsys
):
    family = name.split("_")[0]
    model = models[{"multi": "wan", "wan22": "wan"}.get(family, family)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.mp4").touch()
    monkeypatch.setattr(sys, "argv", [name, "a cat", "--model", str(model), *arguments])
    assert re.match(message, mistake(name, capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["taken.mp4"]


def mistake(name, capsys, code=2):
    """What a program writes to stderr that ends with a code: 2, as the command, where it refuses its arguments."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "pipelines" / name), run_name="__main__")
    assert ended.value.code == code
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def models(folder):
    """Folders that hold what is read before weights are, by family."""
    found = {}
    for name, build in {"wan": wan, "hunyuan": hunyuan, "mochi": mochi}.items():
        found[name] = folder / f"{name} without weights"
        build().save_pretrained(found[name])
        for weights in found[name].rglob("*.safetensors"):
            weights.unlink()
    return found


RUNS = {
    "wan_t2v.py": (wan, [*SMALL, "--method", "adaspa", "--rope", "pi"]),
    "wan22_t2v.py": (wan22, [*SMALL, "--steps", "4", "--method", "paro"]),
    "wan_i2v.py": (wan_i2v, ["--frames", "9", "--area", "32x32", "--steps", "2", "--fps", "8"]),
    "hunyuan_video_t2v.py": (hunyuan, SMALL),
    "mochi_t2v.py": (mochi, ["--frames", "7", *TINY]),
}

# One process runs them one after the other, as each would run alone: importing takes longer than all of them.
ALL = """
import json, runpy, sys, traceback
for name, arguments in json.load(sys.stdin):
    sys.argv = [name, *arguments]
    print("==", name, flush=True)
    try:
        runpy.run_path(name, run_name="__main__")
    except Exception:
        traceback.print_exc(file=sys.stdout)
"""


@pytest.fixture(scope="module")
def outputs(folder):
    """What each program printed, by name."""
    image().resize((48, 48)).save(folder / "image.png")
    calls = []
    for name, (build, more) in RUNS.items():
        model = folder / name.removesuffix(".py")
        build().save_pretrained(model)
        more = [*more, "--image", folder / "image.png"] if "i2v" in name else more
        calls.append(command(name, "dance monkey", "--model", model, "--output", folder / f"{name}.mp4", *more))
    printed = run("-c", ALL, given=json.dumps([[call[0], call[1:]] for call in calls]))
    parts = [part.partition("\n") for part in printed.split("== ")[1:]]
    return {Path(name).name: text for name, _, text in parts}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_programs(folder, outputs, name):
    video = folder / f"{name}.mp4"
    assert str(video) in outputs[name], outputs[name]
    assert "density" in outputs[name]
    assert read_mp4(video).shape == (7 if "mochi" in name else 9, 3, 32, 32)


def torchrun(*arguments):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments)


@pytest.mark.slow
def test_one_video_on_two_processes_is_that_of_one(folder):
    """Two by `multi_gpu.py`, one by the same calls here."""
    from diffusers import DiffusionPipeline

    from videosparse import RadialProcessor
    from videosparse.generation import stream_to

    model = folder / "wan"
    wan().save_pretrained(model)
    out = torchrun(*command("multi_gpu.py", "dance monkey", "--model", model, "--output", folder / "two.mp4", *SMALL))
    assert "two.mp4" in out
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_attn_processor(RadialProcessor())
    with stream_to(pipe, folder / "one.mp4", fps=8):
        pipe(
            "dance monkey", num_frames=9, height=32, width=32, num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert (read_mp4(folder / "two.mp4") - read_mp4(folder / "one.mp4")).abs().max() <= 2 / 255


@pytest.mark.slow
def test_a_prompt_file_is_split_between_processes(folder):
    from folders import save_wan

    model = save_wan(folder / "small")
    (folder / "prompts.txt").write_text("a red circle\na blue square --seed 3\na star --f 5\n")
    size = ["--frames", "9", "--height", "64", "--width", "64", "--steps", "1"]
    prompts = ["--prompts", folder / "prompts.txt", "--output", folder / "videos"]
    out = torchrun(*command("multi_gpu.py", "--model", model, *prompts, *size))
    assert out.count(".mp4") == 3
    assert sorted(video.name for video in (folder / "videos").glob("*.mp4")) == [
        "001-a-red-circle-0-radial.mp4", "002-a-blue-square-3-radial.mp4", "003-a-star-0-radial.mp4",
    ]  # fmt: skip
