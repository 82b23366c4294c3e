"""The training program of the embedded model, all of it in seconds."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import pytest
import torch
from eval_programs import load

pytest.importorskip("diffusers")

from videosparse.training.tiny.checkpoint import read_backup
from videosparse.training.tiny.dit import Dit
from videosparse.training.tiny.models import SMOKE_SIZES
from videosparse.training.tiny.ranks import Ranks
from videosparse.training.tiny.state import STOP
from videosparse.training.tiny.text import embed_text, tokenize


@pytest.fixture(scope="module")
def program():
    return load("train_tiny_model")


def test_all_stops_resumes_exports_and_generates(program, tmp_path, monkeypatch):
    """The whole program at small sizes, stopped once in the DiT phase and exported from the backup alone."""
    work, backup, out = tmp_path / "work", tmp_path / "backup", tmp_path / "out"
    common = ["--smoke", "--device", "cpu", "--workers", "1", "--work", str(work), "--backup", str(backup)]
    common += ["--binding", "0.1"]
    calls = iter(range(10**6))
    step = Dit.step

    def stop_soon(self, shape, learn=True):
        if learn and next(calls) == 9:
            STOP.set()
        return step(self, shape, learn)

    monkeypatch.setattr(Dit, "step", stop_soon)
    STOP.clear()
    program.main(["all", *common])
    assert STOP.is_set()
    first = read_backup(backup)[1]
    assert first["vae"]["finished"]
    assert not first["dit"]["finished"]
    STOP.clear()
    program.main(["all", "--resume", *common])
    tensors, meta = read_backup(backup)
    assert meta["dit"]["finished"]
    assert meta["dit"]["step"] == 12
    assert "motions read from the text with weight 0.1" in meta["dit"]["how"]
    assert "raw.reader.weight" in tensors
    assert any(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert {path.name for path in backup.iterdir()} == {"weights-0.safetensors", "state.json", "samples.png"}

    program.main(["export", *common, "--work", str(tmp_path / "none"), "--out", str(out), "--check"])
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert pipe.tokenizer.model_max_length == 48
    assert pipe.vae.config.latents_mean == meta["latents_mean"]
    weight = pipe.transformer.blocks[0].attn1.to_q.weight.float()
    assert torch.equal(weight, tensors["ema.transformer.blocks.0.attn1.to_q.weight"].float())
    prompt = "a red circle bounces"
    ids = tokenize(pipe.tokenizer, [prompt])
    ours = embed_text(pipe.text_encoder, ids).float()
    theirs = pipe.encode_prompt(prompt, max_sequence_length=48)[0].float()
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)

    begin = tmp_path / "next"
    again = ["all", "--from-pipeline", str(out), "--resume", "--stages", "large", *common]
    again += ["--work", str(begin), "--backup", str(begin / "backup")]
    calls = iter(range(10**6))
    program.main(again)
    assert STOP.is_set()
    half = read_backup(begin / "backup")[1]
    assert not half["dit"]["finished"]
    STOP.clear()
    program.main(again)
    later, after = read_backup(begin / "backup")
    assert after["dit"]["finished"]
    assert after["dit"]["step"] == 12
    assert after["vae"] == {"step": 0, "elapsed": 0.0, "finished": True}
    assert after["latents_mean"] == meta["latents_mean"]
    assert after["numbers"]["vae_psnr"] == meta["numbers"]["vae_psnr"]
    assert torch.equal(later["vae.quant_conv.weight"], tensors["vae.quant_conv.weight"].bfloat16().float())
    program.main(["export", *common, "--work", str(begin), "--out", str(out)])
    told = json.loads((out / "training.json").read_text())
    assert [entry["steps"] for entry in told["rounds"]] == [
        {"vae": meta["vae"]["step"], "dit": 12},
        {"vae": 0, "dit": 12},
    ]
    assert told["steps"]["dit"] == 24
    assert told["minutes"] == pytest.approx(sum(entry["minutes"] for entry in told["rounds"]))
    assert "accuracy" not in told


def test_the_clock_of_a_run_begins_with_it(program, tmp_path):
    """Not with the import: a notebook, or a suite, may have been at work for longer than the budget."""
    folders = ["--work", str(tmp_path), "--backup", str(tmp_path / "b")]
    before = time.monotonic()
    run = program.make_run(program.parse(["all", "--smoke", "--device", "cpu", "--workers", "1", *folders]), Ranks())
    run.workers.shutdown()
    assert run.began >= before
    assert run.spent() <= (time.monotonic() - before) / 60


def test_again_restarts_a_finished_round_and_goes_on_with_an_unfinished_one(program, tmp_path):
    common = ["--smoke", "--device", "cpu", "--workers", "1", "--work", str(tmp_path), "--backup", str(tmp_path / "b")]
    done = {"elapsed": 1.0, "finished": True, "lr": 1e-3, "how": "AdamW at 0.001"}
    meta = {
        "vae": done | {"step": 4},
        "dit": done | {"step": 12, "what": "12 steps"},
        "sizes": asdict(SMOKE_SIZES),
        "device": "CPU",
        "spent": 1.0,
    }
    torch.save({"meta": meta, "tensors": {}}, tmp_path / "checkpoint.pt")
    (tmp_path / "pools.pt").touch()
    again = program.parse(["all", "--resume", "--again", "--keep-vae", *common])
    run = program.make_run(again, Ranks())
    run.workers.shutdown()
    assert [entry["steps"] for entry in run.meta["rounds"]] == [{"vae": 4, "dit": 12}]
    assert run.meta["vae"]["finished"]
    assert run.meta["dit"] == {"step": 0, "elapsed": 0.0, "finished": False}
    assert not (tmp_path / "pools.pt").exists()
    run.meta["dit"]["step"] = 3
    run.save()
    run = program.make_run(again, Ranks())
    run.workers.shutdown()
    assert run.meta["dit"]["step"] == 3
    assert len(run.meta["rounds"]) == 1


def test_what_does_not_go_together_is_refused(program, tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.parse(["all", "--keep-vae"])
    assert "give both, or neither" in capsys.readouterr().err
    assert program.main(["export", "--work", str(tmp_path), "--backup", str(tmp_path), "--device", "cpu"]) == 2
    assert "export needs a trained DiT" in capsys.readouterr().err
    for options, said in (
        (["--backup", f"{__file__}/backup"], "is not a folder; choose another folder"),
        (["--restore", str(tmp_path / "none")], "state.json is missing"),
    ):
        assert program.main(["all", "--smoke", "--device", "cpu", "--work", str(tmp_path / "w"), *options]) == 2
        assert said in capsys.readouterr().err


def test_help_shows_every_command_as_it_is_typed(program):
    """A lone backslash at the end of a line joins it to the next."""
    assert max(map(len, program.__doc__.splitlines())) <= 120


def test_rows_that_the_card_cannot_take_are_one_line_and_change_nothing(program, tmp_path, capsys):
    (tmp_path / "training.json").write_text("{}")
    rows = tmp_path / "rows.csv"
    for text, said in (("a,b\n1,2\n", "has no column colour_right"), ("", "has no column"), (None, "cannot be read")):
        rows.unlink(missing_ok=True) if text is None else rows.write_text(text)
        assert program.main(["card", "--out", str(tmp_path), "--rows", str(rows)]) == 2
        assert said in capsys.readouterr().err
    for text, said in (('{"a":', "cannot be read"), ("[]", "must hold a JSON object")):
        (tmp_path / "training.json").write_text(text)
        assert program.main(["card", "--out", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
        assert (tmp_path / "training.json").read_text() == text
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("decay-share", "2"),
        ("pairs", "1.5"),
        ("long-share", "1.5"),
        ("binding", "-0.1"),
        ("lr", "nan"),
        ("shift", "-1"),
        ("budget-minutes", "0"),
        ("device", "nonsense"),
        ("ema", "2"),
        ("kl", "nan"),
        ("workers", "-1"),
        ("vae-minutes", "nan"),
        ("stop-after-minutes", "nan"),
        ("save-seconds", "-1"),
    ],
)
def test_what_would_train_to_nothing_is_refused(program, option, value, capsys):
    with pytest.raises(SystemExit):
        program.parse(["all", f"--{option}={value}"])
    assert f"--{option} must" in capsys.readouterr().err
