"""Which kernel runs an operation on Hopper, without one: the table in `kernels/gpu.py`."""

import logging
from types import SimpleNamespace

import pytest
import torch

from videosparse.kernels import gpu
from videosparse.kernels.call import AttentionCall
from videosparse.kernels.compiled import CannotCompile

CALL = AttentionCall(None, None, 128, 128, 0.1)
Q = torch.zeros(1, 128, 1, 64)


@pytest.fixture
def modules(monkeypatch):
    """Stand-ins for all kernel modules by name, which say who was asked; all on a Hopper GPU."""
    asked, made = [], {}
    for operation in gpu.OPERATIONS.values():
        for name in (operation.hopper, operation.portable):
            run = lambda *call, name=name: asked.append(name) or name  # noqa: E731
            module = SimpleNamespace(__name__=f"videosparse.kernels.{name}", unsuited=lambda *call: None)
            setattr(module, operation.function, run)
            made[name] = module
    monkeypatch.setattr(gpu.importlib, "import_module", lambda name: made[name.rpartition(".")[2]])
    monkeypatch.setattr(gpu, "is_hopper", lambda device: True)
    gpu._import.cache_clear()
    gpu._tell.cache_clear()
    yield made
    gpu._failed.clear()
    gpu._import.cache_clear()
    gpu._tell.cache_clear()


def run(name):
    """Call the operation of a name in the table."""
    if name == "attend":
        return gpu.forward(Q, Q, Q, CALL, False)
    if name == "integer attention":
        return gpu.integer_forward(Q, Q, Q, CALL, False, False)
    if name == "block_sums":
        return gpu.block_sums(Q, Q, Q, CALL, (128, 128))
    return gpu.backward(Q, None, Q, Q, Q, Q, Q, CALL, None)


def fail(*call):
    raise CannotCompile("AttributeError: async_load has been removed")


@pytest.mark.parametrize("name", gpu.OPERATIONS)
def test_the_special_kernel_first_and_the_portable_one_where_it_fails(name, modules):
    operation = gpu.OPERATIONS[name]
    assert run(name) == operation.hopper
    assert gpu.special_title(Q.device, name) == operation.title
    setattr(modules[operation.hopper], operation.function, fail)
    assert run(name) == operation.portable
    assert gpu.special_title(Q.device, name) is None


@pytest.mark.parametrize("name", gpu.OPERATIONS)
def test_what_does_not_compile_is_reported_once_and_not_tried_again(name, modules, caplog):
    operation = gpu.OPERATIONS[name]
    setattr(modules[operation.hopper], operation.function, fail)
    for _ in range(3):
        assert run(name) == operation.portable
    assert [r.getMessage() for r in caplog.records] == [
        f"{name} does without its {operation.title}, and is slower: it cannot be compiled: AttributeError: async_load "
        "has been removed. Triton 3.6 to 3.9 are known to work."
    ]
    others = [x for x in gpu.OPERATIONS if x != name]
    assert [run(x) for x in others] == [gpu.OPERATIONS[x].hopper for x in others]


@pytest.mark.parametrize("name", gpu.OPERATIONS)
def test_each_reason_is_logged_once(name, modules, caplog):
    operation = gpu.OPERATIONS[name]
    found = []
    with caplog.at_level(logging.INFO, logger="videosparse"):
        for reason in ("too wide", "too long", "too wide", None):
            modules[operation.hopper].unsuited = lambda *call, reason=reason: reason
            found.append(run(name))
    assert found == [operation.portable] * 3 + [operation.hopper]
    assert [r.getMessage() for r in caplog.records] == [
        f"{name} does not take its {operation.title}: {reason}." for reason in ("too wide", "too long")
    ]


@pytest.mark.parametrize("name", gpu.OPERATIONS)
def test_special_kernels_can_be_left_out(name, modules):
    operation = gpu.OPERATIONS[name]
    with gpu.portable_only():
        assert run(name) == operation.portable
        with gpu.portable_only():
            pass
        assert run(name) == operation.portable
    assert run(name) == operation.hopper


@pytest.mark.parametrize("name", gpu.OPERATIONS)
def test_other_errors_are_raised(name, modules):
    operation = gpu.OPERATIONS[name]

    def broken(*call):
        raise RuntimeError("out of memory")

    setattr(modules[operation.hopper], operation.function, broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(name)
    assert not gpu._failed


def test_other_devices_have_the_portable_kernels():
    assert not gpu.is_hopper(torch.device("cpu"))
    assert all(gpu.special_kernel(name, torch.device("cpu")) is None for name in gpu.OPERATIONS)
