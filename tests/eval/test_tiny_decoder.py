"""The decoder of the embedded model's VAE, trained alone beside a round and put together with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from eval_programs import load

pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file

from videosparse.training.tiny import decoder_phase
from videosparse.training.tiny.checkpoint import read_backup
from videosparse.training.tiny.decoder_phase import DECODER, DecoderStep
from videosparse.training.tiny.pools import to_video
from videosparse.training.tiny.ranks import Ranks
from videosparse.training.tiny.state import STOP
from videosparse.training.tiny.vae_phase import finish_vae

SMOKE = ["--smoke", "--device=cpu", "--workers=1", "--stages=mixed"]


@pytest.fixture(scope="module")
def program():
    return load("train_tiny_model")


def in_folder(folder: Path) -> list[str]:
    return [f"--work={folder / 'work'}", f"--backup={folder / 'backup'}"]


@pytest.fixture(scope="module")
def trained(program, tmp_path_factory):
    """A round, and a decoder that was stopped and then finished: their backups, and the one that was stopped."""
    folder = tmp_path_factory.mktemp("decoder")
    STOP.clear()
    assert program.main(["all", *SMOKE, *in_folder(folder / "round")]) == 0
    before = snapshot(folder / "round")
    begin = [
        "decoder",
        *SMOKE,
        "--vae-lr=5e-3",
        f"--restore={folder / 'round' / 'backup'}",
        *in_folder(folder / "alone"),
    ]
    calls, step = iter(range(100)), DecoderStep.__call__

    def stop_soon(self):
        # eleven steps are only timed
        if next(calls) == 12:
            STOP.set()
        return step(self)

    DecoderStep.__call__ = stop_soon
    try:
        assert program.main(begin) == 0
    finally:
        DecoderStep.__call__ = step
        STOP.clear()
    shutil.copytree(folder / "alone" / "backup", folder / "stopped")
    # only its first call needs to be told what it starts from
    assert program.main([part for part in begin if "--restore" not in part]) == 0
    assert snapshot(folder / "round") == before, "the other run is not disturbed"
    return folder / "round" / "backup", folder / "alone" / "backup", folder / "stopped"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_decoder_learns_and_a_stopped_training_goes_on(trained):
    whole, alone, stopped = (read_backup(folder) for folder in trained)
    assert {name for name in whole[0] if name.startswith("vae.")} == set(alone[0]) == set(stopped[0])
    for name, tensor in alone[0].items():
        assert torch.equal(tensor, whole[0][name]) != name.startswith(DECODER), name
    half, told = stopped[1]["decoder"], alone[1]["decoder"]
    assert (half["step"], half["finished"], told["step"], told["finished"]) == (2, False, 4, True)
    assert told["psnr_before"] == half["psnr_before"] == whole[1]["numbers"]["vae_psnr"], "the same held-out clips"
    assert half["psnr"] != half["psnr_before"], "a stopped training says how good it is"
    assert "dit" not in alone[1]


def test_latents_are_those_of_the_pools(program, trained, monkeypatch):
    """Means of the posteriors, of clips as long as the DiT's, which the VAE did not see."""
    monkeypatch.chdir(trained[0])
    args = program.parse(["decoder", *SMOKE, f"--restore={trained[0]}", "--work=none", "--backup=nowhere"])
    run = program.make_run(args, Ranks())
    run.vae = decoder_phase.build_vae(run.plan.sizes)
    run.load_into(run.vae, "vae.")
    finish_vae(run)
    pairs, held = decoder_phase.make_pairs(run)
    run.workers.shutdown()
    assert pairs.clips.shape == (8, 3, 13, 32, 32)
    assert held[32].shape == (4, 3, 25, 32, 32)
    means = run.vae.encode(to_video(pairs.clips)).latent_dist.mode()
    torch.testing.assert_close(pairs.latents.float(), means.bfloat16().float(), atol=1e-2, rtol=1e-2)
    assert not torch.equal(pairs.clips[:4], held[32][:, :, :13])


def export(program, out: Path, backup: Path, decoder: Path) -> int:
    return program.main(
        ["export", *SMOKE, f"--work={out}-none", f"--backup={backup}", f"--decoder={decoder}", f"--out={out}"]
    )


def better(source: Path, folder: Path, gain: float = 1.0) -> Path:
    """A decoder's backup whose numbers say that it gained so many dB."""
    shutil.copytree(source, folder)
    state = json.loads((folder / "state.json").read_text())
    state["decoder"]["psnr"] = {name: value + gain for name, value in state["decoder"]["psnr_before"].items()}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_export_takes_the_decoder_of_the_other(program, trained, tmp_path):
    whole, alone, _ = trained
    assert export(program, tmp_path / "out", whole, better(alone, tmp_path / "better")) == 0
    vae = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    rounds, decoders = read_backup(whole)[0], read_backup(alone)[0]
    for name, tensor in vae.items():
        right = decoders if f"vae.{name}".startswith(DECODER) else rounds
        assert torch.equal(tensor, right[f"vae.{name}"].bfloat16()), name
    told = json.loads((tmp_path / "out" / "training.json").read_text())
    assert told["steps"] == {"vae": 4, "dit": 12, "decoder": 4}
    assert told["minutes"] == pytest.approx(read_backup(whole)[1]["spent"], abs=0.01), "not counted twice"
    assert "beside the DiT, on another CPU, 4 steps" in told["rounds"][-1]["what"]
    before = told["vae_psnr_before_decoder"]
    assert told["vae_psnr"]["32_objects"] == pytest.approx(before["32_objects"] + 1.0)


def test_export_refuses_a_decoder_that_does_not_fit(program, trained, tmp_path, capsys):
    whole, alone, _ = trained
    wrong = {"no backup": tmp_path, "of another command": whole, "another encoder": better(alone, tmp_path / "other")}
    wrong["must draw objects better"] = better(alone, tmp_path / "worse", 0.0)
    weights = load_file(wrong["another encoder"] / "weights-0.safetensors")
    weights["vae.quant_conv.bias"] += 1e-6
    save_file(weights, wrong["another encoder"] / "weights-0.safetensors")
    messages = []
    for folder in wrong.values():
        assert export(program, tmp_path / "out", whole, folder) == 2
        messages.append(capsys.readouterr().err)
    for words, message in zip(["not a backup of", *list(wrong)[1:]], messages, strict=True):
        assert words in message
        assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_states_of_a_round_and_of_a_decoder_are_not_mixed_up(program, trained, tmp_path, capsys):
    whole, alone, _ = trained
    place = [f"--work={tmp_path / 'none'}"]
    assert program.main(["export", *SMOKE, *place, f"--backup={alone}", f"--out={tmp_path / 'out'}"]) == 2
    assert "holds no more than a VAE" in capsys.readouterr().err
    assert program.main(["decoder", *SMOKE, *place, f"--backup={whole}", f"--restore={alone}"]) == 2
    assert "give folders of its own" in capsys.readouterr().err
    assert program.main(["decoder", *SMOKE, *place, f"--backup={tmp_path / 'b'}"]) == 2
    assert "needs a finished VAE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["decoder", "--again"], "leave them out"),
        (["all", "--decoder=x"], "--decoder is for export"),
        (["decoder", "--restore=x", "--backup=x"], "not be the folder that is written"),
        (["decoder", "--vae-steps=0"], "--vae-steps must be a positive number"),
    ],
)
def test_what_does_not_go_together_is_refused(program, given, words, capsys):
    with pytest.raises(SystemExit):
        program.parse(given)
    assert words in capsys.readouterr().err
