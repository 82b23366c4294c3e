"""Which dense kernel is taken, and what is said about it."""

import dataclasses
import logging

import pytest
import torch

from videosparse.kernels import dense

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _no_memory():
    dense._fastest.cache_clear()
    yield
    dense._fastest.cache_clear()


@pytest.fixture
def present(monkeypatch):
    """A GPU of some compute capability, and the dense kernels that run on it."""

    def install(capability, *names):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for name, kernel in dense.DENSE_KERNELS.items():
            missing = lambda device, name=name: None if name in names else f"no {name} here"  # noqa: E731
            monkeypatch.setitem(dense.DENSE_KERNELS, name, dataclasses.replace(kernel, missing=missing))
        monkeypatch.setattr(dense.gpu, "special_kernel", lambda name, device: dense if dense.OWN in names else None)

    return install


def test_the_fastest_that_is_here_is_taken_and_named_once(present, caplog):
    present((9, 0), "fa4", "cudnn", dense.OWN)
    with caplog.at_level(logging.INFO, logger="videosparse"):
        for _ in range(3):
            assert dense.fastest_dense(GPU, torch.bfloat16, 128, 75_600) == "fa4"
    assert [r.getMessage() for r in caplog.records] == [
        "Dense attention in torch.bfloat16 takes FlashAttention-4 (not FlashAttention-3: no fa3 here)."
    ]


def test_our_kernel_where_no_library_is(present):
    present((9, 0), "cudnn", dense.OWN)
    assert dense.fastest_dense(GPU, torch.bfloat16, 128, 75_600) == dense.OWN
    assert dense.title_of(dense.OWN) == "videosparse triton"


def test_our_kernel_is_given_up_where_it_does_not_compile(present):
    present((9, 0), dense.OWN)
    assert dense.fastest_dense(GPU, torch.bfloat16, 128, 75_600) == dense.OWN
    present((9, 0))  # the first call of a sparse layer found out
    assert dense.fastest_dense(GPU, torch.bfloat16, 128, 75_600) is None


def test_torch_keeps_what_was_not_measured(present, caplog):
    present((9, 0), "fa3", "fa4", dense.OWN)
    for length, dtype, head_dim in (
        (4096, torch.bfloat16, 128),
        (75_600, torch.float32, 128),
        (75_600, torch.float16, 80),
    ):
        assert dense.fastest_dense(GPU, dtype, head_dim, length) is None
    assert dense.fastest_dense(torch.device("cpu"), torch.bfloat16, 128, 75_600) is None
    present((8, 0), "fa4")
    dense._fastest.cache_clear()
    assert dense.fastest_dense(GPU, torch.bfloat16, 128, 75_600) is None


def test_torch_where_nothing_else_is(present, caplog):
    present((9, 0))
    with caplog.at_level(logging.INFO, logger="videosparse"):
        assert dense.fastest_dense(GPU, torch.bfloat16, 128, 75_600) is None
    assert "takes torch's own (not FlashAttention-3: no fa3 here; not" in caplog.text


def test_fa3_is_passed_over_for_a_dtype_that_its_wheel_lacks(present):
    present((9, 0), "fa3", "fa4")
    assert dense.fastest_dense(GPU, torch.bfloat16, 128, 75_600) == "fa3"
    assert dense.fastest_dense(GPU, torch.float16, 128, 75_600) == "fa4"


def test_kernels_say_what_is_missing():
    q = torch.zeros(1, 64, 2, 128, dtype=torch.bfloat16)
    for kernel in dense.DENSE_KERNELS.values():
        assert "NVIDIA GPU (got cpu)" in kernel.unsuited(q)
        assert "head_dim must be 64 or 128 (got 80)" in kernel.unsuited(q[..., :80])
        assert "got torch.float32" in kernel.unsuited(q.float())


def test_the_op_is_well_formed(monkeypatch):
    kernel = dataclasses.replace(dense.DENSE_KERNELS["fa3"], attend=lambda q, k, v, scale: (q + k + v) * scale)
    monkeypatch.setitem(dense.DENSE_KERNELS, "fa3", kernel)
    q, k, v = torch.randn(3, 1, 16, 2, 64)
    torch.library.opcheck(dense.dense_by_library, (q, k, v, "fa3"))
