"""Which backend is taken, and what is said about it."""

import logging
import subprocess
import sys

import pytest
import torch

from videosparse.kernels import backend, describe_backend

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._triton_missing.cache_clear()
    backend._take_automatically.cache_clear()
    yield
    backend._triton_missing.cache_clear()
    backend._take_automatically.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a given compute capability, without one being there."""

    def install(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return install


def test_auto_takes_torch_on_the_cpu_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="videosparse"):
        for _ in range(3):
            assert backend.choose("auto", torch.device("cpu"), torch.float32) == "torch"
    assert [r.getMessage() for r in caplog.records] == [
        "attend takes the torch backend for torch.float32 on cpu: no Triton: it needs CUDA or ROCm tensors (got cpu)."
    ]


def test_auto_takes_triton_on_a_gpu(gpu, caplog):
    gpu(8, 6)
    with caplog.at_level(logging.INFO, logger="videosparse"):
        assert backend.choose("auto", GPU, torch.bfloat16) == "triton"
    assert caplog.records[0].getMessage().endswith("the triton backend for torch.bfloat16 on cuda:0: sm_86.")
    assert describe_backend("cuda:0") == ("triton", "sm_86")


def test_old_gpus_and_float64_take_torch(gpu):
    gpu(7, 5)
    assert backend.choose("auto", GPU, torch.float16) == "torch"
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0 or newer \(got 7.5\)"):
        backend.choose("triton", GPU, torch.float16)
    assert backend.choose("auto", GPU, torch.float64) == "torch"
    with pytest.raises(RuntimeError, match=r"takes float16, bfloat16 and float32 \(got torch.float64\)"):
        backend.choose("triton", GPU, torch.float64)


def test_missing_triton_is_named(monkeypatch, gpu):
    gpu(9, 0)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="the triton package is not installed"):
        backend.choose("triton", GPU, torch.float16)
    assert describe_backend(GPU)[0] == "torch"


def test_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA or ROCm GPU is available"):
        backend.choose("triton", GPU, torch.float16)
    assert describe_backend("cpu") == ("torch", "no Triton: it needs CUDA or ROCm tensors (got cpu)")


def test_the_interpreter_takes_cpu_tensors_only_when_asked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.choose("triton", torch.device("cpu"), torch.float32) == "triton"
    assert backend.choose("auto", torch.device("cpu"), torch.float32) == "torch"


def test_importing_kernels_and_calling_them_on_the_cpu_needs_no_triton_and_no_cuda():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from videosparse.kernels import attend; from videosparse.layout import TokenLayout, VideoGrid\n"
        "x = torch.randn(1, 64, 1, 8); attend(x, x, x, layout=TokenLayout(VideoGrid(1, 8, 8)))\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
