"""From prompts to a plan: what it holds, that it repeats, goes on after an interruption, and what it refuses."""

import dataclasses
import errno
import os

import pytest
import torch
from folders import ABOUT

from videosparse.blocks import unpack_rows
from videosparse.generation import GenerationError, GenerationRequest, generate
from videosparse.generation.calibrating import (
    CalibrationRequest,
    calibrate,
    keep_blocks,
)
from videosparse.generation.looking import Columns, MapSums, Shares, Watch, watching
from videosparse.generation.methods import resolve_method
from videosparse.generation.partial import Partial
from videosparse.generation.running import call_arguments, load_pipeline
from videosparse.generation.sources import find_spec
from videosparse.layout import VideoGrid
from videosparse.policies.paro_plan import PAROPlan

PROMPTS = ("a red circle bounces", "a blue square")
CPU = torch.device("cpu")


@pytest.fixture
def request_of(model_folder):
    def make(**fields):
        small = {
            "prompts": PROMPTS, "model": str(model_folder), "num_frames": 9, "height": 64, "width": 64, "steps": 4,
            "buckets": 2, "density": 0.4, "block": (64, 64), "device": "cpu",
        }  # fmt: skip
        return CalibrationRequest(**{**small, **fields})

    return make


@pytest.fixture(scope="module")
def pipes():
    return {}


