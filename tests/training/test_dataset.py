"""Data sets: found, encoded once, added to, and read back as the pipeline would make them."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from videosparse.generation.sources import find_model
from videosparse.generation.video import write_mp4
from videosparse.training import encoding
from videosparse.training.clips import (
    BrokenClip,
    ClipSource,
    Size,
    at_rate,
    find_clips,
    nearest_size,
    synthetic_clips,
)
from videosparse.training.config import ConfigError
from videosparse.training.dataset import FORMAT, Dataset, packed, read_about, shards, unpacked, write_shard
from videosparse.training.encoding import load_parts, prepare
from videosparse.training.families import TRAINING_FAMILIES

SIZE = Size(9, 32, 32)


@pytest.fixture
def videos(tmp_path):
    """Three good videos with captions, one too short, one broken, one without a caption."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for n, frames in enumerate((9, 12, 9, 5)):
        g = torch.Generator().manual_seed(n)
        write_mp4(folder / f"{n}.mp4", torch.rand(1, 3, 40, 48, generator=g).expand(frames, -1, -1, -1), 16)
        (folder / f"{n}.txt").write_text(f"a video {n}\n")
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "bad.txt").write_text("bad")
    write_mp4(folder / "silent.mp4", torch.rand(9, 3, 32, 32), 16)
    return folder


def encode(clips, folder, model, sizes=(SIZE,)):
    return prepare(clips, folder, str(model), sizes, device="cpu", per_shard=2)


