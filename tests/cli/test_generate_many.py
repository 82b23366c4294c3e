"""`videosparse generate` with presets, run files, prompt files and latents, and `videosparse presets`."""

import os

import folders
import pytest
from typer.testing import CliRunner

from videosparse.cli import app
from videosparse.generation.presets import presets_over

SMALL = 'model = "small"\nframes = 9\nheight = 64\nwidth = 64\nsteps = 2\ndevice = "cpu"\n'
MAGCACHE = "--step-cache", "magcache", "--magnitudes"


@pytest.fixture
def run(tmp_path, monkeypatch, model_folder, no_progress):
    """`run("generate", ...)` in an empty folder; the model folder is called `small`, the run file `run.toml`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDEOSPARSE_DEBUG", raising=False)
    os.symlink(model_folder, tmp_path / "small")
    (tmp_path / "run.toml").write_text(SMALL)
    (tmp_path / "prompts.txt").write_text("# two\na red circle --seed 3\n\na blue square --f 5 --s 1\n")
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_presets(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run("presets")
    assert result.exit_code == 0, result.output
    for word in ("wan2.1-14b-720p", "81 frames of 720x1280", "50 steps", "shift 5.0", "12 dense steps", "rope riflex",
                 "offload model", "mochi-480p", "shift of the model"):  # fmt: skip
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "radial at density 0.40, 12 dense steps, 1 dense layer\n" in result.stdout
    assert " 0 dense" not in result.stdout
    one = run("presets", "wan2.1-14b-720p")
    assert 'preset = "wan2.1-14b-720p"\n# model = "wan2.1-14b"\n# frames = 81\n' in one.stdout
    assert "# radial.decay = 0.2\n" in one.stdout
    assert "Unknown preset" in run("presets", "no").stderr
    assert "fast                    the same in integers" in result.stdout
    assert run("presets", "exact").stdout.endswith('.\npreset = "exact"\n# method = "dense"\n# compile = true\n')


@pytest.mark.parametrize("name", ["fast", "tiny", "wan2.1-14b-720p-2x"])
def test_a_preset_as_a_run_file_runs_as_the_preset(run, tmp_path, name):
    """Where values of the preset step aside, such as on a CPU, or in a shorter video, those of the file do so, too."""
    (tmp_path / "run.toml").write_text(run("presets", name).stdout)
    size = ("--model", "small", "--frames", 9, "--height", 64, "--width", 64, "--steps", 2, "--device", "cpu")
    made = []
    for number, how in enumerate((("--preset", name), ("--config", "run.toml"))):
        result = run("generate", "a cat", *how, *size, "-o", f"{number}.mp4")
        assert result.exit_code == 0, result.output
        made.append((result.stderr, (tmp_path / f"{number}.mp4").read_bytes()))
    assert made[0] == made[1]


def test_a_line_of_a_printed_preset_can_be_changed(run, tmp_path):
    text = run("presets", "wan2.1-14b-720p").stdout
    for line in ("# frames = 81", "# radial.decay = 0.2"):
        assert line in text
    text = text.replace("# frames = 81", "frames = 161").replace("# radial.decay = 0.2", "radial.decay = 0.5")
    (tmp_path / "run.toml").write_text(text)
    result = run("plan", "--config", "run.toml")
    assert result.exit_code == 0, result.output
    assert "grid" not in result.stderr
    for word in ("wan2.1-14b", "41x45x80", "decay=0.5", "12 of 50 steps"):
        assert word in result.stdout


def test_plan_takes_presets_and_run_files(run, tmp_path):
    by_hand = run(
        "plan", "--model", "wan2.1-14b", "--height", 720, "--width", 1280, "--frames", 161, "--ultravico", 0.9
    )
    preset = run("plan", "--preset", "wan2.1-14b-720p-2x")
    (tmp_path / "run.toml").write_text(
        'preset = "wan2.1-14b-720p-2x"\nprompts = "p.txt"\nseed = 3\nnegative_prompt = "a"\n'
    )
    from_file = run("plan", "--config", "run.toml")

    def told(result):
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return [line for line in result.stdout.splitlines() if not line.startswith("Built in")]

    assert told(preset) == told(by_hand) == told(from_file)
    fast = run("plan", "--preset", "wan2.1-14b-720p", "--preset", "fast", "--frames", 161)
    assert fast.exit_code == 0, fast.output
    length, cache = fast.stderr.splitlines()
    assert length.startswith("Note: 161 frames at once are beyond the 81 ")
    assert cache == "Note: What the step cache skips is not counted: that a run decides by itself."
    assert "quant=int8" in fast.stdout
    short = run("plan", "--preset", "wan2.1-14b-720p-2x", "--frames", 81)
    assert short.exit_code == 0, short.output
    assert "The preset's UltraViCo is left out: 81 frames at once are no more than the 81 of training" in short.stderr
    assert "UltraViCo" not in short.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "no"], "Unknown preset 'no'"),
        (["--config", "none.toml"], "Cannot read none.toml"),
        (["--preset", "exact", "--method", "radial"], "--preset exact runs dense attention (got --method radial)"),
        (["--lora", "none.safetensors"], "No LoRA at 'none.safetensors'"),
        (["--linears", "fp7"], "Unknown linears 'fp7'"),
        (["--preset", "tiny", "--ultravico", "0.9"], "ultravico is for videos, or windows, longer than the 81"),
    ],
)
def test_bad_plans_of_presets(run, arguments, message):
    result = run("plan", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr


def test_a_model_and_a_speed(run, tmp_path):
    """In any order, from the command line and from a run file; what a CPU cannot do is told."""
    size = ("--model", "small", "--frames", 9, "--height", 64, "--width", 64, "--steps", 3, "--device", "cpu")
    result = run("generate", "a cat", "--preset", "fast", "--preset", "tiny", *size, "-o", "a.mp4")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Note: Preset fast leaves out here: quant=int8 (")
    assert result.stderr.count("\n") == 1
    assert "Beside it     first-block=0.05: " in result.stdout
    (tmp_path / "speed.toml").write_text(SMALL + 'prompt = "a cat"\npreset = ["exact", "tiny"]\ncompile = false\n')
    result = run("generate", "--config", "speed.toml", "-o", "b.mp4")
    assert result.exit_code == 0, result.output
    assert not result.stderr
    assert "Method        dense" in result.stdout
    result = run("generate", "--config", "speed.toml", "--preset", "balanced", "-o", "c.mp4")
    assert result.exit_code == 0, result.output
    assert "Method        radial" in result.stdout, "the file's speed gives way, its model's preset stays"
    assert presets_over(["fast"], ["exact", "tiny"]) == ("tiny", "fast")
    assert presets_over(["mochi-480p"], ["exact", "tiny"]) == ("mochi-480p", "exact")
    assert presets_over([], ["tiny"]) == presets_over(["tiny"], []) == ("tiny",)
    for presets, message in (
        (("tiny", "mochi-480p"), "Presets tiny and mochi-480p are both of a model; leave one."),
        (("fast", "exact"), "Presets fast and exact are both of a speed; leave one."),
    ):
        given = [word for preset in presets for word in ("--preset", preset)]
        assert run("generate", "a cat", *given).stderr == f"Error: {message}\n"


def test_a_run_file_and_options_that_win(run, tmp_path):
    (tmp_path / "run.toml").write_text(SMALL + 'prompt = "a cat"\noutput = "there/"\n[radial]\ndecay = 0.5\n')
    result = run("generate", "--config", "run.toml", "--frames", 5, "--seed", 4)
    assert result.exit_code == 0, result.output
    assert "5 frames of 64x64" in result.stdout
    assert "decay=0.5" in result.stdout
    assert names(tmp_path / "there") == ["a-cat-4-radial.json", "a-cat-4-radial.mp4"]


def test_a_preset_with_another_model(run, tmp_path):
    result = run(
        "generate", "a cat", "--preset", "tiny", "--model", "small", "--frames", 9, "--height", 64, "--width", 64,
        "--steps", 1, "--device", "cpu", "-o", "a.mp4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.mp4").is_file()


def test_a_batch_and_again(run, tmp_path):
    command = ("generate", "--config", "run.toml", "--prompts", "prompts.txt", "-o", "out", "--method", "dense")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "1 of 2" in result.stdout
    assert "2 of 2" in result.stdout
    assert names(tmp_path / "out") == [
        "001-a-red-circle-3-dense.json", "001-a-red-circle-3-dense.mp4",
        "002-a-blue-square-0-dense.json", "002-a-blue-square-0-dense.mp4",
    ]  # fmt: skip
    again = run(*command)
    assert again.stdout.count("was there already") == 2
    assert len(names(tmp_path / "out")) == 4


def test_what_is_known_before_a_batch_is_told_once(run, tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("a cat --f 85\na dog --f 85\na cow --f 89\n")
    command = ("generate", "--config", "run.toml", "--prompts", "long.txt", "-o", "out", "--method", "dense")
    told = [f"Note: {n} frames at once are beyond the 81 that small was trained on: " for n in (85, 89)]
    result = run(*command, "--steps", 1)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, told, strict=True)] == told

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("videosparse.generation.batch.load_pipeline", stop)
    assert run(*command).stderr.splitlines()[:2] == lines, "before the first video"


def test_latents(run, tmp_path):
    made = run("generate", folders.PROMPT, "--config", "run.toml", "--save-latents", "-o", "a.mp4")
    assert made.exit_code == 0, made.output
    assert "Latents" in made.stdout
    decoded = run("generate", "--from-latents", "a.safetensors", "--device", "cpu", "-o", "b.mp4")
    assert decoded.exit_code == 0, decoded.output
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "a.mp4").unlink()
    again = run("generate", "--from-latents", "a.safetensors", "--device", "cpu", "-o", "a.mp4")
    assert again.exit_code == 0, again.output
    assert names(tmp_path) == ["a.json", "a.mp4", "a.safetensors", "b.mp4", "prompts.txt", "run.toml", "small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "prompts.txt", "a cat"], "A file of prompts and a prompt do not go together"),
        (["--prompts", "prompts.txt", "--compare"], "A file of prompts and --compare do not go together"),
        (["--prompts", "prompts.txt", "-o", "a.mp4"], "must be a folder for a prompt file"),
        (["--prompts", "none.txt"], "Cannot read prompts from none.txt"),
        (["--prompts", "prompts.txt", "--frames", "10"], "prompts.txt, line 2: --frames must be 4k+1"),
        (["--prompts", "lines.txt"], "lines.txt, line 1: --frames must be 4k+1 for small (got 10); use 9 or 13."),
        (["--config", "wrong.toml"], "frames in wrong.toml must be 4k+1 for small (got 10); use 9 or 13."),
        (["--config", "wrong.toml", "--frames", "11"], "Error: --frames must be 4k+1 for small (got 11)"),
        (["--prompts", "prompts.txt", "-o", "run.toml/"], "is not a folder"),
        (["--prompts", "prompts.txt", "-o", "taken", "--overwrite"], "002-a-blue-square-0-radial.mp4: it is a folder"),
        (["a cat", "--compare", "--save-latents"], "do not go together"),
        (["a cat", "--preset", "no"], "Unknown preset 'no'"),
        (["a cat", "--rope", "riflex", "--method", "dense"], "No intrinsic frequency is known"),
        (["a cat", "--trained-frames", "9"], "--trained-frames is for --rope"),
        (["a cat", "--ultravico", "0.9"], "longer than the 81 frames that small was trained on"),
        (
            ["a cat", "--ultravico", "0"],
            "--ultravico must lie in 0..1, 0 excluded (got 0.0); the published",
        ),
        (["a cat", "--context-frames", "8"], "--context-frames must be 4k+1, at least 5 (got 8); use 5 or 9."),
        (["a cat", "--context-frames", "9", "--context-overlap", "5"], "--context-overlap must be a multiple of 4"),
        (["a cat", "--lora", ""], "No LoRA at ''"),
        (["a cat", "--method", "paro", "--plan", ""], "--plan must not be empty"),
        (["a cat", "--method", "paro", "--plan", "taken"], "taken is a folder; name the .safetensors file"),
        (["a cat", *MAGCACHE, ""], "--magnitudes must not be empty"),
        (["a cat", *MAGCACHE, "taken"], "taken: it is a folder; name a file, such as taken/m.json."),
        (["a cat", *MAGCACHE, "run.toml/m.json"], "run.toml is not a folder; choose another folder."),
        (["a cat", "--linears", "fp8"], "Error: --linears fp8 cannot run: "),
        (["a cat", "--context-overlap", "8"], "--context-overlap is for --context-frames"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr("videosparse.generation.running.load_pipeline", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "wrong.toml").write_text(SMALL.replace("frames = 9", "frames = 10") + 'prompt = "a cat"\n')
    (tmp_path / "lines.txt").write_text("a cat --f 10\n")
    (tmp_path / "taken" / "002-a-blue-square-0-radial.mp4").mkdir(parents=True)
    before = names(tmp_path)
    result = run("generate", "--config", "run.toml", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There are no latents at a.safetensors"),
        (["--steps", "3"], "only decodes: steps is decided there"),
        (["--config", "run.toml"], "only decodes: config is decided there"),
        (["--preset", "tiny"], "only decodes: preset is decided there"),
        (["--set", "radial.decay=1"], "only decodes: set is decided there"),
        (["--plan", "a.safetensors"], "only decodes: plan is decided there"),
        (["--compare"], "only decodes: compare is decided there"),
    ],
)
def test_decoding_takes_no_options_of_generation(run, arguments, message):
    result = run("generate", "--from-latents", "a.safetensors", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


@pytest.mark.parametrize("where", ["command", "file"])
def test_an_interrupted_batch_says_how_to_go_on(run, tmp_path, monkeypatch, where):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("videosparse.generation.batch.load_pipeline", interrupted)
    if where == "file":
        (tmp_path / "run.toml").write_text(SMALL + 'prompts = "prompts.txt"\n')
    result = run("generate", "--config", "run.toml", *(["--prompts", "prompts.txt"] if where == "command" else []))
    assert result.exit_code == 130
    assert result.stderr == "Interrupted; the same command goes on with the videos that are missing.\n"
    result = run("generate", "--config", "run.toml", "--prompts", "prompts.txt", "--overwrite")
    assert "Interrupted; the same command without --overwrite goes on with" in result.stderr


def test_interrupted_while_libraries_are_imported(run, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("videosparse.cli.console._quiet_libraries", interrupted)
    result = run("generate", "a cat")
    assert (result.exit_code, result.stderr) == (130, "Interrupted; nothing was written.\n")


def test_the_demo_says_what_it_takes(run):
    from videosparse.cli.generation import DEMO_ON_CPU, DEMO_ON_GPU

    told = " ".join(run("demo", "--help").stdout.split())
    for cpu, gpu in zip(DEMO_ON_CPU, DEMO_ON_GPU, strict=True):
        assert f"{cpu}, on a GPU {gpu}" in told
