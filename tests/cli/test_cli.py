"""The command line: what it prints, writes, and how it fails."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import folders
import pytest
import torch
from typer.testing import CliRunner

from videosparse.cli import app
from videosparse.generation.families import PIPELINE_FAMILIES
from videosparse.generation.video import read_mp4

SMALL = ["--frames", "9", "--height", "64", "--width", "64", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def run(tmp_path, monkeypatch, model_folder, no_progress):
    """`run("generate", ...)`: the result of a command in an empty folder; the model folder is called `small`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDEOSPARSE_DEBUG", raising=False)
    os.symlink(model_folder, tmp_path / "small")

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return invoke


def make(run, *arguments):
    return run("generate", folders.PROMPT, "--model", "small", *SMALL, *arguments)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "small" not in path.parts)


def test_generate(run, tmp_path):
    result = make(run)
    assert result.exit_code == 0, result.output
    for word in ("small", "9 frames of 64x64", "grid 3x8x8, 192 tokens", "decay=0.2", "video-video", "denoising"):
        assert word in result.stdout
    assert "outputs/a-red-circle-bounces-0-radial.mp4" in result.stdout
    assert "nan" not in result.stdout
    assert len(read_mp4(tmp_path / "outputs" / "a-red-circle-bounces-0-radial.mp4")) == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--context-frames", 9, "--context-overlap", 4],
            ["192 tokens a window", "2 windows of 9 frames that share 4"],
        ),
        (["--ultravico", 0.9, "--trained-frames", 5], ["Length        far scores times 0.9 beyond 5 frames\n"]),
        (["--rope", "pi", "--trained-frames", 5], ["Length        rope pi beyond 5 frames\n"]),
        (["--method", "dense"], ["dense; 2 steps, native SDPA backend\n"]),
    ],
)
def test_what_was_done_is_told(run, arguments, words):
    result = make(run, "--frames", 17, *arguments)
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in words), result.stdout
    assert ("a window" in result.stdout) == ("--context-frames" in arguments)
    assert "none backend" not in result.stdout