@pytest.fixture
def pipe(pipes, request_of):
    if not pipes:
        pipes["small"], _ = load_pipeline(request_of().resolve().runs[0])
    return pipes["small"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.safetensors"


def test_blocks_that_are_offloaded_make_the_same_plan(request_of, pipe, path):
    request = request_of(prompts=PROMPTS[:1])
    calibrate(request, path, pipe=pipe)
    run = request.resolve().runs[0]
    offloaded, _ = load_pipeline(dataclasses.replace(run, stack=dataclasses.replace(run.stack, offload="group")))
    other = path.with_name("other.safetensors")
    calibrate(request, other, pipe=offloaded)
    for name in ("codes", "counts", "bits"):
        assert torch.equal(getattr(PAROPlan.load(path), name), getattr(PAROPlan.load(other), name))


def test_what_a_plan_holds(request_of, pipe, path):
    processors = {n: m.processor for n, m in pipe.transformer.named_modules() if hasattr(m, "processor")}
    phases = []
    found = calibrate(request_of(), path, pipe=pipe, progress=lambda *call: phases.append(call))
    plan = PAROPlan.load(path)
    assert torch.equal(plan.bits, found.plan.bits)
    facts = plan.facts
    assert (facts.model_class, facts.layers, facts.heads) == ("WanTransformer3DModel", 2, 2)
    assert (facts.grid, facts.video, facts.block, facts.buckets) == ((3, 8, 8), (9, 64, 64), (64, 64), 2)
    assert (facts.density, facts.mass, facts.text) == (0.4, None, 0)
    assert (facts.method["order_by"], facts.method["alpha"]) == ("metric", 0.5)
    assert facts.method["calls"] == 3 * 2 * 2, "three steps, two branches, two prompts"
    assert len(facts.method["recall"]) == 3
    assert (plan.counts == 1).all(), ".4 of 3 columns"
    assert (unpack_rows(plan.bits, 3).sum(-1) == 1).all()
    assert os.listdir(path.parent) == ["plan.safetensors"]
    assert {n: m.processor for n, m in pipe.transformer.named_modules() if hasattr(m, "processor")} == processors
    assert not pipe.transformer._forward_pre_hooks
    assert phases[0] == ("1/2 denoise", 0, 4)
    assert phases[-1] == ("maps", 3, 3)
    assert not found.resumed


def test_the_same_seed_gives_the_same_bytes(request_of, pipe, path, tmp_path):
    calibrate(request_of(), path, pipe=pipe)
    calibrate(request_of(), tmp_path / "again.safetensors", pipe=pipe)
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    calibrate(request_of(seed=1), tmp_path / "other.safetensors", pipe=pipe)
    assert path.read_bytes() != (tmp_path / "other.safetensors").read_bytes()


@pytest.mark.parametrize(("after", "by"), [("a prompt", "metric"), ("a map", "metric"), ("a prompt", "mass")])
def test_an_interrupted_calibration_goes_on(request_of, pipe, path, tmp_path, monkeypatch, after, by):
    calibrate(request_of(order_by=by), tmp_path / "whole.safetensors", pipe=pipe)
    runs, replays, run, replay = [], [], Watch.run, Watch.replay

    def interrupted_run(self, *args):
        if after == "a prompt" and len(runs) == 1:
            raise KeyboardInterrupt
        runs.append(1)
        return run(self, *args)

    def interrupted_replay(self, *args):
        if after == "a map" and len(replays) == 1:
            raise KeyboardInterrupt
        replays.append(1)
        return replay(self, *args)

    monkeypatch.setattr(Watch, "run", interrupted_run)
    monkeypatch.setattr(Watch, "replay", interrupted_replay)
    with pytest.raises(KeyboardInterrupt):
        calibrate(request_of(order_by=by), path, pipe=pipe)
    assert sorted(os.listdir(tmp_path)) == ["plan.safetensors.partial", "whole.safetensors"]
    done = len(runs), len(replays)
    monkeypatch.setattr(Watch, "run", lambda self, *args: runs.append(1) or run(self, *args))
    monkeypatch.setattr(Watch, "replay", lambda self, *args: replays.append(1) or replay(self, *args))
    assert calibrate(request_of(order_by=by), path, pipe=pipe).resumed
    assert done == ((1, 0) if after == "a prompt" else (2, 1))
    assert (len(runs), len(replays)) == (2, 3), "nothing is done twice"
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not Partial.path(path).exists()


def test_statistics_of_something_else_are_refused(request_of, pipe, path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    replay = Watch.replay
    monkeypatch.setattr(Watch, "replay", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(request_of(), path, pipe=pipe)
    monkeypatch.setattr(Watch, "replay", replay)
    message = (
        r"partial is of an interrupted calibration with another seed \(0 there, 7 now\); delete it, or pass --over"
    )
    with pytest.raises(GenerationError, match=message):
        calibrate(request_of(seed=7), path, pipe=pipe)
    with pytest.raises(GenerationError, match=r"with another order_by \(metric there, mass now\)"):
        calibrate(request_of(order_by="mass"), path, pipe=pipe)
    assert not path.exists()
    calibrate(request_of(seed=7), path, pipe=pipe, overwrite=True)
    path.unlink()
    Partial.path(path).write_bytes(b"x" * 100)
    with pytest.raises(GenerationError, match=r"partial is damaged .*; delete it, or pass --overwrite to begin anew"):
        calibrate(request_of(), path, pipe=pipe)


def test_statistics_that_are_no_numbers_stop_it(request_of, pipe, path, monkeypatch):
    from videosparse.kernels.order_search import look

    def broken(*args, **kwargs):
        for looks in look(*args, **kwargs):
            yield [dataclasses.replace(one, uneven=one.uneven * float("nan")) for one in looks]

    monkeypatch.setattr("videosparse.generation.looking.look", broken)
    with pytest.raises(
        GenerationError, match=r"Self-attention 0 gave statistics that are not finite .*try --dtype bf16"
    ):
        calibrate(request_of(), path, pipe=pipe)
    assert os.listdir(path.parent) == []


def test_nan_in_the_model_stops_it(request_of, path):
    pipe, _ = load_pipeline(request_of().resolve().runs[0])
    pipe.transformer.blocks[1].attn1.to_q.weight.data.fill_(float("nan"))
    with pytest.raises(GenerationError, match="Self-attention 1 gave statistics that are not finite"):
        calibrate(request_of(), path, pipe=pipe)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_is_one_line(request_of, pipe, path, monkeypatch, after):
    calls, sync = [], os.fsync

    def full(*args):
        calls.append(args)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(*args)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GenerationError, match=r"Cannot write .*partial: No space left on device; free some space, or"):
        calibrate(request_of(), path, pipe=pipe)
    assert os.listdir(path.parent) == ["plan.safetensors.partial"][:after]


def test_orders_by_mass_hold_no_less_than_raster_order(request_of, pipe, path):
    """In the calls that were looked at, head by head; the sums are those that maps are made of."""
    settings = request_of(order_by="mass", block=(128, 64)).resolve()
    shares, grid = Shares(2, 2, settings.block, settings.density), settings.runs[0].grid
    kept = {"mass": torch.zeros(2, 2), "raster": torch.zeros(2, 2)}
    with watching(pipe, CPU) as watch:
        calls = watch.run(settings.looked_at, shares, call_arguments(settings.runs[0]))
        for call in calls:
            for name, codes in (("mass", shares.codes), ("raster", torch.zeros_like(shares.codes))):
                sums = MapSums(codes, grid, settings.block)
                watch.replay([call], sums)
                kept[name] += torch.stack([keep_blocks(x, settings.density, None, CPU)[2] for x in sums.sums])
    assert (kept["mass"] >= kept["raster"] - 1e-5).all()
    assert (kept["mass"] > kept["raster"] + 1e-3).any()
    expected = shares.totals["kept"].gather(2, shares.codes.long()[..., None])[..., 0]
    torch.testing.assert_close(kept["mass"].double(), expected, rtol=1e-5, atol=0)
    plan = calibrate(request_of(order_by="mass", block=(128, 64), prompts=PROMPTS[:1]), path, pipe=pipe).plan
    assert torch.equal(plan.codes, shares.codes)
    assert plan.facts.method["order_by"] == "mass"
    assert "alpha" not in plan.facts.method


def test_orders_by_mass_keep_it_with_no_more_blocks_than_raster_order(request_of, pipe, path):
    """In the calls that were looked at, head by head, at a share that is given."""
    request = request_of(order_by="mass", density=None, mass=0.8, prompts=PROMPTS[:1])
    settings = request.resolve()
    figures, grid = Columns(2, 2, settings.block, 0.8), settings.runs[0].grid
    needed = torch.zeros(2, 2, 6, dtype=torch.float64)
    with watching(pipe, CPU) as watch:
        calls = watch.run(settings.looked_at, figures, call_arguments(settings.runs[0]))
        for call in calls:
            for code in range(6):
                sums = MapSums(torch.full((2, 2), code, dtype=torch.uint8), grid, settings.block)
                watch.replay([call], sums)
                for layer, own in enumerate(sums.sums):
                    for head, x in enumerate(own):
                        needed[layer, head, code] += fewest_by_hand(x, 0.8)
    torch.testing.assert_close(figures.totals["columns"], needed, rtol=1e-4, atol=1e-4)
    assert (figures.codes == needed.argmin(-1)).all()
    assert figures.codes.any(), "some head does better in another order"
    plan = calibrate(request, path, pipe=pipe).plan
    assert torch.equal(plan.codes, figures.codes)
    assert (plan.facts.density, plan.facts.mass, plan.facts.method["order_by"]) == (None, 0.8, "mass")


def fewest_by_hand(sums, mass):
    """How many of the largest blocks of every row hold a share, the last of them in part."""
    rows = sums.double().sort(1, descending=True).values
    left = mass * float(rows.sum())
    for number, column in enumerate(rows.sum(0).tolist()):
        if left <= column:
            return number + left / column
        left -= column
    raise AssertionError("more than all")


def test_mass_decides_how_many_blocks_a_head_keeps(request_of, pipe, path):
    plan = calibrate(request_of(density=None, mass=0.95), path, pipe=pipe).plan
    assert plan.facts.density is None
    assert all(recall >= 0.95 for recall in plan.facts.method["recall"])


def test_the_fewest_blocks_that_keep_a_mass():
    sums = torch.rand(3, 5, 40) ** 4
    sums[2] = 1e-6
    sums[2, :, 7] = 1.0
    counts, bits, recall = keep_blocks(sums, None, 0.8, CPU)
    assert counts[2] == 2, "at least 5 % of the columns"
    for head in range(2):
        kept = sums[head].topk(int(counts[head]), 1).values.sum() / sums[head].sum()
        fewer = sums[head].topk(int(counts[head]) - 1, 1).values.sum() / sums[head].sum()
        assert fewer < 0.8 <= kept
        assert recall[head] == pytest.approx(float(kept))
    assert torch.equal(unpack_rows(bits, 40).sum(-1), counts[:, None].expand(-1, 5))
    assert (keep_blocks(sums, None, 1.0, CPU)[0] == 40).all()
    assert (keep_blocks(sums, 0.25, None, CPU)[0] == 10).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": ()}, "There is no prompt to calibrate with"),
        ({"density": 0.0}, "density must lie in 0..1, 0 excluded"),
        ({"density": None, "mass": 1.5}, "mass must lie in 0..1"),
        ({"mass": 0.9}, "density and mass both say how many blocks are kept"),
        ({"block": (32, 64)}, "block must be"),
        ({"alpha": -1}, "alpha must lie in 0..1"),
        ({"order_by": "rank"}, "order_by must be metric or mass"),
        (
            {"order_by": "mass", "alpha": 0.5},
            "alpha=0.5 weighs the paper's metric, and orders are to be chosen by mass",
        ),
        ({"order_by": "mass", "reorder": False}, "reorder=False leaves all in raster order"),
        ({"buckets": 3}, "buckets must be 1 to 2, half of the 4 steps"),
        (
            {"buckets": 5, "steps": 9},
            r"buckets must be 1 to 4, .* or raise --steps: 5 need at least 10",
        ),
        ({"buckets": 1, "steps": 1}, r"Calibration needs at least 2 steps \(got 1\); raise --steps"),
        ({"buckets": 0}, r"buckets must be at least 1 \(got 0\)"),
        ({"num_frames": 10}, "num_frames must be 4k"),
        ({"prompts": ("a", " ")}, "The prompt is empty"),
    ],
)
def test_bad_requests(request_of, fields, message):
    with pytest.raises(GenerationError, match=message):
        request_of(**fields).resolve()


