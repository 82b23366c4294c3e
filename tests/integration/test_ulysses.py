"""Two ranks that share one video equal one process: every family, every method, in one pair of processes.

Run as a program, this file is one of the ranks.
"""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

RADIAL = {"decay": 0.2, "first_steps": 0, "first_layers": 1, "sink": False}
FULL, HALF = {"rtol": 0, "atol": 2e-6}, {"rtol": 2**-6, "atol": 2**-8}
ADASPA = {"density": 0.3, "first_steps": 0.25, "head_adaptive": False, "num_steps": 4, "refresh": (3,)}


@dataclass(frozen=True)
class Run:
    """A transformer, what is attached to it and when, and the steps that it makes."""

    model: str
    processor: str
    options: dict = field(default_factory=dict)
    grid: tuple[int, int, int] = (4, 8, 8)
    attach_first: bool = True
    rope: bool = False
    compiled: bool = False
    half: bool = False
    steps: int = 1
    far: bool = False
    windows: bool = False


RUNS = {
    "wan, radial": Run("wan", "RadialProcessor", RADIAL),
    "wan, parallel first": Run("wan", "RadialProcessor", RADIAL, attach_first=False),
    "wan, dense": Run("wan", "DenseProcessor"),
    "wan, long": Run("wan", "RadialProcessor", RADIAL, rope=True),
    "wan, compiled": Run("wan", "RadialProcessor", RADIAL, compiled=True),
    "wan, integers": Run("wan", "RadialProcessor", {**RADIAL, "quant": "int8"}, half=True),
    "wan, dense integers": Run("wan", "DenseProcessor", {"quant": "int8"}, half=True),
    "wan, adaspa": Run("wan", "AdaSpaProcessor", ADASPA, steps=4),
    "wan, paro": Run("wan", "PAROProcessor", {"density": 0.3, "first_steps": 0.25, "num_steps": 4}, steps=4),
    "wan, paro by a plan": Run("wan", "plan", {"first_steps": 0.25, "num_steps": 4}, grid=(3, 8, 8), steps=4),
    "wan, far": Run("wan", "RadialProcessor", RADIAL, far=True),
    "wan, far, adaspa": Run("wan", "AdaSpaProcessor", ADASPA, steps=4, far=True),
    "wan, far, by a plan": Run("wan", "plan", {"first_steps": 0.25, "num_steps": 4}, grid=(3, 8, 8), steps=4, far=True),
    "hunyuan_video, far, adaspa": Run("hunyuan_video", "AdaSpaProcessor", ADASPA, steps=4, far=True),
    "mochi, far, dense": Run("mochi", "DenseProcessor", far=True),
    "wan, windows": Run("wan", "RadialProcessor", RADIAL, windows=True),
    "wan, windows, adaspa": Run("wan", "AdaSpaProcessor", ADASPA, steps=4, windows=True),
    "hunyuan_video, windows": Run("hunyuan_video", "RadialProcessor", {**RADIAL, "first_layers": 0}, windows=True),
    "hunyuan_video, radial": Run("hunyuan_video", "RadialProcessor", {**RADIAL, "first_layers": 0}),
    "hunyuan_video, dense": Run("hunyuan_video", "DenseProcessor"),
    "hunyuan_video, adaspa": Run("hunyuan_video", "AdaSpaProcessor", ADASPA, steps=4),
    "mochi, radial": Run("mochi", "RadialProcessor", RADIAL),
    "mochi, dense, parallel first": Run("mochi", "DenseProcessor", attach_first=False),
}


def output(run: Run, share: Callable[[torch.nn.Module], None]) -> torch.Tensor:
    """The last step's output of a run; `share` makes the transformer parallel, or does nothing."""
    from pipes import TINY

    import videosparse

    tiny = TINY[run.model]
    config = {"attention_head_dim": 64} if run.half else {}
    model = tiny.build(num_attention_heads=4, **config) if run.model != "hunyuan_video" else tiny.build()
    options = {**run.options, "logit": videosparse.FarLogits(1, 0.3)} if run.far else run.options
    if run.processor == "plan":
        processor = videosparse.PAROProcessor(some_plan(model), **options)
    else:
        processor = getattr(videosparse, run.processor)(**options)
    if run.rope:
        videosparse.extend_rope(model, "pi", trained_frames=5)
    if run.attach_first:
        videosparse.sparsify(model, processor)
    share(model)
    if not run.attach_first:
        videosparse.sparsify(model, processor)
    if run.compiled:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.manual_seed(1)
    inputs = tiny.inputs(run.grid, 2, [12, 7])
    windows = videosparse.context_windows(model, frames=9, overlap=4) if run.windows else nullcontext()
    with windows, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=run.half):
        for step in range(run.steps):
            inputs["timestep"] = torch.full((2,), 900.0 - 200 * step)
            out = model(**inputs, return_dict=False)[0]
    return out