def test_a_length_that_the_model_does_not_know_is_told_first(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("videosparse.generation.generating.load_pipeline", stop)
    told = "Note: 85 frames at once are beyond the 81 that small was trained on: "
    assert make(run, "--frames", 85).stderr.startswith(told)
    assert make(run, "--frames", 97, "--context-frames", 85, "--context-overlap", 4).stderr.startswith(told)
    for more in (["--rope", "pi"], ["--ultravico", 0.9], ["--context-frames", 81], ["--frames", 81]):
        assert make(run, "--frames", 85, *more).stderr == "Interrupted; nothing was written.\n"


def test_a_plan_tells_of_a_length_that_the_model_does_not_know(run):
    told = "Note: 161 frames at once are beyond the 81 that wan2.1-14b was trained on: the video may repeat"
    plan = "plan", "--model", "wan2.1-14b", "--frames", 161
    assert run(*plan).stderr.startswith(told)
    assert not run(*plan, "--ultravico", 0.9).stderr


def test_a_second_run_gets_a_number(run, tmp_path):
    for _ in range(2):
        assert make(run, "--method", "dense", "--seed", 7).exit_code == 0
    assert files(tmp_path / "outputs") == [
        "a-red-circle-bounces-7-dense-2.json", "a-red-circle-bounces-7-dense-2.mp4",
        "a-red-circle-bounces-7-dense.json", "a-red-circle-bounces-7-dense.mp4",
    ]  # fmt: skip


def test_compare(run, tmp_path):
    result = make(run, "--compare", "-o", "a.mp4", "--set", "radial.decay=0.5", "--set", "radial.first_steps=0")
    assert result.exit_code == 0, result.output
    for word in (
        "PSNR",
        "SSIM",
        "convention videosparse",
        " dense, ",
        " radial: ",
        "no warm-up, radial first; dense: native SDPA",
    ):
        assert word in result.stdout
    assert files(tmp_path) == ["a-compare.mp4", "a-dense.mp4", "a.json", "a.mp4"]
    assert read_mp4(tmp_path / "a-compare.mp4").shape[0] == 9
    assert json.loads((tmp_path / "a.json").read_text())["method"]["set"] == {"decay": 0.5, "first_steps": 0}


@pytest.mark.parametrize("compare", [False, True])
def test_adaspa(run, tmp_path, compare):
    sets = ["--set", "adaspa.density=0.4", "--set", "adaspa.refresh=0.5,0.8", "--set", "adaspa.lse_dtype=bfloat16"]
    more = ["--compare"] if compare else []
    result = make(run, "--method", "adaspa", *sets, "--steps", 6, "-o", "a.mp4", *more)
    assert result.exit_code == 0, result.output
    assert "adaspa density=0.4 refresh=(0.5, 0.8)" in result.stdout
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["method"]["set"] == {"density": 0.4, "refresh": [0.5, 0.8], "lse_dtype": "bfloat16"}
    assert record["method"]["options"]["recall_threshold"] == 0.8
    attention = record["attention"]
    # 3 blocks of keys, of which a row keeps one; the first step searches, and is dense
    assert attention["video_density"] == attention["density"] == pytest.approx(1 / 3)
    assert (attention["dense_calls"], attention["sparse_calls"]) == (4, 20)
    assert attention["search_calls"] == 4 * 3, "two of them refresh"
    assert "12 searches" in result.stdout
    assert ("PSNR" in result.stdout) == compare


def test_plan_of_adaspa(run):
    size = ["--height", "720", "--width", "1280", "--frames", "81", "--steps", "50"]
    result = run("plan", "--model", "wan2.1-14b", "--method", "adaspa", *size)
    assert result.exit_code == 0, result.output
    for word in (
        "591 x 1182 of 128 x 64", "0.200 video-video", "10 of 50 steps", "to search", "attention at most 2.76x",
        "1.18 GiB between steps: lse 461 MiB, bits 133 MiB, lists 7 MiB for each of 2 branches of 40 layers",
        "lse in float32", "107 MiB more while a layer searches",
    ):  # fmt: skip
        assert word in result.stdout
    half = run("plan", "--model", "wan2.1-14b", "--method", "adaspa", *size, "--set", "adaspa.lse_dtype=bfloat16")
    assert "lse 231 MiB" in half.stdout
    experts = run(
        "plan", "--model", "wan2.2-a14b", "--method", "adaspa", "--steps", 40, "--set", "adaspa.refresh=never"
    )
    assert "9 of 40 steps (1 of them beside the schedule, to search), 0 of 40 layers" in experts.stdout
    assert "refresh=()" in experts.stdout


def test_demo(run, tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr("videosparse.generation.sources._embedded_candidates", lambda: iter([model_folder]))
    small = {"wan": replace(PIPELINE_FAMILIES["wan"], usual="tiny-wan")}
    monkeypatch.setattr("videosparse.generation.sources.PIPELINE_FAMILIES", small)
    result = run("demo", "--frames", 9, "--steps", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "PSNR" in result.stdout
    assert "128x128" in result.stdout
    assert len(files(tmp_path / "outputs")) == 4


def test_overwrite(run, tmp_path):
    (tmp_path / "a.mp4").write_text("mine")
    result = make(run, "-o", "a.mp4")
    assert result.exit_code == 2
    assert "a.mp4 exists" in result.stderr
    assert "--overwrite" in result.stderr
    assert (tmp_path / "a.mp4").read_text() == "mine"
    assert make(run, "-o", "a.mp4", "--overwrite").exit_code == 0
    assert len(read_mp4(tmp_path / "a.mp4")) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "10"], "--frames must be 4k+1 for small (got 10); use 9 or 13."),
        (["--height", "60"], "--height must be a multiple of 16 for small (got 60); use 48 or 64."),
        (["--model", "/no/such/folder"], "No model folder at /no/such/folder"),
        (["--model", "outputs-folder"], "is no Diffusers pipeline"),
        (["--output", "file/a.mp4"], "is not a folder"),
        (["--output", "a.gif"], "must end in .mp4"),
        (["--dtype", "fp16"], "fp16 is slow and inexact on a CPU"),
        (["--steps", "-3"], "--steps must be 1 to 1000 (got -3); the model's is 50."),
        (["--method", "radail"], "Unknown method 'radail'; use radial, adaspa, paro or dense. Did you mean 'radial'?"),
        (["--set", "radial.dekay=1"], "Did you mean 'decay'?"),
        (["--set", "radial.decay=x"], "radial.decay must be a number, such as 0.5 (got 'x')."),
        (["--set", "radial.sink=maybe"], "radial.sink must be yes or no (got 'maybe')."),
        (["--set", "radial.decay"], "expects method.option=value"),
        (["--method", "adaspa", "--set", "adaspa.refresh=0.1", "--steps", "20"], "refresh=0.1 is step 2 of 20"),
        (["--method", "adaspa", "--set", "adaspa.density=2"], "density must lie in 0..1"),
        (["--method", "dense", "--compare"], "sets a sparse method against dense"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--offload", "model"], "--offload 'model' frees GPU memory, and this run is on cpu"),
        (["--linears", ""], "Unknown linears ''"),
        (["--step-cache", ""], "Unknown step cache ''"),
        (["--steps", "abc"], "--steps must be a whole number (got 'abc'); see videosparse generate -h."),
        (["--guidance", "4,5"], "--guidance must be a number (got '4,5'); see"),
        (["--output", ""], "--output must not be empty"),
        (["--output", "a\0.mp4"], "embedded null"),
        (["--method", "paro", "--plan", "none"], "There is no plan at ./none"),
        (["--guidance", "nan"], "--guidance must be 0 to 100 (got nan)"),
        (["--stepz", "3"], "No such option: --stepz"),
        (["--seed"], "Option '--seed' requires an argument; see videosparse -h."),
        (["another prompt"], "unexpected extra argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, message):
    (tmp_path / "outputs-folder").mkdir()
    (tmp_path / "file").touch()
    result = make(run, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert files(tmp_path) == ["file", "outputs-folder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'; see videosparse -h."),
        (["--bogus"], "No such option: --bogus"),
        (["generate"], "There is no prompt; give it as an argument"),
        (["plan", "--frames", "1.5"], "--frames must be a whole number (got '1.5'); see videosparse plan -h."),
        (["plan", "--method", "paro", "--plan", "None"], "There is no plan at ./None"),
        (["plan", "--png", "a\0.png"], "embedded null"),
        (["calibrate", "--prompts", "none.txt", "-o", "plan.safetensors"], "Cannot read prompts from none.txt"),
    ],
)
def test_mistyped_commands_are_one_line_and_exit_code_2(run, arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr


def test_no_command_shows_help(run):
    result = run()
    assert result.exit_code == 2
    assert "generate" in result.output


def test_a_cut_prompt_is_one_line(run):
    result = run("generate", "red circle " * 50, "--model", "small", *SMALL, "--steps", "1")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Note: The prompt has ")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_error(run, monkeypatch):
    def gone(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("videosparse.cli.planning.rows", gone)
    result = run("plan")
    assert (result.exit_code, result.stderr) == (1, "")


def test_empty_prompt(run):
    result = run("generate", " ", "--model", "small")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "The prompt is empty" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run):
    result = make(run, "--device", "cuda")
    assert result.exit_code == 2
    assert "needs an NVIDIA GPU" in result.stderr


def test_unsupported_pipeline(run, tmp_path, model_folder):
    folder = tmp_path / "i2v"
    for file in ("transformer/config.json", "vae/config.json"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text((model_folder / file).read_text())
    (folder / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
    result = make(run, "--model", "i2v")
    assert result.exit_code == 2
    assert "needs an image besides the prompt" in result.stderr


def test_debug_shows_where(run):
    result = make(run, "--steps", "0", "--debug")
    assert type(result.exception).__name__ == "GenerationError"


def test_an_unexpected_error_is_one_line_and_exit_code_1(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("what\nis this")

    monkeypatch.setattr("videosparse.generation.generate_to", fail)
    result = make(run)
    assert result.exit_code == 1
    assert result.stderr == "Unexpected RuntimeError: what is this (--debug shows where)\n"


@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_a_bug_inside_the_run_is_not_blamed_on_the_user(run, monkeypatch, tmp_path, kind):
    from diffusers.video_processor import VideoProcessor

    def fail(*_, **__):
        raise kind("a bug")

    monkeypatch.setattr(VideoProcessor, "postprocess_video", fail)
    result = make(run)
    assert result.exit_code == 1
    assert result.stderr == f"Unexpected {kind.__name__}: a bug (--debug shows where)\n"
    assert files(tmp_path) == []


def test_ctrl_c(run, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("videosparse.generation.generating.write_json", stop)
    result = make(run, "-o", "a.mp4")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted; nothing was written.\n"
    assert files(tmp_path) == []


def test_plan_needs_no_weights(run, tmp_path):
    size = ["--height", "720", "--width", "1280", "--frames", "161", "--steps", "50"]
    result = run("plan", "--model", "wan2.1-14b", *size, "--png", "map.png")
    assert result.exit_code == 0, result.output
    for word in (
        "41x45x80",
        "147600 tokens",
        "1154 x 2307 of 128 x 64",
        "12 of 50 steps",
        "PFLOP",
        "attention at most",
    ):
        assert word in result.stdout
    assert "█" in result.stdout
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert run("plan", "--model", "wan2.1-14b", "--png", "map.png").exit_code == 2


def test_plan_counts_the_weights_that_are_on_the_gpu_at_once(run):
    """The preset of Wan 2.2 keeps one of its two experts there."""
    rows = {}
    for offload in (None, "none", "group"):
        given = () if offload is None else ("--offload", offload)
        result = run("plan", "--preset", "wan2.2-a14b-720p", *given)
        assert result.exit_code == 0, result.output
        rows[offload] = next(line for line in result.stdout.splitlines() if line.startswith("Peak"))
    assert "about 26.60 GiB of weights" in rows[None]
    assert rows[None].endswith("offload model)")
    assert "about 53.21 GiB of weights" in rows["none"]
    assert rows["none"].endswith("both experts on the GPU)")
    assert "about 1.74 GiB of weights" in rows["group"]
    assert rows["group"].endswith("offload group)")
    assert "Unknown offload 'disk'; use none, model or group." in run("plan", "--offload", "disk").stderr


def test_plan_of_a_folder_and_of_dense(run):
    result = run("plan", "--model", "small", "--frames", "17", "--height", "64", "--width", "64", "--method", "dense")
    assert result.exit_code == 0, result.output
    assert "5x8x8" in result.stdout
    assert "MFLOP" in result.stdout or "GFLOP" in result.stdout


def test_plan_of_videos_beyond_the_trained_length(run):
    size = ["--model", "wan2.1-14b", "--height", "480", "--width", "832", "--frames", "161", "--steps", "50"]
    whole = run("plan", *size, "--method", "dense")
    shorter = run("plan", *size, "--method", "dense", "--ultravico", "0.9", "--trained-frames", "41")
    assert "beyond half of 11 latent frames" in shorter.stdout
    far = run("plan", *size, "--method", "dense", "--ultravico", "0.9")
    assert far.exit_code == 0, far.output
    assert "positive scores times 0.9 beyond half of 21 latent frames; by the portable kernel" in far.stdout
    assert "min on one" in whole.stdout
    assert "min on one" not in far.stdout  # measured without
    windows = run("plan", *size, "--method", "adaspa", "--context-frames", "81", "--context-overlap", "16")
    assert windows.exit_code == 0, windows.output
    for word in ("Windows", "3 of 21 latent frames", "6 forwards", "for each of 2 branches and 3 windows of 40 layers"):
        assert word in windows.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "wan2.1-14b", "--trained-frames", "81"],
            "--trained-frames is for --rope riflex, ntk or pi, or for --ultravico; drop it, or choose one.",
        ),
        (
            ["--model", "wan2.1-14b", "--frames", "81", "--ultravico", "0.9"],
            "longer than the 81 frames that wan2.1-14b",
        ),
        (
            ["--model", "wan2.1-14b", "--frames", "161", "--context-frames", "81", "--ultravico", "0.9"],
            "longer than the 81 frames that wan2.1-14b was trained on (got 81)",
        ),
        (["--model", "wan2.1-14b", "--frames", "80"], "use 77 or 81"),
        (["--model", "wan2.1-14b", "--set", "dense.x=1"], "Method dense has no option 'x'; it has quant."),
        (["--model", "wan2.1-14b", "--method", "dense", "--set", "radial.decay=1"], "this run uses dense"),
        (["--model", "wan2.1-14b", "--png", "map.jpg"], "must end in .png"),
        (["--model", "mochi", "--method", "dense", "--png", "map.png"], "no block map to draw"),
        (["--model", "mochi", "--method", "adaspa", "--png", "map.png"], "there is no block map to draw before"),
        (["--model", "wan9"], "No model folder at wan9"),
        (["--model", "hunyuan-video", "--frames", "100001"], "are possible; use fewer frames or a smaller size"),
        (["--model", "mochi", "--frames", "999999999999999997"], "are possible; use fewer frames or a smaller size"),
    ],
)
def test_bad_plans(run, tmp_path, arguments, message):
    result = run("plan", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert files(tmp_path) == []


def test_doctor(run):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("python", "torch", "triton", "diffusers", "cpu", "backend auto takes", "tiny-wan"):
        assert word in result.stdout


def test_help_and_version(run):
    from importlib.metadata import version

    assert "generate" in run("--help").stdout
    assert "--compare" in run("generate", "--help").stdout.replace("\x1b", "")
    assert run("--version").stdout == f"videosparse {version('videosparse')}\n"


def test_python_dash_m():
    code = [sys.executable, "-m", "videosparse", "--version"]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "videosparse")


CALIBRATE = ("calibrate", "--prompts", "prompts.txt", "--model", "small", "--steps", 4, "--buckets", 2, "--block", 64)
PLANNED = ("--frames", 9, "--height", 64, "--width", 64, "--device", "cpu")


def test_calibrate_then_generate(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("# typical\na red circle bounces\n\na blue square\n")
    result = run(*CALIBRATE, *PLANNED, "-o", "plan.safetensors", "--density", 0.4)
    assert result.exit_code == 0, result.output
    for word in (
        "grid 3x8x8",
        "2, 12 calls looked at",
        "Orders",
        "by the paper's metric",
        "in blocks of 64x64",
        "Recall",
        "plan.safetensors (",
    ):
        assert word in result.stdout
    again = run(*CALIBRATE, *PLANNED, "-o", "plan.safetensors")
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "plan.safetensors exists; choose another name, or pass --overwrite" in again.stderr
    made = run("generate", "a red circle", "--model", "small", *PLANNED, "--steps", 4, "--method", "paro",
               "--plan", "plan.safetensors", "-o", "a.mp4")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "paro calibrated=PAROPlan(plan.safetensors" in made.stdout
    planned = run(
        "plan", "--model", "small", *PLANNED[:-2], "--steps", 4, "--method", "paro", "--plan", "plan.safetensors"
    )
    assert planned.exit_code == 0, planned.output
    online = run("generate", "a red circle", "--model", "small", *PLANNED, "--steps", 4, "--method", "paro",
                 "--set", "paro.density=0.4", "--set", "paro.order_by=mass", "-o", "b.mp4")  # fmt: skip
    assert online.exit_code == 0, online.output
    by_mass = run(*CALIBRATE, *PLANNED, "-o", "mass.safetensors", "--density", 0.4, "--order-by", "mass")
    assert by_mass.exit_code == 0, by_mass.output
    assert "by the attention that the map keeps" in " ".join(by_mass.stdout.split())
    other = run("generate", "a", "--model", "small", "--frames", 13, *PLANNED[2:], "--method", "paro",
                "--plan", "plan.safetensors")  # fmt: skip
    assert (other.exit_code, other.stderr.count("\n")) == (2, 1)
    assert "this video has grid 4x8x8" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompts", "none.txt"],
            "Cannot read prompts from none.txt: No such file or directory; give a text file in UTF-8",
        ),
        (["--density", "0.2", "--mass", "0.9"], "--density and --mass both say how many blocks are kept"),
        (
            ["--output", f"{'a' * 250}.safetensors"],
            "(File name too long); choose another, shorter name.",
        ),
        (["--output", f"new/{'a' * 240}.safetensors"], "choose another, shorter name."),
        (["--output", f"{'a' * 300}/plan.safetensors"], "File name too long; choose another folder."),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["--block", "x"], "block must be one size or two"),
        (["--block", "32"], "block must be"),
        (["--mass", "2"], "mass must lie in"),
        (["--order-by", "rank"], "Error: --order-by must be metric or mass (got 'rank')"),
        (["--order-by", "mass", "--alpha", "0.5"], "orders are to be chosen by mass; drop one of both"),
        (["--output", "plan.bin"], "must end in .safetensors"),
        (["--output", ""], "use plan.safetensors"),
        (["--buckets", "9"], "buckets must be 1 to 2"),
        (["--lora", "none.safetensors"], "No LoRA at 'none.safetensors'"),
        (["--ultravico", "0.9"], "calibrate has no --ultravico: maps are made from scores as they are"),
    ],
)
def test_bad_calibrations_are_one_line(run, tmp_path, arguments, message):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    result = run(*CALIBRATE, *PLANNED, "-o", "plan.safetensors", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert files(tmp_path) == ["empty.txt", "prompts.txt"]


def test_a_plan_is_for_paro(run, tmp_path):
    result = make(run, "--plan", "plan.safetensors")
    assert result.exit_code == 2
    assert "An option of method paro was set, but this run uses radial" in result.stderr


def test_ctrl_c_while_calibrating(run, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "prompts.txt").write_text("a red circle\n")
    monkeypatch.setattr("videosparse.generation.looking.Watch.replay", stop)
    result = run(*CALIBRATE, *PLANNED, "-o", "plan.safetensors")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted; the same command goes on after the last finished prompt or map.\n"
    assert files(tmp_path) == ["plan.safetensors.partial", "prompts.txt"]
