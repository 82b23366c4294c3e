"""Names and files: nothing is overwritten by accident, nothing is half-written."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from videosparse.generation import GenerationError, output
from videosparse.generation.filing import LATENTS_METADATA, RECORD_FORMAT, latents_metadata
from videosparse.generation.output import destination, picture_place, slug
from videosparse.writing import give_name


def writers(text="x", endings=(".mp4", ".json")):
    return {ending: lambda path, ending=ending: path.write_text(text + ending) for ending in endings}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_default_name_is_numbered_when_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        destination(None, "cat-0-radial").publish(writers())
    assert names(tmp_path / "outputs") == [
        "cat-0-radial-2.json", "cat-0-radial-2.mp4", "cat-0-radial-3.json", "cat-0-radial-3.mp4",
        "cat-0-radial.json", "cat-0-radial.mp4",
    ]  # fmt: skip


def test_one_taken_ending_numbers_them_all(tmp_path):
    (tmp_path / "a.json").touch()
    paths = destination(tmp_path, "a").publish(writers())
    assert {path.name for path in paths.values()} == {"a-2.mp4", "a-2.json"}


def test_a_given_name_that_exists_is_refused_at_once(tmp_path):
    (tmp_path / "a.json").touch()
    with pytest.raises(GenerationError, match=r"a\.json exists.*--overwrite"):
        destination(tmp_path / "a.mp4", "unused")


def test_overwrite_replaces(tmp_path):
    place = destination(tmp_path / "a.mp4", "unused", overwrite=True)
    place.publish(writers("old"))
    place.publish(writers("new"))
    assert (tmp_path / "a.mp4").read_text() == "new.mp4"
    assert names(tmp_path) == ["a.json", "a.mp4"]


def test_a_name_taken_while_running_is_not_replaced(tmp_path):
    place = destination(tmp_path / "a.mp4", "unused")
    (tmp_path / "a.json").write_text("theirs")
    with pytest.raises(GenerationError, match=r"a\.json exists"):
        place.publish(writers())
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "theirs"


def test_a_name_taken_between_check_and_link_leaves_nothing(tmp_path, monkeypatch):
    place = destination(tmp_path / "a.mp4", "unused")
    (tmp_path / "a.json").write_text("theirs")
    monkeypatch.setattr(output.Destination, "taken", lambda self, stem: [])
    with pytest.raises(GenerationError, match="exists"):
        place.publish(writers())
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_writer_leaves_nothing(tmp_path, error):
    def interrupted(path):
        path.write_text("half")
        raise error

    with pytest.raises(error):
        destination(tmp_path, "a").publish({**writers(endings=(".mp4",)), ".json": interrupted})
    assert names(tmp_path) == []


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    destination(tmp_path, "a").publish(writers())
    assert names(tmp_path) == ["a.json", "a.mp4"]
    with pytest.raises(FileExistsError):
        give_name(tmp_path / "a.json", tmp_path / "a.mp4")


def test_files_have_the_usual_permissions(tmp_path):
    reference = tmp_path / "reference"
    reference.touch()
    path = destination(tmp_path, "a").publish(writers())[".mp4"]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)
    assert path.stat().st_nlink == 1


def test_folder_arguments(tmp_path):
    assert destination(tmp_path, "a").folder == tmp_path
    assert destination(f"{tmp_path}/new/", "a").folder == tmp_path / "new"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["a.avi", "a", "a.MP4"])
def test_only_mp4(tmp_path, name):
    with pytest.raises(GenerationError, match=r"must end in \.mp4.*use a\.mp4"):
        destination(tmp_path / name, "unused")


def test_unwritable_places(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(GenerationError, match="is not a folder"):
        destination(tmp_path / "file" / "a.mp4", "unused")
    with pytest.raises(GenerationError, match=r"Cannot write to .*too long.*choose another"):
        destination(tmp_path / f"{'a' * 250}.mp4", "unused", (".mp4", "-dense.mp4"))
    with pytest.raises(GenerationError, match=r"Cannot write to .*too long"):
        destination("a" * 5000, "unused")
    assert names(tmp_path) == ["file"]

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(GenerationError, match=r"Cannot write to .*Read-only file system.*choose another folder"):
        destination(tmp_path / "new" / "a.mp4", "unused")


def test_a_folder_is_never_overwritten_and_nothing_else_is_either(tmp_path):
    (tmp_path / "a.mp4").write_text("old")
    place = destination(tmp_path / "a.mp4", "unused", overwrite=True)
    (tmp_path / "a.json").mkdir()
    message = r"Cannot overwrite .*a\.json: it is a folder"
    with pytest.raises(GenerationError, match=message):
        place.publish(writers("new"))
    assert (tmp_path / "a.mp4").read_text() == "old"
    assert names(tmp_path) == ["a.json", "a.mp4"]
    with pytest.raises(GenerationError, match=message):
        destination(tmp_path / "a.mp4", "unused", overwrite=True)


def test_a_full_disk_is_one_clear_error(tmp_path):
    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(GenerationError, match=r"Cannot write to .*No space left"):
        destination(tmp_path, "a").publish({".mp4": full})
    assert names(tmp_path) == []


def test_pictures(tmp_path):
    assert picture_place(tmp_path / "map.png").stem == "map"
    with pytest.raises(GenerationError, match=r"must end in \.png"):
        picture_place(tmp_path / "map.jpg")
    (tmp_path / "map.png").touch()
    with pytest.raises(GenerationError, match="exists"):
        picture_place(tmp_path / "map.png")
    assert picture_place(tmp_path / "map.png", overwrite=True).overwrite


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle!", "a-red-circle"),
        ("../../etc/passwd", "etc-passwd"),
        ("word " * 30, "word-word-word-word-word-word-word-word"),
        ("x" * 100, "x" * 40),
        ("Un café à Zürich", "un-cafe-a-zurich"),
        ("красный круг", "video"),
    ],
)
def test_slug(prompt, name):
    assert slug(prompt) == name


def record_of(folder, stem, **more):
    (folder / f"{stem}.json").write_text(json.dumps({"format": RECORD_FORMAT, "fingerprint": "a", **more}))


def latents_of(folder, stem, metadata):
    save_file({"latents": torch.zeros(1)}, folder / f"{stem}.safetensors", metadata=metadata)


def test_overwrite_leaves_nothing_of_the_run_before(tmp_path):
    """Else its latents, or the dense side of its comparison, would be taken for the new run's."""
    for ending in (".mp4", "-dense.mp4", "-compare.mp4"):
        (tmp_path / f"a{ending}").touch()
    record_of(tmp_path, "a", comparison={})
    latents_of(tmp_path, "a", latents_metadata({"fingerprint": "a"}))
    destination(tmp_path / "a.mp4", "unused", overwrite=True).publish(writers())
    assert names(tmp_path) == ["a.json", "a.mp4"]
    record_of(tmp_path, "a")
    destination(tmp_path / "a.mp4", "unused", (".mp4",), overwrite=True).publish(writers(endings=(".mp4",)))
    assert names(tmp_path) == ["a.mp4"], "a program that writes no record"


