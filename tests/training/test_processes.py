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

STEPS = 3


def train_here(model: Path, data: Path, out: Path, train: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses, whole adapters) of a few steps; writes a checkpoint and goes on from it."""
    import lora_runs

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
    run.held_out(17)
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


def train_in_two(tmp_path: Path, model: Path, data: Path, train: dict) -> list[dict]:
    """What two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    arguments = [str(model), str(data), str(tmp_path / "two"), json.dumps(train)]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, str(out)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        errors = [process.communicate(timeout=240)[1].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, error in zip(ranks, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [torch.load(out) for out in outs]


def assert_same(found, losses, weights):
    for process in found:
        assert process["losses"] == pytest.approx(losses, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(process["weights"][name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data parallel", "one clip shared", "sharded"])
def test_two_processes_equal_one(kind, wan_folder, wan_data, tmp_path):
    alone = {"steps": STEPS, "accumulate": 1 if kind == "one clip shared" else 2}
    losses, weights = train_here(wan_folder, wan_data, tmp_path / "one", alone)
    kinds = {"data parallel": {}, "one clip shared": {"sequence_parallel": 2}, "sharded": {"sharded": True}}
    found = train_in_two(tmp_path, wan_folder, wan_data, {"steps": STEPS, **kinds[kind]})
    assert_same(found, losses, weights)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    folder, clips, place, keys, target = sys.argv[1:]
    found_losses, found_weights = train_here(Path(folder), Path(clips), Path(place), json.loads(keys))
    torch.save({"losses": found_losses, "weights": found_weights}, target)