def test_outputs_are_checked_first(request_of, path, tmp_path):
    for output, message in (
        (tmp_path / "plan.pt", r"must end in \.safetensors .*use plan\.safetensors"),
        (tmp_path, "must end in"),
    ):
        with pytest.raises(GenerationError, match=message):
            calibrate(request_of(), output)
    path.write_text("mine")
    with pytest.raises(GenerationError, match=r"plan\.safetensors exists; choose another name, or pass --overwrite"):
        calibrate(request_of(), path)
    assert path.read_text() == "mine"
    with pytest.raises(GenerationError, match="Cannot write to"):
        calibrate(request_of(), path / "below.safetensors")


def test_a_plan_makes_videos_and_says_so(request_of, pipe, path, model_folder):
    calibrate(request_of(), path, pipe=pipe)
    size = {"num_frames": 9, "height": 64, "width": 64, "steps": 4, "device": "cpu", "model": str(model_folder)}
    options = {"paro": {"plan": str(path), "first_steps": 1}}
    first = generate(GenerationRequest(PROMPTS[0], method="paro", options=options, **size), pipe=pipe)
    assert first.run.report.video_density == pytest.approx(1 / 3)
    assert "plan.safetensors" in str(first.run.options["calibrated"])
    wrong = {**size, "num_frames": 13}
    with pytest.raises(GenerationError, match=r"are for grid 3x8x8 \(9 frames of 64x64\), this video has grid 4x8x8"):
        GenerationRequest(PROMPTS[0], method="paro", options=options, **wrong).resolve()
    with pytest.raises(GenerationError, match="a model with 2 layers, this one has 30"):
        resolve_method(find_spec("wan2.1-1.3b"), VideoGrid(3, 8, 8), "paro", options["paro"])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(GenerationError, match=r"Bad option of method paro: .*is no whole safetensors file"):
        GenerationRequest(PROMPTS[0], method="paro", options=options, **size).resolve()