def test_overwrite_keeps_the_files_of_others(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.json").write_text('{"notes": 1}')
    (tmp_path / "a-compare.mp4").touch()
    latents_of(tmp_path, "a", {"lora": "of somebody"})
    before = names(tmp_path)
    place = destination(tmp_path / "a.mp4", "unused", (".mp4",), overwrite=True)
    place.publish(writers(endings=(".mp4",)))
    assert names(tmp_path) == before
    record_of(tmp_path, "a", comparison={})
    (tmp_path / "a-dense.mp4").touch()
    record_of(tmp_path, "a-dense")
    place.publish(writers(endings=(".mp4",)))
    assert names(tmp_path) == ["a-dense.json", "a-dense.mp4", "a.mp4", "a.safetensors"], "a run called a-dense"


@pytest.mark.parametrize("header", ["{}", '{"latents_format": "videosparse-latents-2", "fingerprint": "a"}', "a"])
def test_overwrite_keeps_latents_of_another_format(tmp_path, header):
    (tmp_path / "a.mp4").touch()
    latents_of(tmp_path, "a", {LATENTS_METADATA: header})
    destination(tmp_path / "a.mp4", "unused", (".mp4",), overwrite=True).publish(writers(endings=(".mp4",)))
    assert names(tmp_path) == ["a.mp4", "a.safetensors"]


def test_overwrite_keeps_latents_of_a_video_that_is_gone(tmp_path):
    """They may be all that is left of it; its record would be taken for the new video's."""
    record_of(tmp_path, "a")
    latents_of(tmp_path, "a", latents_metadata({"fingerprint": "a"}))
    destination(tmp_path / "a.mp4", "unused", (".mp4",), overwrite=True).publish(writers(endings=(".mp4",)))
    assert names(tmp_path) == ["a.mp4", "a.safetensors"]


def test_the_name_of_an_earlier_run_is_taken_while_its_record_or_latents_are_there(tmp_path):
    """Else a new video would be taken for the one that was deleted."""
    record_of(tmp_path, "a")
    latents_of(tmp_path, "b", latents_metadata({"fingerprint": "b"}))
    latents_of(tmp_path, "c", {"lora": "of somebody"})
    (tmp_path / "c.json").write_text('{"notes": 1}')
    for stem, ending in (("a", "json"), ("b", "safetensors")):
        with pytest.raises(GenerationError, match=rf"{stem}\.{ending} exists; choose another name, or pass"):
            destination(tmp_path / f"{stem}.mp4", "unused", (".mp4",))
        made = destination(tmp_path, stem, (".mp4",)).publish(writers(endings=(".mp4",)))
        assert made[".mp4"].name == f"{stem}-2.mp4"
        own = destination(tmp_path / f"{stem}.mp4", "unused", (".mp4",), fingerprint=stem)
        assert own.publish(writers(endings=(".mp4",)))[".mp4"].name == f"{stem}.mp4"
    assert destination(tmp_path, "c", (".mp4",)).publish(writers(endings=(".mp4",)))[".mp4"].name == "c.mp4"


def test_a_failed_run_removes_nothing(tmp_path):
    def fail(path):
        raise RuntimeError

    (tmp_path / "a.mp4").touch()
    record_of(tmp_path, "a")
    latents_of(tmp_path, "a", latents_metadata({"fingerprint": "a"}))
    with pytest.raises(RuntimeError):
        destination(tmp_path / "a.mp4", "unused", overwrite=True).publish({".mp4": fail})
    assert names(tmp_path) == ["a.json", "a.mp4", "a.safetensors"]
