"""Rows and kept dense videos belong to one model, whatever others are called."""

import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cv2")

from videosparse.evaluation.prompts import Prompt
from videosparse.evaluation.running import Made
from videosparse.evaluation.settings import Setting
from videosparse.evaluation.table import RowStore
from videosparse.evaluation.weights import weights_id
from videosparse.evaluation.work import COLUMNS, FIXED, KEY, SHARED, Comparison, workers
from videosparse.generation.sources import find_model

PROMPTS = [Prompt("a cat", 1), Prompt("a dog", 2)]
DENSE, RADIAL = Setting("dense"), Setting("radial")
CONDITIONS = SimpleNamespace(
    block=(64, 64), first_steps=0.2, density=lambda setting: None, processor=lambda setting: setting.method
)


class Batches:
    """Videos of one grey, which is the model's own; sparse ones are a little lighter."""

    def __init__(self, grey, weights, stop=None):
        self.grey, self.weights, self.stop, self.made = grey, weights, stop, []
        self.settings = SimpleNamespace(
            source=SimpleNamespace(name="model"), num_frames=5, height=16, width=16, steps=4, guidance=1.0, fps=8.0,
            dtype="fp32", device=torch.device("cpu"), grid=SimpleNamespace(tokens=4),
        )  # fmt: skip

    def warm_up(self, prompts, processor):
        pass

    def make(self, prompts, processor, **more):
        if processor == self.stop:
            raise KeyboardInterrupt
        self.made.append(processor)
        videos = torch.full((len(prompts), 5, 3, 16, 16), self.grey + (processor != "dense") / 16)
        return Made(videos, videos.transpose(1, 2)[..., ::8, ::8], len(prompts), 1.0, 1.0, 1.0, 1.0)


def compare(path, batches, commit="a", other=RADIAL):
    store = RowStore(path, COLUMNS, KEY, fixed=FIXED, shared=SHARED)
    with workers(0) as submit:
        work = Comparison(batches, CONDITIONS, [DENSE, other], store, {"commit": commit, "run": "now"}, submit)
        work.run(PROMPTS, 0, lambda count: None)
    assert not work.failed
    return {row["setting"]: row for row in store.rows()}


def test_a_resumed_run_goes_on_with_its_own_dense_videos(tmp_path):
    path = tmp_path / "rows.csv"
    with pytest.raises(KeyboardInterrupt):
        compare(path, Batches(0.25, "first", stop="radial"))
    again = Batches(0.75, "first")  # would be far from the dense videos that were kept
    row = compare(path, again)["radial"]
    assert again.made == ["radial"]
    assert float(row["psnr_db"]) == pytest.approx(-20 * torch.tensor(0.75 + 1 / 16 - 0.25).log10().item(), abs=1e-3)


@pytest.mark.parametrize(("weights", "commit"), [("second", "a"), ("first", "b")])
def test_dense_videos_of_other_weights_or_code_are_not_taken(tmp_path, weights, commit):
    path = tmp_path / "rows.csv"
    first = Batches(0.25, "first", stop="radial")
    with pytest.raises(KeyboardInterrupt):
        compare(path, first)
    (path.parent / "rows.csv.parts" / "rows-0.jsonl").unlink(missing_ok=True)  # another table would be refused
    other = Batches(0.75, weights)
    row = compare(path, other, commit)["radial"]
    assert other.made == ["dense", "radial"]
    assert float(row["psnr_db"]) == pytest.approx(20 * torch.tensor(16.0).log10().item(), abs=1e-3)


def test_rows_of_another_model_of_that_name_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    compare(path, Batches(0.25, "first"))
    told = r"rows.csv has rows of model with weights first, this run with weights second; use another --output"
    with pytest.raises(ValueError, match=told):
        compare(path, Batches(0.25, "second"))


def test_they_are_refused_at_another_size_too(tmp_path):
    path, other = tmp_path / "rows.csv", Batches(0.25, "second")
    compare(path, Batches(0.25, "first"))
    other.settings.steps += 1
    with pytest.raises(ValueError, match="with weights first, this run with weights second"):
        compare(path, other)
    assert other.made == []
    other.weights, other.settings.dtype = "first", "bf16"
    with pytest.raises(ValueError, match="with dtype fp32, this run with dtype bf16"):
        compare(path, other)
    other.settings.dtype = "fp32"
    assert compare(path, other, commit="b")


def test_the_hash_of_weights(tmp_path):
    from safetensors.torch import save_file

    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    (first / "transformer").mkdir(parents=True)
    weight = torch.rand(512, 512)
    save_file({"a": weight}, first / "transformer" / "model.safetensors")
    shutil.copytree(first, second)
    assert weights_id(first) == weights_id(second)
    weight += 1e-3
    save_file({"a": weight}, second / "transformer" / "model.safetensors")
    shutil.copytree(first, third)
    (third / "transformer" / "model.safetensors").rename(third / "model.safetensors")
    assert len({weights_id(folder) for folder in (first, second, third)}) == 3
    assert weights_id("org/one") != weights_id("org/two")
    assert weights_id(find_model(None).location) == weights_id(str(find_model(None).location))


def test_videos_whose_orders_a_run_finds_are_made_one_by_one(tmp_path):
    batches = Batches(0.25, "first")
    row = compare(tmp_path / "rows.csv", batches, other=Setting("paro-online", 0.3))["paro-online 0.3"]
    assert batches.made == ["dense", "paro-online", "paro-online"]
    assert int(row["batch"]) == 1
