"""Runs of AdaSpa, and what was planned in them. Import from a test: `conftest.py` puts this file on the path."""

from pipes import PIPES, Pipe

import pytest
import torch

FRAMES = {"wan": 9, "wan22": 9, "hunyuan_true_cfg": 9, "mochi": 13}
WIDE = {"height": 192, "width": 256}
GRID = (3, 12, 16)


def run(name, pipe, **more) -> torch.Tensor:
    kind: Pipe = PIPES[name]
    size = {**WIDE, "num_frames": FRAMES[name], "num_inference_steps": 6}
    return kind.run(pipe, **{**size, **more})


def trackers_of(pipe):
    parts = [getattr(pipe, part, None) for part in ("transformer", "transformer_2")]
    return [vars(part)["_videosparse_tracker"] for part in parts if part is not None]


@pytest.fixture
def planned(monkeypatch):
    """What was planned: (run, layer, mode, number of the state's map), in order."""
    from videosparse.policies.adaspa import AdaSpaPolicy

    log, plan = [], AdaSpaPolicy.plan

    def spy(self, layout, run, layer, state, **sizes):
        found = plan(self, layout, run, layer, state, **sizes)
        log.append((run, layer, found))
        return found

    monkeypatch.setattr(AdaSpaPolicy, "plan", spy)
    return log


def modes_of(log, context, layer=0):
    """{step index: mode} of one layer and branch."""
    return {run.index: str(plan.mode) for run, number, plan in log if (run.context, number) == (context, layer)}
