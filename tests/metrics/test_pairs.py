"""Folders compared video by video: where frames come from, what the rows hold, and going on after failures."""

import footage
import pytest
import torch

from videosparse.metrics import pairs
from videosparse.metrics.fidelity import psnr, ssim
from videosparse.metrics.pairs import score_pairs
from videosparse.metrics.vbench.ledger import Ledger
from videosparse.metrics.video import as_video, read_video, save_raw
from videosparse.mp4 import decode_again


def noisy(video, amount=0.05):
    noise = amount * torch.randn(video.unit().shape, generator=torch.Generator().manual_seed(1))
    return as_video((video.unit() + noise).clamp(0, 1), video.fps)


@pytest.fixture
def folders(tmp_path):
    """One video in both folders, decoded and raw."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    clean = footage.pan(2, frames=8)
    for folder, video in ((mine, noisy(clean)), (theirs, clean)):
        footage.save(folder, video, "a-0.mp4")
        save_raw(folder / "a-0.safetensors", video, video.unit().mean(dim=1)[None])
    return mine, theirs


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl", {})


def test_raw_frames_where_both_have_them(folders, ledger):
    mine, theirs = folders
    found = score_pairs(mine, theirs, ledger)
    assert found.failures == []
    (row,) = found.rows
    assert set(row) <= set(pairs.COLUMNS)
    assert (row["video"], row["frames_from"], row["convention"]) == ("a-0", "raw", "videosparse")
    a, b = (read_video(folder / "a-0.safetensors").unit() for folder in folders)
    assert row["psnr"] == pytest.approx(float(psnr(a, b).mean()))
    assert row["worst_ssim"] == pytest.approx(float(ssim(a, b).min()))
    assert row["psnr_q4"] == pytest.approx(float(psnr(a, b)[6:].mean()))
    assert row["latent_l1"] > 0
    assert row["worst_latent_l1"] >= row["latent_l1"]
    assert "lpips" not in row


def test_decoded_frames(folders, ledger):
    mine, theirs = folders
    (row,) = score_pairs(mine, theirs, ledger, decoded=True, convention="svg").rows
    a, b = (read_video(folder / "a-0.mp4").unit() for folder in folders)
    assert (row["frames_from"], row["convention"]) == ("decoded", "svg")
    assert row["psnr"] == pytest.approx(float(psnr(a, b, "svg").mean()))
    # where one folder has raw frames only, they go through a file, too
    (theirs / "a-0.mp4").unlink()
    (row,) = score_pairs(mine, theirs, ledger, decoded=True).rows
    b = decode_again(read_video(theirs / "a-0.safetensors").unit(), 16)
    assert row["psnr"] == pytest.approx(float(psnr(a, b).mean()))


def test_latents_of_generate_go_with_decoded_frames(folders, ledger):
    """`videosparse generate --save-latents` leaves them beside its mp4."""
    from videosparse.generation.latents import save_latents

    for number, folder in enumerate(folders):
        save_latents(folder / "a-0.safetensors", torch.full((1, 8, 2, 4, 4), 1.0 + number), {})
        save_latents(folder / "alone.safetensors", torch.ones(1, 8, 2, 4, 4), {})
    found = score_pairs(*folders, ledger)
    assert found.failures == []
    (row,) = found.rows
    assert (row["frames_from"], row["latent_l1"]) == ("decoded", 0.5)


def test_a_perceptual_distance(folders, ledger):
    mine, theirs = folders
    (row,) = score_pairs(mine, theirs, ledger, perceptual=lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))).rows
    assert 0 < row["lpips"] <= row["worst_lpips"]


def test_it_goes_on_where_it_was(folders, ledger, monkeypatch):
    mine, theirs = folders
    first = score_pairs(mine, theirs, ledger)
    monkeypatch.setattr(pairs, "read_video", lambda path: pytest.fail("computed again"))
    assert score_pairs(mine, theirs, Ledger(ledger.path, {})).rows == first.rows


def test_failures_are_named_and_the_rest_goes_on(folders, ledger):
    mine, theirs = folders
    footage.save(mine, footage.pan(2), "lonely-0.mp4")
    footage.save(mine, footage.pan(2, frames=9), "long-0.mp4")
    footage.save(theirs, footage.pan(2, frames=8), "long-0.mp4")
    for folder in folders:
        (folder / "broken-0.mp4").write_bytes(b"no")
    told = []
    found = score_pairs(mine, theirs, ledger, progress=lambda *state: told.append(state))
    assert [row["video"] for row in found.rows] == ["a-0"]
    assert len(found.failures) == 3
    broken, lonely, long = found.failures
    assert broken.startswith("broken-0.mp4: cannot be read")
    assert lonely == f"lonely-0.mp4: {theirs} has no video of that name."
    assert long == "long-0: has 9 frames of 64x64, its reference 8 frames of 64x64; only equal ones can be compared."
    assert told[0][1:] == (0, 4)
    assert told[-1] == ("", 4, 4)


def test_links_to_nowhere_are_named_and_the_rest_goes_on(folders, ledger):
    mine, theirs = folders
    for name in ("dangling-0.mp4", "raw-0.safetensors"):
        for folder in folders:
            (folder / name).symlink_to("nowhere")
    (mine / "loop-0.mp4").symlink_to("loop-0.mp4")
    (theirs / "loop-0.mp4").write_bytes((theirs / "a-0.mp4").read_bytes())
    found = score_pairs(mine, theirs, ledger)
    assert [row["video"] for row in found.rows] == ["a-0"]
    dangling, loop, raw = found.failures
    assert dangling == "dangling-0.mp4: cannot be read (No such file or directory)."
    assert loop == "loop-0.mp4: cannot be read (Too many levels of symbolic links)."
    assert raw.startswith("raw-0.safetensors: is no file of raw frames (No such file or directory")


def test_an_unknown_convention(folders, ledger):
    with pytest.raises(ValueError, match="Unknown convention 'mine'; known are videosparse, svg, fastvideo"):
        score_pairs(*folders, ledger, convention="mine")
