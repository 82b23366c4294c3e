"""Several processes give the loss and the adapters of one: data parallel, a clip shared by two, sharded weights.

Run as a program, this file is one of the processes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent)]

import lora_runs  # noqa: E402  found through the path above

STEPS = 3


def train_here(model: str, data: str, out: str, train: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses, whole adapters) of a few steps; writes a checkpoint and goes on from it."""
    from videosparse.training.adapters import whole
    from videosparse.training.run import LoraRun, make_accelerator

    torch.set_num_threads(1)
    sharded = train.get("sharded", False)
    config = lora_runs.make_config(model, data, out, train={k: v for k, v in train.items() if k != "sharded"})
    engine = make_accelerator(config, "cpu")
    if sharded:
        engine.prepare = shard
    run = LoraRun(config, engine)
    losses = [run.train_step().loss for _ in range(2)]
    run.save()
    assert run.resume() == 2
    losses += [run.train_step().loss for _ in range(STEPS - 2)]
    run.held_out(train["frames"][0])
    run.export()
    return losses, {name: whole(p) for name, p in run.parameters.items()}


def shard(model, optimizer):
    """What `accelerator.prepare` does for FSDP2, which it refuses to do on CPUs."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    names = {id(p): name for name, p in model.named_parameters()}
    trained = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = dict(model.named_parameters())
    for group, parameters in zip(optimizer.param_groups, trained, strict=True):
        group["params"] = [mine[name] for name in parameters]
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    return model, optimizer


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


@pytest.mark.slow
def test_two_processes_equal_one(wan_folder, wan_data, tmp_path):
    """Data parallel; two share each clip, with and without text in the sequence; sharded weights."""
    jobs, expected = [], []
    for name, kind in (
        ("wan", {}), ("wan", {"sharded": True}), ("wan", {"sequence_parallel": 2}),
        ("hunyuan", {"sequence_parallel": 2}), ("mochi", {"sequence_parallel": 2}),
    ):  # fmt: skip
        model, data, frames = wan_folder, wan_data, [17, 33]
        if name != "wan":
            frames = [19, 37] if name == "mochi" else [17, 33]
            model = lora_runs.save_pipe(name, tmp_path / name)
            data = lora_runs.random_data(tmp_path / f"{name}-data", model, frames=frames[-1], size=64)
        job = {"model": str(model), "data": str(data), "out": str(tmp_path / f"two{len(jobs)}")}
        jobs.append({**job, "train": {"steps": STEPS, "frames": frames, **kind}})
        alone = {"steps": STEPS, "frames": frames, "accumulate": 1 if "sequence_parallel" in kind else 2}
        expected.append(train_here(**{**job, "out": str(tmp_path / f"one{len(jobs)}"), "train": alone}))
    for job, (losses, weights), found in zip(jobs, expected, train_in_two(tmp_path, jobs), strict=True):
        for process in found:
            assert process["losses"] == pytest.approx(losses, rel=1e-5), job
            for name, value in weights.items():
                torch.testing.assert_close(process["weights"][name], value, rtol=1e-3, atol=3e-5)


if __name__ == "__main__":
    todo, target = sys.argv[1:]
    made = [train_here(**job) for job in json.loads(todo)]
    torch.save([{"losses": losses, "weights": weights} for losses, weights in made], target)
