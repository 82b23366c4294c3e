"""Videos and the files they come from: what is taken, and one clear line about what is not."""

import os
from fractions import Fraction
from pathlib import Path

import footage
import numpy as np
import pytest
import torch

from videosparse.metrics.video import (
    Video,
    VideoError,
    as_video,
    find_videos,
    probe_size,
    read_latents,
    read_video,
    save_raw,
)


def test_tensors_with_channels_first_or_last():
    first = torch.rand(3, 3, 8, 10)
    for tensor in (first, first.permute(0, 2, 3, 1)):
        video = as_video(tensor, 16)
        assert torch.equal(video.unit(), first)
        assert (len(video), video.size, video.seconds) == (3, (8, 10), 3 / 16)
    assert torch.equal(video.levels(), (first * 255).round().byte().permute(0, 2, 3, 1))
    assert torch.equal(as_video(video.levels(), 16).unit(), (first * 255).round() / 255)
    assert torch.equal(video.part(1, 3).frames, video.frames[1:3])


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (torch.zeros(4, 8, 8), 16, r"must be \[frames, height, width, 3\]"),
        (torch.zeros(4, 8, 8, 4), 16, r"must be \[frames, height, width, 3\]"),
        (torch.zeros(4, 0, 8, 3), 16, "none 0"),
        (torch.zeros(1, 8, 8, 3), 16, r"v: has 1 frame\(s\); at least 2 are needed"),
        (torch.zeros(0, 8, 8, 3), 16, r"has 0 frame\(s\)"),
        (torch.zeros(2, 8, 8, 3), 0, "frame rate must be positive"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.int32), 16, r"must be uint8, or floating in \[0, 1\]"),
        (torch.tensor([0.0, float("nan")]).view(2, 1, 1, 1).expand(2, 8, 8, 3), 16, "v: frame 1 holds NaN"),
        (torch.full((2, 8, 8, 3), 255.0), 16, "frame 0 must lie in .* divide levels by 255"),
    ],
)
def test_what_is_no_video(frames, fps, message):
    with pytest.raises(VideoError, match=message):
        Video(frames, fps, "v")


def test_a_decoded_file(tmp_path):
    video = footage.pan(2)
    back = read_video(footage.save(tmp_path, video, "a-0.mp4"))
    assert (back.fps, back.size, len(back), back.name) == (16, (64, 64), 17, "a-0.mp4")
    assert back.frames.dtype == torch.uint8
    assert (back.unit() - video.unit()).abs().mean() < 0.04  # yuv420p halves the resolution of colours
    assert probe_size(tmp_path / "a-0.mp4") == (64, 64)


def test_raw_frames_come_back_as_they_were(tmp_path):
    video, latents = footage.pan(2), torch.randn(8, 5, 4, 4)
    save_raw(tmp_path / "a-0.safetensors", video, latents)
    back = read_video(tmp_path / "a-0.safetensors")
    assert torch.equal(back.frames, video.frames)
    assert back.fps == 16
    assert torch.equal(read_latents(tmp_path / "a-0.safetensors"), latents)
    assert probe_size(tmp_path / "a-0.safetensors") == (64, 64)
    save_raw(tmp_path / "a-0.safetensors", video)
    assert read_latents(tmp_path / "a-0.safetensors") is None


def write_images(path, sizes):
    """A file of frames of several sizes: a stream of images, each with its own header."""
    import av

    with av.open(str(path), "w", format="matroska") as file:
        stream = file.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for number, size in enumerate(sizes):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuvj420p"
            encoder.time_base = Fraction(1, 16)
            frame = av.VideoFrame.from_ndarray(np.zeros((size[1], size[0], 3), np.uint8), format="rgb24")
            for packet in encoder.encode(frame.reformat(format="yuvj420p")):
                packet.stream, packet.pts, packet.dts = stream, number, number
                file.mux(packet)


