"""Runs a Gluon kernel's own source on the CPU: its three warp roles as threads, its barriers, copies and products.

What is late on a GPU is late here. Copies arrive from another thread, in any order; products read shared memory when
they are waited for, and output leaves it when its departure is waited for. So a slot that is freed too early, or read
without waiting, gives wrong numbers or NaN, and a wrong phase a deadlock, which ends in a TimeoutError.
"""

import queue
import random
import threading
import types
from types import SimpleNamespace

import torch
import triton

from videosparse.kernels import hopper_kernel
from videosparse.layout import ceil_div

PATIENCE = 60  # seconds


class Value(torch.Tensor):
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else super().to(dtype)


def value(x):
    return x.as_subclass(Value)


def plain(x):
    """A Python number for tensors without dimensions, as scalars are in the kernel."""
    return x.item() if isinstance(x, torch.Tensor) and x.dim() == 0 else x


class Pointer:
    """An element of a tensor, or several."""

    def __init__(self, memory, offset=0):
        self.memory, self.offset = memory.view(-1), offset

    def __add__(self, other):
        return Pointer(self.memory, self.offset + other)


def load(pointer, mask=True, other=0):
    if isinstance(pointer.offset, int):
        return pointer.memory[pointer.offset].item() if mask else other
    mask = torch.as_tensor(mask).expand_as(pointer.offset)
    inside = pointer.offset.where(mask, torch.zeros_like(pointer.offset))
    return value(torch.where(mask, pointer.memory[inside.long()], other))


def store(pointer, x, mask):
    mask = mask.expand(x.shape)
    pointer.memory[pointer.offset[mask].long()] = x[mask].to(pointer.memory.dtype)


def atomic_add(pointer, x, mask, sem=None):
    """Only one element takes part, as in the kernel."""
    with _lock:
        before = pointer.memory[0].clone()
        pointer.memory[0] += x[mask].sum()
    return value(torch.where(mask, before, -(10**9)))


def spoil(memory):
    """Fill memory with NaN, or with integers that mean nothing."""
    if memory.element_size() == 1:
        memory.view(torch.uint8).fill_(0x7F)  # NaN in FP8 e4m3
    else:
        memory.fill_(float("nan") if memory.is_floating_point() else -(10**9))


