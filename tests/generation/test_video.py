"""Video files: what is written can be read back."""

import pytest
import torch

from videosparse.generation.video import DIVIDER, Mp4Writer, read_mp4, side_by_side, to_uint8, write_mp4


def ramp(frames, height, width):
    """A smooth video [frames, 3, height, width] that compresses well."""
    x = torch.linspace(0, 1, width).expand(frames, 3, height, width)
    t = torch.linspace(0, 0.5, frames)[:, None, None, None]
    return (x * 0.5 + t).contiguous()


def test_to_uint8_rounds_and_clamps():
    video = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_round_trip(tmp_path, height, width):
    video = ramp(5, height, width)
    write_mp4(tmp_path / "a.mp4", video, fps=16)
    back = read_mp4(tmp_path / "a.mp4")
    assert list(back.shape) == [5, 3, height + height % 2, width + width % 2]
    assert float((back[..., :height, :width] - video).abs().mean()) < 0.02


@pytest.mark.parametrize("fps", [16, 23.976])
def test_codec_format_and_rate(tmp_path, fps):
    av = pytest.importorskip("av")
    write_mp4(tmp_path / "a.mp4", ramp(5, 32, 32), fps)
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
        assert stream.frames == 5


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 136), (128, 128)])
def test_the_same_video_gives_the_same_file(tmp_path, height, width):
    """With x264's defaults it does not: see `video._X264`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(9, 3, 8, 8, generator=generator)
    video = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    files = set()
    for i in range(6):
        waste = [torch.rand(5000 + 777 * i) for _ in range(50)]
        write_mp4(tmp_path / "a.mp4", video, 16)
        files.add((tmp_path / "a.mp4").read_bytes())
        del waste
    assert len(files) == 1


def test_side_by_side():
    left, right = torch.zeros(2, 3, 4, 6), torch.full((2, 3, 4, 6), 0.5)
    both = side_by_side(left, right)
    assert list(both.shape) == [2, 3, 4, 12 + DIVIDER]
    assert torch.equal(both[..., :6], left)
    assert torch.equal(both[..., -6:], right)
    assert bool((both[..., 6:-6] == 1).all())


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"one shape.*same num_frames, height and width"):
        side_by_side(torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 4, 4))
    with pytest.raises(ValueError, match=r"frames, 3, height, width.*output_type"):
        write_mp4(tmp_path / "a.mp4", torch.zeros(2, 4, 4, 3), 16)


def test_frames_of_another_size_are_refused(tmp_path):
    """The encoder would squeeze them into the first size."""
    message = r"must have one size \(got 16x32 after 16x16\); use a file for each"
    with Mp4Writer(tmp_path / "a.mp4", 8) as file:
        file.add(torch.zeros(1, 3, 16, 16))
        with pytest.raises(ValueError, match=message):
            file.add(torch.zeros(1, 3, 16, 32))
    assert len(read_mp4(tmp_path / "a.mp4")) == 1