def some_plan(model: torch.nn.Module) -> Any:
    """Random orders and maps for grid 3x8x8, heads of unequal density."""
    from videosparse.blocks import pack_rows
    from videosparse.policies.paro_plan import PAROPlan, PlanFacts, plain_config

    torch.manual_seed(3)
    layers, heads = model.config.num_layers, model.config.num_attention_heads
    counts = torch.randint(1, 4, (layers, 3, heads), dtype=torch.int32)
    rank = torch.rand(layers, 3, heads, 3, 3).argsort(-1).argsort(-1)
    facts = PlanFacts(
        model_class=type(model).__name__, config=plain_config(model.config), grid=(3, 8, 8), text=0, layers=layers,
        heads=heads, block=(64, 64), buckets=2, density=0.5, mass=None, video=(9, 64, 64),
    )  # fmt: skip
    codes = torch.randint(0, 6, (layers, heads), dtype=torch.uint8)
    return PAROPlan(codes, counts, pack_rows(rank < counts[..., None, None]), facts)


def one_rank(rank: int, meeting: str) -> dict[str, torch.Tensor]:
    import videosparse

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found = {name: output(run, videosparse.parallelize) for name, run in RUNS.items()}
    return {
        **found,
        "errors": errors(),
        "there and back": there_and_back(),
        "gradient": gradient(videosparse.parallelize),
        "norms": norms(),
        "handed": handed(),
    }


def norms() -> list[str]:
    """Whether one kernel may norm what a rank projects: in generation, and in a training step."""
    from pipes import TINY

    import videosparse

    model, told = TINY["wan"].build(), []
    videosparse.sparsify(model, videosparse.RadialProcessor(**RADIAL))
    videosparse.parallelize(model)
    for training in (False, True):
        model.train(training)
        with torch.set_grad_enabled(training):
            model(**TINY["wan"].inputs((4, 8, 8), 1, [12]), return_dict=False)
        told.append(model.blocks[1].attn1.processor.shard.plan.options.fused_norm)
    return told


def handed() -> list[tuple[str, bool]]:
    """(type, whether it has a pointer) of what cores are handed, in training and in generation."""
    from pipes import TINY

    import videosparse

    model, found = TINY["wan"].build().train(), []
    videosparse.sparsify(model, videosparse.DenseProcessor())
    videosparse.parallelize(model)
    processor = model.blocks[0].attn1.processor
    core = processor.core

    def watched(q, k, v, plan):
        found.extend((type(x).__name__, x.data_ptr() != 0) for x in (q, k, v))
        return core(q, k, v, plan)

    vars(processor)["core"] = watched
    for training in (True, False):
        with torch.set_grad_enabled(training):
            model(**TINY["wan"].inputs((4, 8, 8), 1, [12]), return_dict=False)
    return found


def gradient(share: Callable[[torch.nn.Module], None]) -> torch.Tensor:
    """Of a projection of Wan, summed over the ranks, each of which has the loss of the whole video."""
    from pipes import TINY

    import videosparse

    model = TINY["wan"].build().train()
    videosparse.sparsify(model, videosparse.RadialProcessor(**RADIAL))
    share(model)
    torch.manual_seed(1)
    model(**TINY["wan"].inputs((4, 8, 8), 1, [12]), return_dict=False)[0].square().mean().backward()
    found = model.blocks[0].attn1.to_k.weight.grad
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
    return found


def there_and_back() -> list[torch.Tensor]:
    """Uneven shards, which gloo cannot gather as Diffusers does at the end of a transformer: the exchange alone."""
    from videosparse._diffusers import Ulysses
    from videosparse.sharing import Exchange

    rank, whole = torch.distributed.get_rank(), torch.arange(2 * 7 * 4 * 3.0).reshape(2, 7, 4, 3)
    exchange = Exchange(Ulysses(2, rank, torch.distributed.group.WORLD, True))
    part = whole.tensor_split(2, dim=1)[rank]
    heads = exchange.to_heads(part, 7)
    text = exchange.all_heads(exchange.own_heads(whole))
    return [heads - whole.chunk(2, 2)[rank], exchange.to_tokens(heads) - part, text - whole]