def test_another_shift_than_in_calibration_is_told(request_of, pipe, path, model_folder, caplog):
    """The model's own is 3; plans of before do not say."""
    plan = calibrate(request_of(), path, pipe=pipe).plan
    assert plan.facts.method["shift"] == 3.0
    shifted = calibrate(request_of(shift=5.0), path.with_name("five.safetensors"), pipe=pipe).plan
    assert shifted.facts.method["shift"] == 5.0
    older = dataclasses.replace(plan, facts=dataclasses.replace(plan.facts, method={"shift": None}))
    size = {"num_frames": 9, "height": 64, "width": 64, "steps": 4, "device": "cpu", "model": str(model_folder)}
    for found, shift, told in ((plan, None, 0), (plan, 5.0, 1), (shifted, None, 1), (shifted, 5.0, 0), (older, 5.0, 0)):
        caplog.clear()
        request = GenerationRequest(PROMPTS[0], method="paro", options={"paro": {"plan": found}}, shift=shift, **size)
        generate(request, pipe=pipe)
        lines = [record.getMessage() for record in caplog.records if "calibrated with shift" in record.getMessage()]
        assert len(lines) == told
    assert plan.other_shift(5.0) == (
        "plan.safetensors was calibrated with shift 3 of the noise schedule, and this run has 5: its maps are for "
        "other noise levels; use --shift 3, or calibrate with --shift 5."
    )
    caplog.clear()
    options = {"paro": {"plan": plan, "online_maps": True}}
    generate(GenerationRequest(PROMPTS[0], method="paro", options=options, shift=5.0, **size), pipe=pipe)
    assert "calibrated with shift" not in caplog.text, "maps are found in the run"


