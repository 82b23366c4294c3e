"""Wan on two ranks under Ulysses: sparse attention sees whole sequences with half the heads, and equals one process.

Run as a program, this file is one of the ranks.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SPARSE = {"decay": 0.2, "first_steps": 0, "first_layers": 1, "sink": False}
ORDERS = ("sparsify, then parallel", "parallel, then sparsify")
WIDE = {"attention_head_dim": 64}


def one_rank(rank: int, meeting: str, order: str) -> list[torch.Tensor]:
    """What `forwards` makes of this rank's models."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    return forwards(order, lambda model: enable_ulysses(model, rank))


def forwards(order: str, enable) -> list[torch.Tensor]:
    """Sparse outputs of two models: one in fp32, and a wide one in integers; what a rank refuses is refused."""
    from pipes import TINY

    from videosparse import DenseProcessor, PAROProcessor, RadialProcessor, sparsify

    def run(processor, **config):
        model = TINY["wan"].build(**config)
        if order == ORDERS[0]:
            sparsify(model, processor)
        enable(model)
        if order == ORDERS[1]:
            sparsify(model, processor)
        out = TINY["wan"].forward(model, (4, 8, 8), (1,))
        assert processor.report().density < 0.9
        return model, out

    model, plain = run(RadialProcessor(**SPARSE))
    with torch.autocast("cpu", torch.bfloat16):
        _, integers = run(RadialProcessor(**SPARSE, quant="int8"), **WIDE)
    if torch.distributed.is_initialized():
        with pytest.raises(NotImplementedError, match="PAROAttention without a plan"):
            sparsify(model, PAROProcessor(num_steps=4))
        sparsify(model, DenseProcessor(quant="int8"))
        with pytest.raises(NotImplementedError, match="with context parallelism; drop quant"):
            TINY["wan"].forward(model, (4, 8, 8), (1,))
    return [plain, integers]


def enable_ulysses(model, rank: int) -> None:
    """`model.enable_parallelism`, which insists on an accelerator, step by step."""
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    config = ContextParallelConfig(ulysses_degree=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    config.setup(rank, 2, torch.device("cpu"), mesh)
    parallel = ParallelConfig(context_parallel_config=config)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    apply_context_parallel(model, config, model._cp_plan)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_two_ranks_equal_one_process(order, tmp_path):
    alone = forwards(order, lambda model: None)

    command = [sys.executable, __file__, str(tmp_path / "meeting"), order]
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [subprocess.Popen([*command, str(rank), str(out)], stderr=subprocess.PIPE) for rank, out in enumerate(outs)]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, error, out in zip(ranks, errors, outs, strict=True):
        assert process.returncode == 0, error
        torch.testing.assert_close(torch.load(out), alone, rtol=0, atol=1e-6)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    place, order_of_calls, number, target = sys.argv[1:]
    torch.save(one_rank(int(number), place, order_of_calls), target)
