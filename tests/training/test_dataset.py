"""Data sets: found, encoded once, added to, and read back as the pipeline would make them."""

import json

import pytest
import torch

from videosparse.generation.sources import find_model
from videosparse.generation.video import write_mp4
from videosparse.training.clips import BrokenClip, ClipSource, Size, find_clips, nearest_size, synthetic_clips
from videosparse.training.config import ConfigError
from videosparse.training.dataset import Dataset, packed, unpacked
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
    assert reasons["3.mp4"] == "has 5 frames, and 9 are needed"
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
        expected = family.encode_video(pipe.vae, clip.read(SIZE)[None])[0]
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
    video = ClipSource("0", "", videos / "0.mp4").read(Size(9, 32, 48))
    assert video.shape == (3, 9, 32, 48)
    with pytest.raises(BrokenClip, match="cannot be decoded"):
        ClipSource("x", "", videos / "none.mp4").read(SIZE)


def test_models_that_need_more_than_a_prompt_are_refused(wan_folder, tmp_path):
    """Training knows no first frame."""
    import shutil

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
    with pytest.raises(ValueError, match="num_frames must be 4k"):
        encode(synthetic_clips(1), tmp_path / "data", wan_folder, (Size(10, 32, 32),))
    encode(synthetic_clips(2), tmp_path / "data", wan_folder)
    about = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({**about, "vae": "other"}))
    with pytest.raises(ConfigError, match="encoded with another vae"):
        encode(synthetic_clips(1), tmp_path / "data", wan_folder)
    next((tmp_path / "data").glob("9x*.safetensors")).write_bytes(b"no")
    with pytest.raises(ConfigError, match="is damaged"):
        Dataset(tmp_path / "data")