def test_broken_videos_are_listed_and_never_fatal(videos, wan_folder, tmp_path):
    done = encode(find_clips(videos), tmp_path / "data", wan_folder)
    assert (done.encoded, done.present) == (3, 0)
    reasons = dict(done.skipped)
    assert reasons["3.mp4"] == "has 5 frames at 16 a second, and 9 are needed"
    assert "bad.mp4" in reasons
    listed = [json.loads(line) for line in (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()]
    assert {entry["video"] for entry in listed} == {"3.mp4", "bad.mp4"}
    assert not list((tmp_path / "data").glob("*.part"))


def test_preparing_again_adds_what_is_missing(videos, wan_folder, tmp_path):
    clips = [clip for clip in find_clips(videos) if clip.name[0] in "012"]
    assert encode(clips[:2], tmp_path / "data", wan_folder).encoded == 2
    again = encode(clips, tmp_path / "data", wan_folder)
    assert (again.encoded, again.present) == (1, 2)
    (videos / "0.txt").write_text("another caption")
    changed = encode([clip for clip in find_clips(videos) if clip.name == "0.mp4"], tmp_path / "data", wan_folder)
    assert (changed.encoded, changed.present) == (1, 0)
    assert sum(len(b.entries) for b in Dataset(tmp_path / "data").train) == 4


def test_latents_and_texts_are_those_of_the_pipeline(wan_folder, tmp_path):
    clips = synthetic_clips(2)
    encode(clips, tmp_path / "data", wan_folder)
    source, family = find_model(str(wan_folder)), TRAINING_FAMILIES["wan"]
    pipe = load_parts(source, torch.device("cpu"), without=("transformer", "transformer_2"))
    data = Dataset(tmp_path / "data")
    by_caption = {entry.caption: entry for entry in data.train[0].entries}
    for clip in clips:
        latents, text = data.read(by_caption[clip.caption], 9)
        expected = family.encode_video(pipe.vae, clip.read(SIZE, 16)[None])[0]
        torch.testing.assert_close(latents, expected.bfloat16().float(), rtol=0, atol=0.02)
        stock = pipe.encode_prompt(clip.caption, do_classifier_free_guidance=False, max_sequence_length=48)[0][0]
        torch.testing.assert_close(text["encoder_hidden_states"], stock.bfloat16(), rtol=0, atol=0)


def test_the_beginning_of_a_clip_has_the_latents_of_the_shorter_clip(wan_folder, tmp_path):
    encode(synthetic_clips(1), tmp_path / "data", wan_folder, (Size(5, 32, 32), Size(13, 32, 32)))
    data = Dataset(tmp_path / "data")
    short, long = sorted(data.train, key=lambda bucket: bucket.size.frames)
    torch.testing.assert_close(data.read(long.entries[0], 5)[0], data.read(short.entries[0], 5)[0])
    assert data.of_length(data.train, 5) == [short]
    assert data.of_length(data.train, 9) == [long]


def test_text_without_its_padding_comes_back():
    text = {"a": torch.zeros(6, 3), "mask": torch.tensor([1, 1, 0]), "pooled": torch.ones(4)}
    text["a"][:2] = 1.0
    stored = packed(text, torch.float32)
    assert stored["a"].shape == (2, 3)
    back = unpacked(stored)
    assert back.keys() == text.keys()
    assert all(torch.equal(back[name], value) for name, value in text.items())
    assert torch.equal(unpacked(packed({"a": torch.zeros(5, 2)}, torch.float32))["a"], torch.zeros(5, 2))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_tables_name_videos_and_captions(name, videos):
    text = (
        '{"video": "1.mp4", "caption": "from the table"}\n'
        if "json" in name
        else "video,caption\n1.mp4,from the table\n"
    )
    (videos / name).write_text(text)
    (clip,) = find_clips(videos)
    assert (clip.caption, clip.video) == ("from the table", videos / "1.mp4")
    (videos / name).write_text('{"file": 1}\n' if "json" in name else "a,b\n1,2\n")
    with pytest.raises(ConfigError, match="entry 1: expected the columns video and caption"):
        find_clips(videos)


def test_tables_of_spreadsheets(videos):
    """They begin with a byte order mark, and captions in quotes may have several lines."""
    (videos / "metadata.csv").write_text('\ufeffvideo,caption\r\n1.mp4,"a cat\nsurfing, fast"\r\n', newline="")
    (clip,) = find_clips(videos)
    assert (clip.name, clip.caption) == ("1.mp4", "a cat\nsurfing, fast")


def test_clips_go_to_the_size_of_their_shape(videos, wan_folder, tmp_path):
    sizes = [Size(9, 32, 32), Size(9, 32, 48)]
    assert nearest_size((40, 48), sizes) == Size(9, 32, 32)
    assert nearest_size((480, 832), sizes) == Size(9, 32, 48)
    video = ClipSource("0", "", videos / "0.mp4").read(Size(9, 32, 48), 16)
    assert video.shape == (3, 9, 32, 48)
    with pytest.raises(BrokenClip, match="cannot be decoded"):
        ClipSource("x", "", videos / "none.mp4").read(SIZE, 16)


@pytest.mark.parametrize(
    ("times", "fps", "expected"),
    [
        ([n / 16 for n in range(8)], 16, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([3 + n / 16 for n in range(4)], 16, [0, 1, 2, 3]),  # files may begin late
        ([n / 32 for n in range(9)], 16, [0, 2, 4, 6, 8]),
        ([n / 8 for n in range(3)], 16, [0, 0, 1, 1, 2]),  # between two, the earlier one
        ([n / 30 for n in range(12)], 24, [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]),
        ([0, 0.01, 0.02, 0.06, 0.2, 0.26, 0.25, 0.26, 0.3], 16, [0, 3, 3, 4, 5, 8]),  # varies, and goes back once
        ([0.5], 16, [0]),
        ([], 16, []),
    ],
)
def test_frames_are_picked_by_their_time_stamps(times, fps, expected):
    assert list(at_rate(zip(times, range(len(times)), strict=True), fps)) == expected


def test_videos_of_any_rate_are_brought_to_that_of_the_model(tmp_path):
    """Brightness tells which frame it was: a constant rate, and one that changes in the middle."""
    import av

    levels = torch.arange(24) / 24
    write_mp4(tmp_path / "30.mp4", levels.view(-1, 1, 1, 1).expand(-1, 3, 32, 32), 30)
    with av.open(str(tmp_path / "varying.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=90, options={"crf": "1"})
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for n, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(torch.full((32, 32, 3), level * 255).byte().numpy(), format="rgb24")
            frame.pts = 3 * n if n < 12 else 36 + 9 * (n - 12)  # 30 frames a second, then 10
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    for name, expected in (
        ("30", [0, 2, 4, 6, 7, 9, 11, 13]),
        ("varying", [0, 2, 4, 6, 7, 9, 11, 12, 13, 14, 14, 15]),
    ):
        video = ClipSource(name, "", tmp_path / f"{name}.mp4").read(Size(len(expected), 32, 32), 16)
        shown = (video.mean((0, 2, 3)) * 24).round().int().tolist()
        assert shown == expected, name
    with pytest.raises(BrokenClip, match="has 13 frames at 16 a second, and 24 are needed"):
        ClipSource("30", "", tmp_path / "30.mp4").read(Size(24, 32, 32), 16)


def test_a_data_set_has_one_rate(wan_folder, tmp_path):
    clips = synthetic_clips(1)
    encode(clips, tmp_path / "data", wan_folder)
    assert Dataset(tmp_path / "data").about["fps"] == 16
    with pytest.raises(ConfigError, match=r"encoded with another fps .16.0, now 24.0.; use another folder"):
        prepare(clips, tmp_path / "data", str(wan_folder), [SIZE], fps=24, device="cpu")
    for rate, message in ((0, "1 to 240 .got 0"), ("16", "a number, 1 to 240 .got '16'"), (True, "a number, .*True")):
        with pytest.raises(ConfigError, match=f"--fps must be {message}.; leave it out for the model's"):
            prepare(clips, tmp_path / "other", str(wan_folder), [SIZE], fps=rate, device="cpu")
    prepare(clips, tmp_path / "slow", str(wan_folder), [SIZE], fps=8, device="cpu")
    assert Dataset(tmp_path / "slow").about["fps"] == 8
    moving = synthetic_clips(6)
    assert sum(not torch.equal(clip.read(SIZE, 16), clip.read(SIZE, 8)) for clip in moving) >= 3
    assert all(torch.equal(clip.read(Size(17, 32, 32), 16)[:, ::2], clip.read(SIZE, 8)) for clip in moving)
    (tmp_path / "data" / "dataset.json").write_text('{"format": "videosparse-dataset-1"}')
    with pytest.raises(ConfigError, match="prepare it again"):
        Dataset(tmp_path / "data")


def test_the_same_clip_twice_is_encoded_once(wan_folder, tmp_path):
    clips = synthetic_clips(2)
    done = encode([*clips, *clips, clips[0]], tmp_path / "data", wan_folder)
    assert (done.encoded, done.present, done.skipped) == (2, 0, ())


def test_models_that_need_more_than_a_prompt_are_refused(wan_folder, tmp_path):
    """Training knows no first frame."""
    from videosparse.generation.errors import GenerationError

    folder = tmp_path / "i2v"
    shutil.copytree(wan_folder, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("WanPipeline", "WanImageToVideoPipeline"))
    with pytest.raises(GenerationError, match="is a WanImageToVideoPipeline, which needs"):
        encode(synthetic_clips(1), tmp_path / "data", folder)
    assert not (tmp_path / "data").exists()


def test_what_cannot_be_a_data_set(tmp_path, wan_folder):
    with pytest.raises(ConfigError, match="No folder of videos"):
        find_clips(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no video with a caption"):
        find_clips(tmp_path / "empty")
    for size, message in ((Size(10, 32, 32), "--frames must be 4k"), (Size(9, 36, 32), "The height of --size must be")):
        with pytest.raises(ConfigError, match=message):
            encode(synthetic_clips(1), tmp_path / "data", wan_folder, (size,))
    encode(synthetic_clips(2), tmp_path / "data", wan_folder)
    about = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({**about, "vae": "other"}))
    with pytest.raises(ConfigError, match="encoded with another vae"):
        encode(synthetic_clips(1), tmp_path / "data", wan_folder)
    lora = tmp_path / "data" / "pytorch_lora_weights.safetensors"
    lora.write_bytes((tmp_path / "data" / "empty.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"pytorch_lora_weights.safetensors is no part of a data set; move it"):
        Dataset(tmp_path / "data")
    lora.unlink()
    next((tmp_path / "data").glob("9x*.safetensors")).write_bytes(b"no")
    with pytest.raises(ConfigError, match="is damaged"):
        Dataset(tmp_path / "data")


def test_a_full_disk_leaves_no_part_of_a_shard(wan_folder, tmp_path, monkeypatch):
    encode(synthetic_clips(1), tmp_path / "data", wan_folder)
    before = sorted(path.name for path in (tmp_path / "data").iterdir())

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in ("dataset", "encoding"):
        with monkeypatch.context() as patch:
            patch.setattr(f"videosparse.training.{module}.write_tensors", full)
            with pytest.raises(OSError, match=r"No space left on device: '.*/data/.*safetensors'"):
                encode(synthetic_clips(2), tmp_path / "data", wan_folder)
        assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before


def test_a_video_whose_name_is_no_text_is_listed_and_never_fatal(wan_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for ending, content in (("mp4", b"no video"), ("txt", b"a caption")):
        (Path(os.fsdecode(bytes(folder))) / os.fsdecode(b"c\xff." + ending.encode())).write_bytes(content)
    (name,) = [clip.name for clip in find_clips(folder)]
    done = encode(find_clips(folder), tmp_path / "data", wan_folder)
    ((skipped, reason),) = done.skipped
    assert skipped == name == "c\\udcff.mp4"
    reason.encode()
    (line,) = (tmp_path / "data" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"video": name, "reason": reason}
    (tmp_path / "videos" / "metadata.jsonl").write_text('{"video": "d\\udcff.mp4", "caption": "\\udcff"}')
    assert [(clip.name, clip.caption) for clip in find_clips(folder)] == [(r"d\udcff.mp4", r"\udcff")]


def test_values_that_are_no_numbers_name_their_clip(wan_folder, tmp_path, monkeypatch):
    clips = synthetic_clips(3)
    video = encoding._Encoder.video
    calls = []

    def broken(self, values):
        calls.append(values)
        return video(self, values * torch.nan if len(calls) == 2 else values)

    with monkeypatch.context() as patch:
        patch.setattr(encoding._Encoder, "video", broken)
        done = encode(clips, tmp_path / "data", wan_folder)
    assert done.skipped == (("synthetic-0-1", "is encoded as NaN or infinity"),)
    data = Dataset(tmp_path / "data")
    (bucket,) = data.train
    assert all(data.read(entry, 9)[0].isfinite().all() for entry in bucket.entries)

    nan = [("key", "clip 7", "a caption", torch.full((16, 3, 4, 4), torch.nan), {})]
    shard = write_shard(tmp_path / "data", SIZE, nan, torch.float32)
    with pytest.raises(ConfigError, match=rf"clip 7 in {shard} has values that are NaN .*delete that file and prepare"):
        Dataset(tmp_path / "data")
    shard.unlink()

    def no_numbers(self, pipe, texts, length):
        return {"encoder_hidden_states": torch.full((1, 2, 3), torch.nan)}

    monkeypatch.setattr(type(TRAINING_FAMILIES["wan"]), "encode_text", no_numbers)
    with pytest.raises(ConfigError, match=r"text encoder of .* gives NaN or infinity for the caption ''; look at its"):
        encode(clips, tmp_path / "other", wan_folder)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["dataset.json"]


def test_shards_that_do_not_say_that_they_are_finite_are_read(wan_data, tmp_path):
    data = Path(shutil.copytree(wan_data, tmp_path / "data"))
    (path,) = data.glob("33x*.safetensors")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header.pop("finite") == "true"
    tensors = load_file(path)
    save_file(tensors, path, metadata=header)  # as before shards said so
    assert Dataset(data).train[0].entries
    next(x for name, x in tensors.items() if name.endswith(".latents")).view(-1)[-1] = torch.inf
    save_file(tensors, path, metadata=header)
    with pytest.raises(ConfigError, match=rf"The clip clip \d in {path} has values that are NaN or infinite"):
        Dataset(data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"time_stride": None}, "time_stride must be a number .got None.; delete it and prepare the data set again"),
        ({"fps": "16"}, "fps must be a number .got '16'."),
        ({"model": 1}, "model must be text .got 1."),
    ],
)
def test_descriptions_that_are_damaged(tmp_path, changed, message):
    about = {"format": FORMAT, "model": "m", "family": "wan", "time_stride": 4, "fps": 16.0}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    assert read_about(tmp_path) == about
    (tmp_path / "dataset.json").write_text(json.dumps(about | changed))
    with pytest.raises(ConfigError, match=rf"dataset.json is damaged: {message}"):
        read_about(tmp_path)


@pytest.mark.parametrize(
    ("size", "clips"), [("9x32", "[]"), ("9xAx32", "[]"), *(("9x32x32", bad) for bad in ("no", "[1]", '[{"key": 1}]'))]
)
def test_headers_of_shards_that_are_damaged(tmp_path, size, clips):
    save_file({"x": torch.zeros(1)}, tmp_path / "9.safetensors", metadata={"size": size, "clips": clips})
    with pytest.raises(ConfigError, match=r"9.safetensors is damaged .*; delete it and prepare the data set again"):
        list(shards(tmp_path))
