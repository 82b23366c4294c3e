"""Decoding as a stream: the frames of the stock decode, without ever holding them all."""

import weakref
from contextlib import suppress
from pathlib import Path
from pipes import hunyuan, mochi, wan, wan22_5b, wan_vae

import pytest
import torch

from videosparse.generation import GenerationError, video_place
from videosparse.generation import streaming as module
from videosparse.generation.streaming import decode_stream, stream_to, streaming
from videosparse.generation.video import Mp4Writer, read_mp4, write_mp4

# name: pipeline, channels, latent frames, rows and columns of latents, tiled
CASES = {
    "wan": (wan, 16, 6, 4, False),
    "wan, one frame": (wan, 16, 1, 4, False),
    "wan 2.2, patches": (wan22_5b, 48, 4, 4, False),
    "hunyuan": (hunyuan, 4, 11, 4, False),
    "hunyuan, ends with a tile of one": (hunyuan, 4, 10, 4, False),
    "hunyuan, short": (hunyuan, 4, 4, 4, False),
    "hunyuan, tiled": (hunyuan, 4, 6, 5, True),
    "mochi": (mochi, 12, 5, 4, False),
    "mochi, one frame": (mochi, 12, 1, 4, False),
    "mochi, tiled": (mochi, 12, 3, 5, True),
}

TILES = ("min", 32), ("stride", 24)


@pytest.fixture(scope="module")
def vaes():
    return {}


def stock(vae, latents):
    from diffusers.video_processor import VideoProcessor

    with torch.no_grad():
        return VideoProcessor().postprocess_video(vae.decode(latents, return_dict=False)[0], "pt")[0]


def equal(vae, parts, expected):
    """Bit by bit; for Mochi, whose convolutions see other lengths than at once, to the rounding of double precision."""
    video = torch.cat(parts)
    assert video.shape == expected.shape
    assert video.dtype == expected.dtype
    if type(vae).__name__ == "AutoencoderKLMochi":
        assert vae.dtype == torch.float64
        torch.testing.assert_close(video, expected, rtol=0, atol=1e-12)
    else:
        assert torch.equal(video, expected)


@pytest.fixture
def case(request, vaes):
    """(vae, latents) of a case."""
    build, channels, frames, size, tiled = CASES[request.param]
    if build not in vaes:
        vaes[build] = build().vae
    vae = vaes[build].double() if build is mochi else vaes[build]
    vae.disable_tiling()
    if tiled:
        vae.enable_tiling(
            **{f"tile_sample_{kind}_{side}": size for kind, size in TILES for side in ("height", "width")}
        )
    torch.manual_seed(0)
    return vae, torch.randn(1, channels, frames, size, size, dtype=vae.dtype)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_the_frames_are_those_of_the_stock_decode(case):
    vae, latents = case
    expected = stock(vae, latents)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vae.modules())
    switches = dict(vars(vae))
    parts = []
    decode_stream(vae, latents, parts.append)
    equal(vae, parts, expected)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vae.modules()) == hooks
    for name in ("use_framewise_decoding", "drop_last_temporal_frames", "use_tiling"):
        assert switches.get(name) == vars(vae).get(name)
    assert torch.equal(stock(vae, latents), expected)


@pytest.mark.parametrize("case", ["wan", "hunyuan", "mochi"], indirect=True)
def test_only_a_part_of_the_video_is_alive(case):
    """However long it is: at every part, what came two parts before is gone."""
    vae, latents = case
    latents = latents.repeat(1, 1, 4, 1, 1)
    alive, longest, most, total = [], 0, 0, 0

    def sink(part):
        nonlocal longest, most, total
        total += len(part)
        longest = max(longest, len(part))
        alive.append(weakref.ref(part.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in alive))

    decode_stream(vae, latents, sink)
    assert longest <= 13
    assert most <= 2
    assert total > 50


