"""Several processes give the loss and the adapters of one: data parallel, a clip shared by two, sharded weights.

Run as a program, this file is one of the processes.
"""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent)]

import lora_runs  # noqa: E402  found through the path above

from videosparse.training.config import ConfigError  # noqa: E402
from videosparse.training.shards import choose_blocks, shard_plugin  # noqa: E402

STEPS = 4
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false", "FSDP_MIN_NUM_PARAMS": "100000000", "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}  # fmt: skip
"""What `accelerate launch --use_fsdp --fsdp_version 2` says to its processes."""


def train_here(
    model: str, data: str, out: str, train: dict, launch: dict | None = None, **sections: dict
) -> dict[str, object]:
    """What a few steps gave, with a checkpoint in between; `launch` is the environment of `accelerate launch`."""
    from accelerate.state import AcceleratorState

    from videosparse.training.adapters import whole
    from videosparse.training.run import LoraRun, make_accelerator
    from videosparse.training.validation import Validation

    torch.set_num_threads(1)
    config = lora_runs.make_config(model, data, out, train=train, **sections)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (launch or {}).items():
            patch.setenv(name, value)
        if launch:
            shard_on_cpus(patch)
        AcceleratorState._reset_state()  # that of the job before
        run = LoraRun(config, make_accelerator(config, "cpu"))
        losses = [run.train_step() for _ in range(2)]
        run.save()
        assert run.resume() == 2
        losses.append(run.train_step())
        with run.averaged():
            held = run.held_out(train["frames"][0])
        losses.append(run.train_step())
        run.export()
        videos = Validation(run) if config.validate.prompts else None
        paths = videos.make() if videos else []
        AcceleratorState._reset_state()
    return {
        "losses": [result.loss for result in losses], "norms": [result.gradient for result in losses], "held": held,
        "weights": {name: whole(p) for name, p in run.parameters.items()},
        "groups": sorted(type(module).__name__ for module in run.model.modules() if hasattr(module, "unshard")),
        "shards": {tuple(p.to_local().shape) for p in run.parameters.values()} if launch else set(),
        "videos": videos.before if videos else [], "written": len(paths),
    }  # fmt: skip


def fill_disk(model: str, data: str, out: str) -> list[str]:
    """What is told where only the main process writes, and cannot; all go on together once it can."""
    from videosparse.training.run import LOG, LoraRun, make_accelerator

    config = lora_runs.make_config(model, data, out, train={"frames": [17], "steps": 2})
    run, told = LoraRun(config, make_accelerator(config, "cpu")), []

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", out)

    with pytest.MonkeyPatch.context() as patch:
        if run.accelerator.is_main_process:
            patch.setattr("videosparse.training.checkpoint.write_tensors", full)
            patch.setattr("videosparse.training.run.save_lora", full)
            (Path(out) / LOG).mkdir(parents=True)
        for write in (run.save, run.export, lambda: run.log({"loss": 1.0})):
            with pytest.raises(OSError, match=out) as error:
                write()
            told.append(str(error.value))
    assert run.save().is_dir()
    return told


