"""The generation programs, each run once as a user runs it, on tiny pipelines that were saved to a folder."""

import json
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from pipes import hunyuan, image, mochi, wan, wan22, wan_i2v

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file

from videosparse.cases import MODELS
from videosparse.generation.presets import PRESETS
from videosparse.generation.video import read_mp4

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.name for path in (ROOT / "pipelines").glob("*.py"))
TINY = ["--height", "32", "--width", "32", "--steps", "2", "--fps", "8"]
SMALL = ["--frames", "9", *TINY]
# of libraries, about no fault of a run
REMARKS = re.compile("split will not be applied|all_gather_tensor|CLIPImageProcessor|torch_dtype")


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
    assert not REMARKS.search(done.stderr), done.stderr[-3000:]
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


@pytest.mark.parametrize("text", ["typo", "nobody/typo", "nobody/typo/a.safetensors", "typo.safetensors"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_lora_that_is_nowhere_is_one_line(name, text, monkeypatch, tmp_path, models, capsys):
    """As `videosparse generate` tells it, before anything is loaded: the models here have no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = models[{"wan22": "wan", "multi": "wan"}.get(name.split("_")[0], name.split("_")[0])]
    size = ["--image", "a.png"] if name == "wan_i2v.py" else TINY
    monkeypatch.setattr(sys, "argv", [name, "a cat", "--model", str(model), "--lora", text, *size])
    assert re.fullmatch(f"Error: No LoRA at '{text}'.*\\n", mistake(name, capsys))


@pytest.mark.parametrize(
    ("variant", "height", "width", "shift"),
    [
        ("wan2.1", 480, 832, 3.0),
        ("wan2.1", 720, 1280, 5.0),
        ("wan2.1", 1280, 720, 5.0),
        ("wan2.2-a14b", 720, 1280, 12.0),
        ("hunyuan-video", 720, 1280, 7.0),
        ("mochi", 480, 848, None),
    ],
)
def test_several_gpus_have_the_usual_shift_of_a_model(variant, height, width, shift):
    program = runpy.run_path(str(ROOT / "pipelines" / "multi_gpu.py"))
    assert program["usual_shift"](variant, height, width) == shift
    presets = [preset.values for preset in PRESETS.values()]
    published = [
        preset.get("shift")
        for preset in presets
        if (preset.get("height"), preset.get("width")) == (height, width) and MODELS[preset["model"]].variant == variant
    ]
    assert set(published) <= {shift}, "as the presets say"


def save_lora(folder, model, component, about):
    """A random LoRA of the self-attentions of one transformer, with what videosparse writes into its header."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder.mkdir()
    transformer = WanTransformer3DModel.from_pretrained(model / component)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=r"blocks\.\d+\.attn1\.to_[qkv]"))
    layers = {f"transformer.{name}": x for name, x in get_peft_model_state_dict(transformer).items()}
    config = transformer.config
    header = {
        "format": "videosparse-lora-1", "base_model": "tiny", "family": "wan", "layers": config.num_layers,
        "heads": config.num_attention_heads, "component": component, "method": "radial", "options": {"decay": 0.7},
        "first_layers": 0, "frames": [9, 13], "shift": 5.0, **about,
    }  # fmt: skip
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(layers, file, metadata={"format": "pt", "videosparse": json.dumps(header)})
    return folder


@pytest.mark.slow
def test_length_shift_and_dense_steps_come_from_the_loras(folder, monkeypatch, capsys):
    """Two experts of Wan 2.2: the larger share of dense steps is that of the run, and what is given wins."""
    model = folder / "two experts"
    wan22().save_pretrained(model)
    high = save_lora(folder / "high", model, "transformer", {"first_steps": 0.25})
    low = save_lora(folder / "low", model, "transformer_2", {"first_steps": 0.5})
    shifts = []
    from_config = UniPCMultistepScheduler.from_config

    def spied(config, **more):
        if "flow_shift" in more:  # by the program, not by loading
            shifts.append(more["flow_shift"])
        return from_config(config, **more)

    monkeypatch.setattr(UniPCMultistepScheduler, "from_config", spied)
    arguments = ["a cat", "--model", model, "--lora", high, "--lora-2", low, *TINY, "--steps", "4"]

    def made(*more):
        video = folder / f"{len(shifts)}.mp4"
        monkeypatch.setattr(sys, "argv", ["wan22", *map(str, [*arguments, *more, "--output", video])])
        runpy.run_path(str(ROOT / "pipelines" / "wan22_t2v.py"), run_name="__main__")
        said = capsys.readouterr()
        calls = [int(re.search(rf"{kind}_calls=(\d+)", said.out)[1]) for kind in ("dense", "sparse")]
        return len(read_mp4(video)), calls[0] / sum(calls), said.err

    assert made()[:2] == (13, 0.5)
    frames, dense, told = made("--frames", "17", "--shift", "12")
    assert (frames, dense) == (17, 0.75), "with a larger shift, more steps lie at the noise that was dense in training"
    assert "Note: The LoRA high was trained for 13 frames; this video has 17.\n" in told
    assert shifts == [5.0, 12.0]


