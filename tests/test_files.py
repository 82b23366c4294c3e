"""Files that are written whole or not at all."""

import errno

import pytest
import torch

from videosparse.files import whole, write_state


def fill_the_disk(path):
    with whole(path) as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "folder" / "rows.csv"
    with whole(path) as part:
        part.write_text("before")
    with pytest.raises(OSError, match="No space left on device") as told:
        fill_the_disk(path)
    assert told.value.filename == str(path)
    assert path.read_text() == "before"
    assert [file.name for file in path.parent.iterdir()] == ["rows.csv"]


def test_a_state_that_torch_cannot_write_is_one_line_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    write_state({"x": torch.arange(3)}, path)

    def fail(state, part):
        part.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"as on a full disk: '.*state\.pt'"):
        write_state({}, path)
    assert torch.load(path, weights_only=True)["x"].tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