def shard_on_cpus(patch: pytest.MonkeyPatch) -> None:
    """Let accelerate take FSDP on CPUs, which its state allows on accelerators only; all the rest is its own."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    own = AcceleratorState.__init__

    def make(state, *args, fsdp_plugin=None, **kwargs):
        own(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            patch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if state._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state._mixed_precision)

    patch.setattr(AcceleratorState, "__init__", make)


def train_in_two(tmp_path: Path, jobs: list[dict]) -> list[list[dict]]:
    """What two processes found, job by job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps(jobs), str(out)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        errors = [process.communicate(timeout=300)[1].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, error in zip(ranks, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
    return list(zip(*(torch.load(out) for out in outs), strict=True))


def compare_with_one(tmp_path: Path, jobs: list[dict], *, rel: float = 1e-5, rtol: float = 1e-3) -> list[list[dict]]:
    """Check that two processes find what one does that takes all clips itself; returns what the two found."""
    expected = []
    for number, job in enumerate(jobs):
        job["out"] = str(tmp_path / f"two{number}")
        job["train"] = {"steps": STEPS, **job["train"]}
        alone = {key: value for key, value in job.items() if key != "launch"}
        if "sequence_parallel" in job["train"]:
            train = {**job["train"], "sequence_parallel": 1}
        else:
            train = {**job["train"], "accumulate": 2 * job["train"].get("accumulate", 1)}
        expected.append(train_here(**{**alone, "out": str(tmp_path / f"one{number}"), "train": train}))
    found = train_in_two(tmp_path, jobs)
    for number, (job, one, two) in enumerate(zip(jobs, expected, found, strict=True)):
        for process in two:
            for what in ("losses", "norms"):
                assert process[what] == pytest.approx(one[what], rel=rel if what == "losses" else 10 * rel), (what, job)
            assert process["held"] == pytest.approx(one["held"], rel=rel), job
            for ours, theirs in zip(process["videos"], one["videos"], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
            assert list(process["weights"]) == list(one["weights"])
            for name, value in one["weights"].items():
                torch.testing.assert_close(process["weights"][name], value, rtol=rtol, atol=rtol * 3e-2)
        for file in ("pytorch_lora_weights.safetensors", "checkpoints/step-000002/trained.safetensors"):
            ours, theirs = (load_file(tmp_path / f"{run}{number}" / file) for run in ("two", "one"))
            assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
                n: (t.shape, t.dtype) for n, t in theirs.items()
            }
    return found


@pytest.mark.slow
def test_two_processes_equal_one(wan_folder, wan_data, tmp_path):
    """Data parallel; two share each clip, with and without text in the sequence."""
    wan = {"model": str(wan_folder), "data": str(wan_data)}
    compare_with_one(tmp_path, [
        {**wan, "train": {"frames": [17, 33]}},
        {**wan, "train": {"frames": [17, 33], "sequence_parallel": 2}},
        {**of_family("hunyuan", tmp_path), "train": {"frames": [17, 33], "sequence_parallel": 2}},
        {**of_family("mochi", tmp_path), "train": {"frames": [19, 37], "sequence_parallel": 2}},
    ])  # fmt: skip


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_ends_all(wan_folder, wan_data, tmp_path):
    out = tmp_path / "run"
    ((one, two),) = train_in_two(
        tmp_path, [{"does": "fill_disk", "model": str(wan_folder), "data": str(wan_data), "out": str(out)}]
    )
    full, folder = (f"[Errno {n}] {os.strerror(n)}: '{out}" for n in (errno.ENOSPC, errno.EISDIR))
    assert one == two == [f"{full}/checkpoints/step-000000'", f"{full}'", f"{folder}/log.jsonl'"]


@pytest.mark.slow
def test_sharded_weights_equal_whole_ones(wan_folder, wan_data, tmp_path):
    """FSDP2 by accelerate: blocks named, none and found; uneven parts; shared clips; bf16; all families."""
    wan = {"model": str(wan_folder), "data": str(wan_data)}
    named = {
        **FSDP, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "WanTransformerBlock"
    }  # fmt: skip
    checked = {"ema": 0.9, "checkpointing": True, "clip": 0.01}
    videos = {"prompts": ["a cat"], "frames": 17, "height": 32, "width": 32, "steps": 2}
    thirds = {"lora": {"norms": True, "rank": 3}, "validate": videos}
    root = {"frames": [17], "ema": 0.9}
    half = {"frames": [17, 33], "precision": "bf16", "checkpointing": True}
    jobs = [
        {**wan, "launch": named, "train": {"frames": [17, 33], **checked}, **thirds},
        {**wan, "launch": {**FSDP, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "train": root, "validate": videos},
        {**wan, "launch": FSDP, "train": {"frames": [17, 33], "sequence_parallel": 2}},
        {**wan, "launch": FSDP, "train": half},
        {**of_family("hunyuan", tmp_path), "launch": FSDP, "train": {"frames": [17, 33], "accumulate": 2}},
        {**of_family("mochi", tmp_path), "launch": FSDP, "train": {"frames": [19, 37], "checkpointing": True}},
    ]
    found = compare_with_one(tmp_path, jobs)
    blocks = [[name.removeprefix("FSDP") for name in two[0]["groups"] if name.endswith("Block")] for two in found]
    assert blocks == [
        ["WanTransformerBlock"] * 3, [], *[["WanTransformerBlock"] * 3] * 2,
        ["HunyuanVideoSingleTransformerBlock", "HunyuanVideoTransformerBlock"], ["MochiTransformerBlock"] * 2,
    ]  # fmt: skip
    assert [{shape[0] for shape in process["shards"]} for process in found[0]] == [{2, 24}, {1, 24}], "of rank 3"
    assert [process["written"] for process in found[0]] == [2, 0]


def test_shards_that_do_not_work_are_refused(lora_run, monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    for told, sections in (
        ("model.fp8 does not work with sharded weights", {"model_": {"fp8": True}, "train": {"checkpointing": True}}),
        ("train.optimizer adamw8bit does not work with sharded weights", {"train": {"optimizer": "adamw8bit"}}),
    ):
        with pytest.raises(ConfigError, match=told):
            lora_run(**sections)
    for told, name, value in (
        ("by FSDP2 only \\(got --fsdp_version 1\\)", "FSDP_VERSION", "1"),
        ("--fsdp_activation_checkpointing would rename the adapters", "FSDP_ACTIVATION_CHECKPOINTING", "true"),
        ("--fsdp_offload_params is not supported: .* drop it", "FSDP_OFFLOAD_PARAMS", "true"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match=told):
                lora_run()


def test_shards_on_cpus_are_refused(lora_run, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="on GPUs only \\(got cpu\\)"):
        lora_run()


def test_blocks_that_are_none_are_refused(monkeypatch, lora_run):
    run = lora_run()
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "MochiTransformerBlock")
    plugin = shard_plugin(run.config)
    with pytest.raises(
        ConfigError, match="MochiTransformerBlock is no class in WanTransformer3DModel; its blocks are Wan"
    ):
        choose_blocks(plugin, run.transformer)


def of_family(name: str, tmp_path: Path) -> dict[str, str]:
    """A model and a data set for it."""
    model = lora_runs.save_pipe(name, tmp_path / name)
    frames = 37 if name == "mochi" else 33
    return {
        "model": str(model),
        "data": str(lora_runs.random_data(tmp_path / f"{name}-data", model, frames=frames, size=64)),
    }


if __name__ == "__main__":
    todo, target = sys.argv[1:]
    kinds = {job.__name__: job for job in (train_here, fill_disk)}
    torch.save([kinds[job.pop("does", "train_here")](**job) for job in json.loads(todo)], target)
