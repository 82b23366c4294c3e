"""The embedded model on several processes: the steps of one with the same batch, one clock, one writer.

Run as a program, this file is one of the processes.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from videosparse.training.tiny.checkpoint import read_backup
from videosparse.training.tiny.dit import Batch, Dit
from videosparse.training.tiny.optimizing import set_lr
from videosparse.training.tiny.plan import smoke_plan
from videosparse.training.tiny.pools import prepare_tokenizer
from videosparse.training.tiny.ranks import Ranks
from videosparse.training.tiny.state import STOP, Latents, Run

STEPS = 3
SAMPLES = 4


def load_program():
    path = Path(__file__).parents[2] / "eval" / "train_tiny_model.py"
    spec = importlib.util.spec_from_file_location("train_tiny_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Here:
    """A pool of workers that works here and now."""

    def submit(self, function, *args):
        value = function(*args)
        return type("Done", (), {"result": lambda self: value})()


def whole_batch(step: int) -> Batch:
    """The batch of all processes in one step."""
    torch.manual_seed(100 + step)
    shape = (SAMPLES, 8, 3, 8, 8)
    words = torch.randint(1, 200, (SAMPLES, 48))
    words[:, 20:] = 0
    marks = torch.stack([torch.randint(0, 20, (SAMPLES, 2)), torch.randint(0, 5, (SAMPLES, 2))], 2)
    level, weight = torch.rand(SAMPLES), torch.rand(SAMPLES, 1, 3, 8, 8)
    return Batch(torch.randn(shape), words, torch.randn(shape), level, weight, marks)


def few_steps(folder: str, ranks: Ranks) -> tuple[list[float], list[torch.Tensor], float]:
    """Losses and weights after a few steps, each process on its share of the batch, and how far the weights went."""
    common = ["--smoke", "--device", "cpu", "--work", folder, "--backup", folder]
    args = load_program().parse(["dit", *common, "--binding", "0.1"])
    run = Run(args, smoke_plan(False), torch.device("cpu"), Here(), ranks)
    prepare_tokenizer(run)
    run.meta |= {"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    empty = Latents(torch.zeros(6, 8, 3, 8, 8), torch.zeros(6, 4, 48), torch.zeros(6, 1, 3, 8, 8), torch.zeros(0))
    run.pools = {pool.name: empty for pool in run.plan.pools}
    # each process begins elsewhere, and must take over what the first has
    torch.manual_seed(ranks.rank)
    dit = Dit(run)
    begin = [p.detach().clone() for p in dit.parameters]
    share = SAMPLES // ranks.size
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
    losses = []
    for step in range(STEPS):
        dit.draw = lambda shape, step=step: Batch(*(part[mine] for part in whole_batch(step)))
        for optimizer, rate in dit.optimizers:
            set_lr(optimizer, rate)
        losses.append(dit.step(run.plan.stages[0][1][0]).item())
    after = [p.detach().clone() for p in dit.parameters]
    return losses, after, distance(after, begin)


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return float(torch.stack([(x - y).square().sum() for x, y in zip(a, b, strict=True)]).sum().sqrt())


def begun_before(run: Run, seconds: float) -> Run:
    run.began -= seconds
    return run


def stop_and_go_on(folder: Path, ranks: Ranks) -> dict:
    """A whole smoke run in which the last process gets a signal, and the call that finishes it."""
    program = load_program()
    # the others began earlier, so that they have less time left by their own clocks
    make_run = program.make_run
    program.make_run = lambda *a: begun_before(make_run(*a), 7.0 * ranks.rank)
    minutes = []
    train_dit = program.train_dit
    program.train_dit = lambda run, left: (minutes.append(left), train_dit(run, left))[1]
    step, calls = Dit.step, iter(range(10**6))

    def step_until_told(self, shape, learn=True):
        if learn and next(calls) == 9 and ranks.rank == ranks.size - 1:
            STOP.set()
        return step(self, shape, learn)

    Dit.step = step_until_told
    assert program.main(["all", "--resume", "--stages", "mixed", *common(folder)]) == 0
    told = STOP.is_set()
    STOP.clear()
    halted = not read_backup(folder / "backup")[1]["dit"]["finished"]
    assert program.main(["all", "--resume", "--stages", "mixed", *common(folder)]) == 0
    return {"told": told, "halted": halted, "minutes": minutes}


def common(folder: Path) -> list[str]:
    return ["--smoke", "--device=cpu", "--workers=1", f"--work={folder}", f"--backup={folder / 'backup'}"]


def in_two(folder: Path) -> list[dict]:
    """What two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=300)[0].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, text in zip(ranks, told, strict=True):
        assert process.returncode == 0, text[-3000:]
    return [torch.load(folder / f"{rank}.pt") | {"log": told[rank]} for rank in range(2)]


def test_two_processes_train_as_one_and_stop_together(tmp_path):
    losses, weights, went = few_steps(str(tmp_path), Ranks())
    first, second = in_two(tmp_path)
    assert first["losses"] == pytest.approx(losses, rel=1e-5)
    # one rounding apart at most
    assert distance(first["weights"], second["weights"]) < 1e-4 * went
    assert first["apart"] == second["apart"] == [1.0, 0.0]
    assert torch.equal(second["mine"], torch.ones(1, 3, 2, 2, 2)), "all have what the first has"
    # matrices are updated in bf16
    assert distance(first["weights"], weights) < 0.02 * went
    assert (first["told"], second["told"]) == (False, True)
    assert first["halted"]
    assert first["minutes"] == second["minutes"], "by one clock"
    assert len(first["minutes"]) == 2
    meta = read_backup(tmp_path / "run" / "backup")[1]
    assert meta["dit"]["finished"]
    assert meta["dit"]["step"] == 12
    assert meta["device"] == "2 x CPU"
    assert "gradients of 2 processes" in meta["dit"]["how"]
    assert "dit: finished by steps" in first["log"]
    assert "dit: finished" not in second["log"]
    latents = [torch.load(tmp_path / "run" / name)["128x81"][0] for name in ("pools.pt", "pools-1.pt")]
    assert not torch.equal(*latents), "each process has clips of its own"


def test_processes_on_several_hosts_are_refused(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="must be on one host"):
        Ranks.of_launcher()


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, ranks = Path(sys.argv[1]), Ranks.of_launcher()
    ranks.join(cuda=False)
    losses, weights, _ = few_steps(str(place), ranks)
    mine = [torch.full((1, 3, 2, 2, 2), float(ranks.rank)).contiguous(memory_format=torch.channels_last_3d)]
    mine[0] += 1.0
    apart = [ranks.reunite(mine), ranks.reunite(mine)]
    ranks.leave()
    # another meeting needs another door
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    found = {"losses": losses, "weights": weights, "apart": apart, "mine": mine[0]}
    torch.save(found | stop_and_go_on(place / "run", ranks), place / f"{ranks.rank}.pt")