class Shared:
    """Shared memory, or a view of it; new memory holds NaN."""

    def __init__(self, memory, layout=None):
        self.memory, self.layout = memory, layout

    dtype = property(lambda self: self.memory.dtype)
    shape = property(lambda self: self.memory.shape)

    def index(self, i):
        assert 0 <= i < self.memory.shape[0]
        return Shared(self.memory[i])

    def reshape(self, shape):
        return Shared(self.memory.view(shape))

    def permute(self, order):
        return Shared(self.memory.permute(order))

    def load(self, layout):
        return value(self.memory.clone())

    def store(self, x):
        self.memory.copy_(x)

    def parts(self, dtype, shape, layout):
        """The swizzled layout keeps some columns of all rows together, so parts are [columns, rows] of a tile."""
        if len(shape) < 5:
            return Shared(self.memory.view(shape))
        tile, rows, columns = self.memory[0, 0], shape[3], shape[4]
        group = tile.shape[0] // rows
        views = [tile[i % group * rows :][:rows, i // group * columns :][:, :columns] for i in range(shape[0])]
        return SimpleNamespace(index=lambda i: Shared(views[i]))


_lock = threading.Condition()


class Barrier:
    """An mbarrier: its phase ends when all have arrived and all bytes are there."""

    def __init__(self):
        self.count = self.pending = self.bytes = self.phase = 0

    def change(self, arrivals, size):
        with _lock:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0, "more arrivals than a phase has"
            if self.pending == 0 and self.bytes == 0:
                self.pending, self.phase = self.count, self.phase ^ 1
                _lock.notify_all()


def init(barrier, count):
    barrier.count = barrier.pending = count


def wait(barrier, phase, pred=True):
    if not pred:
        return
    with _lock:
        if not _lock.wait_for(lambda: _failure or barrier.phase != phase, PATIENCE):
            raise TimeoutError("deadlock: a barrier is waited for in vain")
        if _failure:
            raise _failure[0]


class CopyEngine:
    """Copies tiles after a while, sometimes in another order."""

    def __init__(self):
        self.orders = queue.Queue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        while (first := self.orders.get()) is not None:
            batch = [first]
            while not self.orders.empty() and len(batch) < 3 and self.orders.queue[0] is not None:
                batch.append(self.orders.get())
            random.shuffle(batch)
            for desc, place, barrier, target in batch:
                target.copy_(read_tile(desc, place))
                try:
                    barrier.change(0, -target.numel() * target.element_size())
                except AssertionError as error:
                    fail(error)


def read_tile(desc, place):
    """A tile of a tensor [B, H, L, D], or [B, H, L], 0 outside."""
    sample, head, row, column = place if len(place) == 4 else (*place[:2], 0, place[2])
    rows, columns = desc.block
    tile = torch.zeros(rows, columns, dtype=desc.dtype)
    source = desc.tensor[sample, head, max(row, 0) : row + rows, column : column + columns]
    if row >= 0:
        tile[: source.shape[0], : source.shape[1]] = source
    return tile


def load_tile(desc, place, barrier, target, pred=True):
    if pred:
        spoil(target.memory)
        _here.engine.orders.put((desc, place, barrier, target.memory.view(desc.block)))


def store_tile(desc, place, source):
    _here.leaving.append((desc, place, source))


def store_wait(pending):
    while len(_here.leaving) > pending:
        desc, (sample, head, row, column), source = _here.leaving.pop(0)
        target = desc.tensor[sample, head, row : row + desc.block[0], column : column + desc.block[1]]
        target.copy_(source.memory.reshape(desc.block)[: target.shape[0]])


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async
    token = SimpleNamespace(a=a, b=b, acc=acc if use_acc else 0, result=None)
    _here.products.append(token)
    return token


def warpgroup_mma_wait(outstanding, tokens):
    while len(_here.products) > outstanding:
        token = _here.products.pop(0)
        a, b = (x.memory if isinstance(x, Shared) else x for x in (token.a, token.b))
        product = a.float() @ b.float()  # exact for 8-bit integers
        token.result = value(token.acc + (product.int() if a.dtype == torch.int8 else product))
    (token,) = tokens
    assert token.result is not None, "read before it was waited for"
    return token.result


_here = threading.local()
_failure = []


def fail(error):
    """Stop all roles; the first error is raised."""
    with _lock:
        _failure.append(error)
        _lock.notify_all()


def warp_specialize(roles, warps, registers):
    engine, program = CopyEngine(), (_here.program, _here.programs)

    def run(function, arguments):
        _here.engine, _here.leaving, _here.products = engine, [], []
        _here.program, _here.programs = program
        try:
            function(*arguments)
            assert not _here.leaving
            assert not _here.products
        except BaseException as error:
            fail(error)

    threads = [threading.Thread(target=run, args=role) for role in roles]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    engine.orders.put(None)
    engine.thread.join()  # else a late copy would fail in the next launch
    if _failure:
        raise _failure[0]


def allocate_shared_memory(dtype, shape, layout):
    if dtype == "barrier":
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[i])
    memory = torch.empty(shape, dtype=dtype)
    spoil(memory)
    return Shared(memory, layout)


def inline_assembly(code, constraints, arguments, **kwargs):
    """Weights as FP8, packed and unpacked: four tensors in and out; products; or nothing."""
    if len(arguments) == 4:
        return [x.to(torch.float8_e4m3fn) for x in arguments]
    if "vote" in code:  # some warps do without products by 1
        return value(arguments[0] * arguments[1])
    return arguments[0]


def where(condition, a, b):
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    return value(torch.where(condition, a, b))


def extremum(choose, of_two):
    def pick(a, b):
        if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
            return choose(a, b)
        if all(isinstance(x, torch.Tensor) and x.dtype == torch.int32 for x in (a, b)):
            return value(of_two(a, b))
        return value(of_two(*(torch.as_tensor(x, dtype=torch.float32) for x in (a, b))))

    return pick


def nothing(*args, **kwargs):
    return None


GL = SimpleNamespace(
    int8=torch.int8, int16=torch.int16, int32=torch.int32, int64="barrier", float32=torch.float32,
    float8e4nv=torch.float8_e4m3fn,
    BlockedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing, SwizzledSharedLayout=nothing,
    NVMMADistributedLayout=nothing, convert_layout=lambda x, layout: x, static_range=range, cdiv=ceil_div,
    program_id=lambda axis: _here.program, num_programs=lambda axis: _here.programs,
    arange=lambda start, stop, layout: value(torch.arange(start, stop, dtype=torch.int32)),
    full=lambda shape, x, dtype, layout: value(torch.full(shape, x, dtype=dtype)),
    zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
    where=where, maximum=extremum(max, torch.maximum), minimum=extremum(min, torch.minimum),
    max=lambda x, axis: plain(x.amax(axis)), sum=lambda x, axis: plain(x.sum(axis)),
    cast=lambda x, dtype: x, reshape=lambda x, shape: x.reshape(shape), permute=torch.permute,
    split=lambda x: x.unbind(-1), join=lambda a, b: torch.stack([a, b], -1), inline_asm_elementwise=inline_assembly,
    exp2=torch.exp2, log2=torch.log2,
    load=load, store=store, atomic_add=atomic_add,
    allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize,
)  # fmt: skip


STAND_INS = {
    "gl": GL,
    "mbarrier": SimpleNamespace(
        init=init, wait=wait, MBarrierLayout=nothing,
        expect=lambda barrier, size: barrier.change(1, size),
        arrive=lambda barrier, pred=True: barrier.change(1, 0) if pred else None,
    ),
    "tma": SimpleNamespace(store_wait=store_wait),
    "load_tile": load_tile, "store_tile": store_tile, "thread_barrier": nothing, "reinterpret": Shared.parts,
    "fence_async_shared": nothing, "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
}  # fmt: skip


def kernel_on_cpu(*modules):
    """The functions of modules as plain Python over the stand-ins; what is in several is that of the last."""
    names = {}
    for module in modules:
        for name, x in vars(module).items():
            function = getattr(x, "fn", None)
            if isinstance(x, triton.language.constexpr):
                names[name] = x.value
            elif isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                names[name] = types.FunctionType(function.__code__, names, name, function.__defaults__)
    names |= STAND_INS
    return names


def describe_tiles(x, *box):
    """The same of a tensor [B, H, L, D], or of numbers [B, H, L]."""
    x = x[:, :, None] if x.dim() == 3 else x
    return SimpleNamespace(tensor=x, block=(1, *box)[-2:], dtype=x.dtype, layout=None)


def describe(x, rows, columns):
    """A stand-in of the copy engine's descriptor of a tensor [B, L, H, D]."""
    return SimpleNamespace(tensor=x.transpose(1, 2), block=(rows, columns), dtype=x.dtype, layout=None)


class Kernel:
    """Takes the place of the compiled kernel: kernel[grid](*arguments)."""

    def __init__(self, name="forward_kernel", *modules):
        self.run = kernel_on_cpu(hopper_kernel, *modules)[name]

    def __getitem__(self, grid):
        def launch(*arguments):
            _failure.clear()
            arguments = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            for program in random.sample(range(grid[0]), grid[0]):
                _here.program, _here.programs = program, grid[0]
                self.run(*arguments)

        return launch