def test_a_plan_of_a_model_with_a_lora(request_of, pipe, path, make_lora):
    """Weights decide maps; length, shift and rotary embedding come from the LoRA, as in `generate`."""
    about = {**ABOUT, "frames": [13], "shift": 5.0, "rope": "pi", "trained_frames": 5}
    lora = str(make_lora(21, about=about))
    request = request_of(loras=(lora,), num_frames=None)
    run = request.resolve().runs[0]
    assert (run.num_frames, run.shift, run.request.rope) == (13, 5.0, "pi")
    with_lora, _ = load_pipeline(run)
    stretched = calibrate(request, path, pipe=with_lora).plan
    assert (stretched.facts.video[0], stretched.facts.method["shift"]) == (13, 5.0)
    assert stretched.facts.method["loras"] == [["lora21", 1.0]]
    assert not with_lora.transformer._forward_pre_hooks
    plain = str(make_lora(22, about=None))
    request = request_of(loras=(plain,))
    with pytest.raises(GenerationError, match="The pipeline that was given has not loaded the LoRA"):
        calibrate(request, path, pipe=pipe, overwrite=True)
    found = {}
    for scale in (0.0, 1.0):
        request = request_of(loras=(plain,), lora_scales=(scale,))
        own, _ = load_pipeline(request.resolve().runs[0])
        found[scale] = calibrate(request, path, pipe=own, overwrite=True).plan
    base = calibrate(request_of(), path, pipe=pipe, overwrite=True).plan
    assert found[0.0].facts.method["recall"] == base.facts.method["recall"]
    assert found[1.0].facts.method["recall"] != base.facts.method["recall"]


def test_a_rotary_embedding_is_stretched_in_calibration(request_of, path, make_lora):
    lora = {rope: str(make_lora(23, about={**ABOUT, "rope": rope, "trained_frames": 5})) for rope in ("pi", "ntk")}
    recalls = []
    for file in lora.values():
        request = request_of(loras=(file,), num_frames=17)
        own, _ = load_pipeline(request.resolve().runs[0])
        recalls.append(calibrate(request, path, pipe=own, overwrite=True).plan.facts.method["recall"])
    assert recalls[0] != recalls[1]
