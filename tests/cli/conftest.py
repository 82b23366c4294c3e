"""Small model folders, saved once."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "generation")]

import folders  # noqa: E402  found through the path above


@pytest.fixture(scope="session", autouse=True)
def _offline():
    """No test may reach the hub, even by a name that looks like a hub id."""
    patch = pytest.MonkeyPatch()
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random-weight WanPipeline folder; see `folders.save_wan`."""
    return folders.save_wan(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def no_progress(monkeypatch):
    """No lines of progress among what commands say."""
    monkeypatch.setattr("videosparse.cli.console.Lines.__call__", lambda *_: None)