def errors() -> list[str]:
    """What two ranks cannot do, in words."""
    from pipes import hunyuan_transformer, wan_transformer

    import videosparse

    def told(act):
        try:
            act()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            return str(error)
        return "nothing"

    twice = wan_transformer()
    videosparse.parallelize(twice)
    odd = Run("wan", "RadialProcessor", RADIAL, grid=(3, 9, 9))
    return [
        told(lambda: videosparse.parallelize(wan_transformer(num_attention_heads=3))),
        told(lambda: videosparse.parallelize(twice)),
        told(lambda: output(odd, videosparse.parallelize)),
        told(lambda: videosparse.parallelize(hunyuan_transformer(image_condition_type="token_replace"))),
    ]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks have found."""
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    command = [sys.executable, __file__, str(folder / "meeting")]
    processes = [
        subprocess.Popen([*command, str(rank), str(out)], stderr=subprocess.PIPE) for rank, out in enumerate(outs)
    ]
    try:
        told = [process.communicate(timeout=180)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, told, strict=True):
        assert process.returncode == 0, error
    return [torch.load(out) for out in outs]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_process(ranks, name):
    alone = output(RUNS[name], lambda model: None)
    for rank in ranks:
        # in half precision a product of fewer rows rounds otherwise
        torch.testing.assert_close(rank[name], alone, **(HALF if RUNS[name].half else FULL))


@pytest.mark.slow
def test_sparse_runs_are_sparse(ranks):
    """Else the test above would compare dense with dense."""
    for name in ("wan", "hunyuan_video", "mochi"):
        sparse, dense = (
            output(run, lambda model: None) for run in (RUNS[f"{name}, radial"], Run(name, "DenseProcessor"))
        )
        assert not torch.allclose(sparse, dense, atol=1e-5)
    plain, *others = (output(RUNS[name], lambda model: None) for name in ("wan, radial", "wan, far", "wan, windows"))
    assert not any(torch.allclose(plain, other, atol=1e-5) for other in others)


@pytest.mark.slow
def test_training_sums_the_gradients_of_the_ranks(ranks):
    alone = gradient(lambda model: None)
    for rank in ranks:
        torch.testing.assert_close(rank["gradient"], alone, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_shards_are_normed_step_by_step_in_training(ranks):
    """Else a checkpoint that runs without gradients first would round otherwise when it runs again."""
    for rank in ranks:
        assert rank["norms"] == ["auto", "off"]


@pytest.mark.slow
def test_kernels_are_handed_plain_tensors(ranks):
    """What is still under way has no pointer, which a kernel that does not come through PyTorch would follow."""
    for rank in ranks:
        assert rank["handed"] == [("Tensor", True)] * 6


@pytest.mark.slow
def test_shards_may_differ_in_length(ranks):
    for rank in ranks:
        assert [float(x.abs().max()) for x in rank["there and back"]] == [0, 0, 0]


def test_heads_are_dealt_so_that_ranks_have_equal_work():
    from videosparse.sharing import deal_heads

    assert deal_heads([9, 1, 1, 1, 1, 9], 2) == [0, 1, 3, 2, 4, 5]
    work = [8, 7, 6, 5, 4, 3, 2, 1]
    dealt = deal_heads(work, 4)
    assert sorted(dealt) == list(range(8))
    assert [work[a] + work[b] for a, b in zip(dealt[::2], dealt[1::2], strict=True)] == [9, 9, 9, 9]
    assert deal_heads([5, 5, 5, 5], 2) == [0, 2, 1, 3]
    assert deal_heads([3, 3], 1) == [0, 1]


@pytest.mark.slow
def test_what_two_ranks_cannot_do(ranks):
    for rank in ranks:
        heads, twice, tokens, replaced = rank["errors"]
        assert "3 attention heads cannot be shared by 2 ranks" in heads
        assert "is parallel already" in twice
        assert "243 video tokens cannot be shared evenly by 2 ranks" in tokens
        assert "modulates its first frame by itself" in replaced


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    place, number, target = sys.argv[1:]
    torch.save(one_rank(int(number), place), target)
