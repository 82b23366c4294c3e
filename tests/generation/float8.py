"""FP8 linears without a GPU: torchao's own, where it is installed, or a double that rounds as it does.

Import from a test of generation: its `conftest.py` puts this file on the path.
"""

import importlib.util
import sys
from types import ModuleType

import torch


def allow(monkeypatch):
    """Let `quantize_linears` work on the CPU."""
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import quant_api

        # it asks for a GPU of sm_89; its products run on the CPU all the same
        monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
        return
    double = ModuleType("torchao.quantization")
    double.Float8DynamicActivationFloat8WeightConfig = lambda **options: options
    double.PerRow = lambda: "rows"
    double.quantize_ = _quantize
    # not torchao itself: peft and Diffusers would take it to be installed
    monkeypatch.setitem(sys.modules, "torchao.quantization", double)


def names(model):
    """Which layers are quantized."""
    return [n for n, m in model.named_modules() if type(getattr(m, "weight", None)).__name__ == "Float8Tensor"]


def _rounded(rows):
    """Rows as e4m3 values times a scale each: 448 is the largest value."""
    scale = rows.detach().float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


class Float8Tensor(torch.Tensor):
    """A weight that was rounded, and whose products round what they are multiplied with."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.nn.functional.linear:
                x, weight, *bias = args
                return function(_rounded(x).to(x.dtype), weight, *bias, **(kwargs or {}))
            return function(*args, **(kwargs or {}))


def _quantize(model, config, filter_fn, device=None):
    assert config == {"granularity": "rows", "set_inductor_config": False}
    for name, module in model.named_modules():
        if filter_fn(module, name):
            weight = _rounded(module.weight).to(module.weight.dtype).detach().as_subclass(Float8Tensor)
            weight._is_param = True
            module.weight = weight
