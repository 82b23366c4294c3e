"""Many generations in one process, with changing methods, sizes and LoRAs, leave nothing behind."""

import gc
import random
import resource
from pipes import PIPES

import pytest
import torch
from peft import LoraConfig

import videosparse
from videosparse import AdaSpaProcessor, DenseProcessor, PAROProcessor, RadialProcessor

GENERATIONS, WARM = 200, 60
SIZES = ((5, 32, 32), (9, 32, 48), (5, 48, 64), (13, 32, 32))
METHODS = {
    "radial": lambda: RadialProcessor(first_steps=0, block=(64, 64)),
    "radial, wide": lambda: RadialProcessor(first_steps=0, decay=2.0),
    "adaspa": lambda: AdaSpaProcessor(density=0.5, first_steps=1, block=(64, 64)),
    "paro": lambda: PAROProcessor(density=0.5, first_steps=1, block=(64, 64)),
    "dense": lambda: DenseProcessor(),
    "stock": None,
}


def held() -> int:
    """Bytes of all tensors that are alive, but for those of tracing, which hold none."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_memory_stays_flat():
    rng = random.Random(0)
    kind = PIPES["wan"]
    pipe = kind.build()
    steps = [(size, name, lora) for size in SIZES for name in METHODS for lora in (False, True)]
    found = {}
    for n in range(GENERATIONS):
        # every combination comes once before memory is looked at
        (frames, height, width), name, lora = steps[n] if n < len(steps) else rng.choice(steps)
        if METHODS[name] is None:
            videosparse.restore(pipe)
        else:
            pipe.set_attn_processor(METHODS[name]())
        if lora:
            pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="soak")
        kind.run(pipe, num_frames=frames, height=height, width=width)
        if lora:
            pipe.transformer.delete_adapters("soak")
        if n in (WARM, GENERATIONS - 1):
            videosparse.restore(pipe)
            found[n] = held(), resident()
    (before, start), (after, end) = found.values()
    assert after <= before, f"{after - before} bytes of tensors were left"
    assert end - start < 48 * 2**20