def test_a_pipeline_streams_into_the_file_that_it_would_have_filled(tmp_path):
    pipe = wan()
    pipe.set_progress_bar_config(disable=True)

    def run(**more):
        return pipe(
            "dance monkey", num_frames=9, height=32, width=32, num_inference_steps=2, max_sequence_length=16,
            generator=torch.Generator().manual_seed(0), **more,
        ).frames  # fmt: skip

    write_mp4(tmp_path / "whole.mp4", run(output_type="pt")[0], 16)
    with stream_to(pipe, tmp_path / "new" / "streamed.mp4", fps=16):
        frames = run()
    assert frames.shape[:2] == (1, 0)
    assert (tmp_path / "new" / "streamed.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert "decode" not in vars(pipe.vae)
    assert run(output_type="pt")[0].shape[0] == 9


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_stream_leaves_nothing(tmp_path, monkeypatch, error):
    pipe, written = wan(), []

    def interrupt(part):
        written.append(part)
        if len(written) == 2:
            raise error

    add = Mp4Writer.add
    monkeypatch.setattr(Mp4Writer, "add", lambda self, part: (add(self, part), interrupt(part)))
    with pytest.raises(error), stream_to(pipe, tmp_path / "a.mp4", fps=16):
        pipe.vae.decode(torch.zeros(1, 16, 3, 4, 4))
    assert list(tmp_path.iterdir()) == []
    assert "decode" not in vars(pipe.vae)


def test_a_failing_sink_leaves_the_vae_as_it_was():
    def fail(part):
        raise OSError("disk full")

    for build, channels, frames in ((wan, 16, 3), (hunyuan, 4, 7), (mochi, 12, 4)):
        vae = build().vae.double()
        latents = torch.randn(1, channels, frames, 4, 4, dtype=torch.float64)
        with pytest.raises(OSError, match="disk full"):
            decode_stream(vae, latents, fail)
        parts = []
        decode_stream(vae, latents, parts.append)
        equal(vae, parts, stock(vae, latents))


def test_nothing_generated(tmp_path):
    with pytest.raises(ValueError, match="no frame to write"), stream_to(wan(), tmp_path / "a.mp4", fps=16):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which even root cannot write")
def test_a_folder_that_cannot_be_written_is_told_before_the_work():
    with pytest.raises(GenerationError, match="Cannot write to /proc"), stream_to(wan(), "/proc/a.mp4", fps=16):
        pytest.fail("the work began")


def test_two_streams_do_not_collide(tmp_path):
    pipe = wan()

    def stream(output, **more):
        with stream_to(pipe, output, fps=16, **more) as video:
            pipe.vae.decode(torch.zeros(1, 16, 2, 4, 4))
        return video.path

    assert stream(tmp_path / "a.mp4") == tmp_path / "a.mp4"
    with pytest.raises(GenerationError, match=r"a\.mp4 exists"), stream_to(pipe, tmp_path / "a.mp4", fps=16):
        pytest.fail("the work began")
    assert stream(tmp_path / "a.mp4", overwrite=True) == tmp_path / "a.mp4"
    place = video_place(tmp_path, "a cat", 3, "radial")
    assert [stream(place).name for _ in range(2)] == ["a-cat-3-radial.mp4", "a-cat-3-radial-2.mp4"]
    assert len(list(tmp_path.iterdir())) == 3


def test_an_error_of_the_block_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises(OSError, match="no such image"), stream_to(wan(), tmp_path / "new" / "a.mp4", fps=16):
        raise OSError("no such image")
    assert list(tmp_path.iterdir()) == []


def test_refusals(monkeypatch):
    pipe = wan()
    with pytest.raises(ValueError, match="One video is decoded at a time"):
        decode_stream(pipe.vae, torch.zeros(2, 16, 1, 4, 4), print)
    pipe.vae.enable_tiling()
    with pytest.raises(NotImplementedError, match="tiled Wan VAE"), streaming(pipe, print):
        pass
    vae = mochi().vae
    vae.use_framewise_decoding = True
    with pytest.raises(NotImplementedError, match="framewise decoding"):
        decode_stream(vae, torch.zeros(1, 12, 1, 4, 4), print)
    with pytest.raises(NotImplementedError, match="Linear is not one of"):
        decode_stream(torch.nn.Linear(1, 1), torch.zeros(1, 1, 1, 1, 1), print)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(NotImplementedError, match=r"not tested with diffusers 0\.99"):
        decode_stream(wan_vae(), torch.zeros(1, 16, 1, 4, 4), print)


def test_a_second_video_is_refused_and_the_first_is_kept(tmp_path):
    pipe = wan()
    latents = torch.zeros(1, 16, 2, 4, 4)

    def two():
        with stream_to(pipe, tmp_path / "a.mp4", fps=16):
            pipe.vae.decode(latents)
            pipe.vae.decode(latents)

    with pytest.raises(GenerationError, match=r"writes one video.*the first is .*a\.mp4; open a block for each"):
        two()
    assert len(read_mp4(tmp_path / "a.mp4")) == 5
    assert "decode" not in vars(pipe.vae)


@pytest.mark.parametrize("again", [True, False])
def test_a_video_that_was_cut_off_is_not_published(tmp_path, again):
    """Whether the block tries again, or goes on without it."""
    pipe = wan()
    latents, calls = torch.zeros(1, 16, 3, 4, 4), []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError

    def cut():
        with stream_to(pipe, tmp_path / "a.mp4", fps=16):
            with suppress(torch.OutOfMemoryError):
                pipe.vae.decode(latents)
            if again:
                pipe.vae.decode(latents)

    hook = pipe.vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(GenerationError, match="Decoding failed after some frames had been passed on"):
        cut()
    hook.remove()
    assert not list(tmp_path.iterdir())
    assert "decode" not in vars(pipe.vae)


def test_a_decode_that_failed_before_its_first_frame_can_be_tried_again(tmp_path):
    pipe = wan()
    with stream_to(pipe, tmp_path / "a.mp4", fps=16):
        with pytest.raises(ValueError, match="One video is decoded at a time"):
            pipe.vae.decode(torch.zeros(2, 16, 2, 4, 4))
        pipe.vae.decode(torch.zeros(1, 16, 2, 4, 4))
    assert len(read_mp4(tmp_path / "a.mp4")) == 5


def test_a_stream_in_a_stream_is_refused(tmp_path):
    pipe = wan()
    with stream_to(pipe, tmp_path / "a.mp4", fps=16):
        with (
            pytest.raises(GenerationError, match="go to a file already; leave that stream_to block first"),
            stream_to(pipe, tmp_path / "b.mp4", fps=16),
        ):
            pytest.fail("the work began")
        pipe.vae.decode(torch.zeros(1, 16, 1, 4, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_another_number_of_frames_is_told(monkeypatch):
    vae = wan_vae()
    monkeypatch.setitem(module._DECODERS, "AutoencoderKLWan", lambda vae, stock, latents, emit: None)
    with pytest.raises(RuntimeError, match="decoded 0 frames of 2 latent ones, and 5 were expected"):
        decode_stream(vae, torch.zeros(1, 16, 2, 4, 4), print)


@pytest.mark.parametrize("fps", [0, -1, 1000, float("nan"), "16", None, True])
def test_rates_that_no_file_has(tmp_path, fps):
    message = r"fps must be (a number, )?1 to 240 \(got"
    with pytest.raises(GenerationError, match=message), stream_to(wan(), tmp_path / "a.mp4", fps=fps):
        pass
    assert not list(tmp_path.iterdir())


def test_frames_that_are_not_finite_leave_no_file(tmp_path):
    pipe = wan()
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with (
        pytest.raises(GenerationError, match="not finite; check its dtype"),
        stream_to(pipe, tmp_path / "a.mp4", fps=16),
    ):
        pipe("dance monkey", num_frames=5, height=32, width=32, num_inference_steps=1, max_sequence_length=16)
    assert not list(tmp_path.iterdir())