@pytest.mark.slow
def test_loras_of_two_experts_that_changed_places(folder, monkeypatch, capsys):
    model = folder / "two experts of another test"
    wan22().save_pretrained(model)
    low = save_lora(folder / "low alone", model, "transformer_2", {"first_steps": 0.5})
    monkeypatch.setattr(sys, "argv", ["wan22", "a cat", "--model", str(model), "--lora", str(low), *TINY])
    assert "was trained for the transformer_2 (got the transformer); give it as --lora-2." in mistake(
        "wan22_t2v.py", capsys
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_interrupt_is_one_line(name, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("videosparse.generation.video_place", interrupted)
    image = ["--image", "a.png"] if name == "wan_i2v.py" else []
    monkeypatch.setattr(sys, "argv", [name, "a cat", "--model", "none", *image])
    assert mistake(name, capsys, 130) == "Interrupted; no file is left half-written.\n"


@pytest.mark.parametrize(
    ("name", "library", "remark"),
    [
        ("multi_gpu.py", "diffusers.hooks.context_parallel", "split will not be applied"),
        ("wan_i2v.py", "transformers.utils.import_utils", "CLIPImageProcessor"),
    ],
)
def test_remarks_of_libraries_are_left_out_by_one_filter(name, library, remark, monkeypatch, capsys):
    log = logging.getLogger(library)
    monkeypatch.setattr(log, "filters", [])
    for _ in range(2):
        test_an_interrupt_is_one_line(name, monkeypatch, capsys)
    (left_out,) = log.filters
    kept = [bool(left_out(logging.makeLogRecord({"msg": said}))) for said in (f"a {remark}", "another")]
    assert kept == [False, True]


@pytest.mark.slow
def test_sigterm_leaves_no_part_of_a_file(folder, monkeypatch, capsys):
    """Before it gets its name it is hidden, and nobody would look for it."""
    model, out = folder / "to be killed", folder / "killed"
    wan().save_pretrained(model)

    def killed(self, parts):
        assert [path.name.endswith(".part.mp4") for path in out.iterdir()] == [True]
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("videosparse.generation.output.Destination.name", killed)
    arguments = ["wan", "a cat", "--model", str(model), "--output", f"{out}/a.mp4", *SMALL]
    monkeypatch.setattr(sys, "argv", arguments)
    mistake("wan_t2v.py", capsys, 143)
    assert not out.exists()


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
    """Two by `multi_gpu.py`, one by the same calls here; shift and schedule are those of the LoRA."""
    from diffusers import DiffusionPipeline

    import videosparse
    from videosparse import RadialProcessor
    from videosparse.generation import stream_to
    from videosparse.generation.shifts import shifted

    model = folder / "wan"
    wan().save_pretrained(model)
    lora = save_lora(folder / "lora of two processes", model, "transformer", {"first_steps": 0.5})
    more = ["--lora", lora, "--guidance", "3", "--rope", "pi"]
    out = torchrun(
        *command("multi_gpu.py", "dance monkey", "--model", model, "--output", folder / "two.mp4", *SMALL, *more)
    )
    assert "two.mp4" in out
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_attn_processor(RadialProcessor(decay=0.7, first_steps=0.5, first_layers=0))
    videosparse.extend_rope(pipe, "pi", trained_frames=81)
    with stream_to(pipe, folder / "one.mp4", fps=8), shifted(pipe, 5.0):
        pipe(
            "dance monkey", num_frames=9, height=32, width=32, num_inference_steps=2, guidance_scale=3.0,
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
    records = [json.loads(record.read_text()) for record in (folder / "videos").glob("*.json")]
    assert [record["settings"]["shift"] for record in records] == [3.0] * 3