def test_files_that_cannot_be_read(tmp_path):
    junk = tmp_path / "junk-0.mp4"
    junk.write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"^junk-0.mp4: cannot be read \(Invalid data"):
        read_video(junk)
    junk.write_bytes(b"")
    with pytest.raises(VideoError, match=r"^junk-0.mp4: is empty; it has no bytes"):
        read_video(junk)
    whole = footage.save(tmp_path, footage.pan(2), "cut-0.mp4").read_bytes()
    (tmp_path / "cut-0.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"^cut-0.mp4: cannot be read"):
        read_video(tmp_path / "cut-0.mp4")
    with pytest.raises(VideoError, match=r"^absent.mp4: cannot be read \(No such file"):
        read_video(tmp_path / "absent.mp4")
    (tmp_path / "link-0.mp4").symlink_to("nowhere.mp4")
    with pytest.raises(VideoError, match=r"^link-0.mp4: cannot be read \(No such file"):
        read_video(tmp_path / "link-0.mp4")
    write_images(tmp_path / "mixed-0.mkv", [(32, 32), (32, 32), (48, 32)])
    with pytest.raises(VideoError, match=r"^mixed-0.mkv: its frames have mixed sizes \(32x32 and 32x48\)"):
        read_video(tmp_path / "mixed-0.mkv")
    (tmp_path / "raw-0.safetensors").write_bytes(b"no")
    with pytest.raises(VideoError, match=r"^raw-0.safetensors: is no file of raw frames"):
        read_video(tmp_path / "raw-0.safetensors")
    assert probe_size(junk) is None
    assert probe_size(tmp_path / "raw-0.safetensors") is None


def test_a_file_that_may_not_be_looked_at(tmp_path, monkeypatch):
    """As a link into a folder of somebody else's."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(VideoError, match=r"^link-0.mp4: cannot be read \(Permission denied\)"):
        read_video(tmp_path / "link-0.mp4")


def test_a_sound_file_has_no_video(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(VideoError, match="has no video stream"):
        read_video(tmp_path / "sound.mp4")


def test_a_container_without_frames(tmp_path):
    import av

    with av.open(str(tmp_path / "empty.mkv"), "w") as file:
        stream = file.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        file.start_encoding()
    with pytest.raises(VideoError, match=r"empty.mkv: is empty; it has no frames"):
        read_video(tmp_path / "empty.mkv")


def test_raw_frames_without_a_rate(tmp_path):
    from safetensors.torch import save_file

    save_file({"video": torch.zeros(3, 8, 8, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(VideoError, match="metadata tell no frame rate"):
        read_video(tmp_path / "a.safetensors")


def test_finding_videos(tmp_path):
    for name in ("b-0.mp4", "a-0.mp4", "a-0.safetensors", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "scores").mkdir()
    found = find_videos(tmp_path)
    assert list(found) == ["a-0", "b-0"]
    assert set(found["a-0"]) == {"decoded", "raw"}
    (tmp_path / "a-0.gif").write_bytes(b"")
    with pytest.raises(VideoError, match=r"a-0.mp4 and a-0.gif are of one name"):
        find_videos(tmp_path)
    with pytest.raises(VideoError, match="no such folder"):
        find_videos(tmp_path / "absent")
    with pytest.raises(VideoError, match=r"notes.txt: is a file; expected a folder that holds videos"):
        find_videos(tmp_path / "notes.txt")
    with pytest.raises(VideoError, match="holds no videos"):
        find_videos(tmp_path / "scores")


def test_both_videos_side_by_side_are_none_to_judge(tmp_path):
    for name in ("a.mp4", "a-dense.mp4", "a-compare.mp4", "b-compare.mp4"):
        (tmp_path / name).touch()
    assert list(find_videos(tmp_path)) == ["a-dense", "a", "b-compare"]


def test_a_name_that_tables_cannot_hold_is_told_before_anything_is_scored(tmp_path):
    (tmp_path / os.fsdecode(b"b\xff-0.mp4")).touch()
    with pytest.raises(VideoError, match=r"^b\\udcff-0.mp4 in .* rename it"):
        find_videos(tmp_path)
