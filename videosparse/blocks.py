"""Which key blocks each query block reads: `BlockMap` is the picture, `BlockIndex` the lists that kernels walk, and
`PackedIndex` what a method that searches keeps between steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from videosparse.checking import check_device, check_flag, check_tensor, check_whole, shown
from videosparse.layout import TokenLayout, ceil_div, check_is_layout

BLOCK_SIZES = (64, 128)
_SHADES = " ░▒▓█"

INDEX_LIMIT = 2**31 - 1
"""Most rows, and most entries, of a `BlockIndex`: places in its lists are int32."""

SHORT_IDS = 2**15
"""From so many columns on the ids of a `BlockIndex` are int32; see `id_dtype`."""

SELECTION_LIMIT = 16_384
"""Most columns of a map that is searched for: the registers of one program hold a row of masses."""

# Lists are made from slabs of this many blocks, so that temporaries stay near 100 MB whatever the length.
_SLAB = 2**22

# Rows at the end of the work order that go longest first. On an H200, counts that grow as the square of a uniform
# number cost 14 % more time than even ones with none, and 3 % with this.
_LAST_ROWS = 1024


def id_dtype(columns: int) -> torch.dtype:
    """What the ids of lists over so many blocks are: int16 where they fit, else int32.

    The shape alone decides, so that nothing waits for a device and a kernel has two binaries at most.
    """
    return torch.int16 if columns < SHORT_IDS else torch.int32


def check_block(block: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless `block` is (query rows, key rows), each 64 or 128."""
    if not isinstance(block, tuple):
        raise TypeError(f"block must be a tuple (query rows, key rows) (got {block!r}).")
    if len(block) != 2 or any(not isinstance(b, int) or b not in BLOCK_SIZES for b in block):
        raise ValueError(f"block must be (query rows, key rows), each 64 or 128 (got {block}); try (128, 64).")


@dataclass(frozen=True, eq=False)
class BlockMap:
    """A block-sparse attention pattern together with the geometry it is meant for.

    Args:
        keep: bool [B or 1, H or 1, Mq, Nk]; True where query block p reads key block q. A 1 is shared, never expanded.
        block: (query rows, key rows) of a block.
        q_len, kv_len: tokens covered, at least 1; the last block of each side may be partial.

    Raises:
        TypeError: keep is no bool tensor, block no tuple, or a length no int.
        ValueError: keep does not cover ceil(q_len / block[0]) x ceil(kv_len / block[1]) blocks, or is for no sample or
            head; a length below 1; a block size that there is not.
    """

    keep: torch.Tensor
    block: tuple[int, int]
    q_len: int
    kv_len: int

    def __post_init__(self) -> None:
        check_block(self.block)
        for name in ("q_len", "kv_len"):
            check_whole(f"BlockMap.{name}", getattr(self, name))
        check_tensor("BlockMap.keep", self.keep, " of bool [B, H, Mq, Nk]")
        if self.keep.dtype != torch.bool:
            raise TypeError(f"BlockMap.keep must be bool (got {self.keep.dtype}).")
        expected = (ceil_div(self.q_len, self.block[0]), ceil_div(self.kv_len, self.block[1]))
        if self.keep.dim() != 4 or tuple(self.keep.shape[2:]) != expected:
            raise ValueError(
                f"BlockMap.keep must be [B, H, {expected[0]}, {expected[1]}] for {self.q_len} x {self.kv_len} tokens "
                f"in blocks of {self.block} (got {list(self.keep.shape)})."
            )
        if not self.keep.shape[0] or not self.keep.shape[1]:
            raise ValueError(
                f"BlockMap.keep must be for at least 1 sample and 1 head (got {list(self.keep.shape)}); 1 serves all."
            )

    @classmethod
    def full(cls, layout: TokenLayout, block: tuple[int, int], device: torch.device | str = "cpu") -> BlockMap:
        """The map that keeps every block, for all samples and heads: dense attention through the sparse door.

        Args:
            layout: the sequence; its length is that of queries and keys.
            block: (query rows, key rows) of a block, each 64 or 128.
            device: where the map is made.

        Raises:
            TypeError, ValueError: an argument of another type, or a block or device that there is not.
        """
        check_is_layout(layout)
        check_block(block)
        device = check_device(device)
        size = ceil_div(layout.length, block[0]), ceil_div(layout.length, block[1])
        return cls(torch.ones(1, 1, *size, dtype=torch.bool, device=device), block, layout.length, layout.length)

    @property
    def density(self) -> float:
        """Kept blocks / all blocks, text and forced blocks included, 0..1. Waits for the device."""
        return float(self.keep.float().mean())

    def video_density(self, layout: TokenLayout) -> float:
        """Kept blocks / all blocks among those where both sides are video, 0..1. Waits for the device.

        Raises:
            TypeError: layout is no `TokenLayout`.
        """
        check_is_layout(layout)
        rows, cols = (ceil_div(layout.video, b) for b in self.block)
        return float(self.keep[:, :, :rows, :cols].float().mean())

    def index(self, capacity: int | None = None) -> BlockIndex:
        """The query-major lists of this map (see `BlockIndex`).

        Args:
            capacity: entries to allocate when the number of kept blocks is bounded by something the host knows; then
                nothing waits for the device. None counts them, which waits once.

        Raises:
            TypeError: capacity is no int.
            ValueError: the entries do not fit int32, or capacity is too small. On a GPU, where counting would wait, a
                capacity that is too small is reported by the device itself, later; lists are cut, never overrun.
        """
        return BlockIndex.build(self, capacity)

    def transpose(self) -> BlockMap:
        """Which query blocks each key block is read by: the key-major map that dk/dv walks."""
        return BlockMap(self.keep.transpose(2, 3).contiguous(), (self.block[1], self.block[0]), self.kv_len, self.q_len)

    def to_tokens(self) -> torch.Tensor:
        """Bool [B or 1, H or 1, q_len, kv_len]. For references and pictures of small maps: it has L x L entries."""
        rows = self.keep.repeat_interleave(self.block[0], 2)[:, :, : self.q_len]
        return rows.repeat_interleave(self.block[1], 3)[..., : self.kv_len]

    def picture(self, width: int = 64) -> str:
        """The map of the first sample and head as text, at most `width` characters wide; darker is denser.

        Raises:
            TypeError, ValueError: width is no int of at least 1.
        """
        check_whole("width", width)
        rows, cols = self.keep.shape[2:]
        wide = min(width, cols)
        high = max(1, min(ceil_div(wide, 2), rows))
        share = torch.nn.functional.adaptive_avg_pool2d(self.keep[0, 0].float().cpu()[None], (high, wide))[0]
        level = (share * (len(_SHADES) - 1)).ceil().long()
        return "\n".join("".join(_SHADES[v] for v in line) for line in level.tolist())

    def save_png(self, path: str | Path, size: int = 1024) -> None:
        """Draw the map of the first sample and head, kept blocks dark. Waits for the device.

        Args:
            path: of the picture, whose ending says of which format.
            size: most pixels a side; a larger map is averaged.

        Raises:
            OSError, ValueError: the file cannot be written, or its ending names no format.
        """
        from PIL import Image

        keep = self.keep[0, 0].float().cpu()
        if max(keep.shape) > size:
            rows, cols = (min(n, size) for n in keep.shape)
            keep = torch.nn.functional.adaptive_avg_pool2d(keep[None], (rows, cols))[0]
        gray = (255 - 225 * keep).to(torch.uint8)
        zoom = max(1, size // max(gray.shape))
        gray = gray.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
        Image.frombytes("L", (gray.shape[1], gray.shape[0]), bytes(gray.flatten().tolist())).save(path)

    def __str__(self) -> str:
        b, h, rows, cols = self.keep.shape
        shared = f"{b if b > 1 else 'all'} samples, {h if h > 1 else 'all'} heads"
        size = f"{rows} x {cols} blocks of {self.block[0]} x {self.block[1]}"
        return f"BlockMap {size}, {shared}, density {self.density:.3f}\n{self.picture()}"


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """What kernels read: for each block row its kept blocks, ascending, rows one after another.

    Rows are numbered (sample * heads + head) * rows + row over the samples and heads of the *map*, so a map shared by
    all heads stays one set of rows.

    Args:
        row_ptr: int32 [samples * heads * rows + 1]; row r owns ids[row_ptr[r] : row_ptr[r + 1]].
        ids: int16 or int32 [capacity], see `id_dtype`; what lies beyond row_ptr[-1] is undefined. Within a row they
            ascend, each block once, and kernels rely on it: only the tiles at the end of a row are masked by position,
            where the last block of the video and text are. Elsewhere nobody looks, since that would wait for the
            device: lists made by hand are checked by plain torch (`KernelOptions(backend="torch")`, or on a CPU), and
            on Triton wrong ones give wrong numbers.
        order: int32 [samples * heads * rows + 1], the rows in the order in which to start them, then how many of them
            are long; see `work_order`. A shared map is worked on once per sample or head that shares it: first the long
            rows of one after another, then the other rows of one after another.
        shape: (samples, heads, rows, columns) of the map.
        block: (row tokens, column tokens) of a block.
        q_len, kv_len: tokens along rows and columns.

    Attributes:
        key_major: the lists of the same map turned, key block by key block, which gradients of keys and values walk;
            None until `prepare_backward`.
    """

    row_ptr: torch.Tensor
    ids: torch.Tensor
    order: torch.Tensor
    shape: tuple[int, int, int, int]
    block: tuple[int, int]
    q_len: int
    kv_len: int
    key_major: BlockIndex | None = field(default=None, init=False, repr=False)

    @classmethod
    def build(cls, block_map: BlockMap, capacity: int | None = None) -> BlockIndex:
        """The query-major lists of `block_map`; for capacity and errors see `BlockMap.index`.

        Raises:
            TypeError: block_map is no `BlockMap`; and as there.
            ValueError: as there.
        """
        if not isinstance(block_map, BlockMap):
            raise TypeError(f"block_map must be a BlockMap (got {shown(block_map)}); pass BlockMap(keep, block, ...).")
        if capacity is not None:
            check_whole("capacity", capacity, 0)
        keep = block_map.keep
        b, h, rows, cols = (int(n) for n in keep.shape)
        if (capacity is not None and capacity > INDEX_LIMIT) or b * h * rows > INDEX_LIMIT:
            raise ValueError(
                f"A block index holds at most {INDEX_LIMIT} rows and entries (got {b * h * rows} rows, capacity "
                f"{capacity}); use larger blocks, or a map shared by heads."
            )
        # plain tensors also when the caller is in inference mode: only those tell caches when they change
        with torch.inference_mode(False):
            row_ptr, ids, order = _lists(keep.reshape(b * h * rows, cols), capacity)
        return cls(row_ptr, ids, order, (b, h, rows, cols), block_map.block, block_map.q_len, block_map.kv_len)

    def prepare_backward(self) -> None:
        """Build `key_major`, once: the lists must not change afterwards. Never waits for the device.

        `attend` does this by itself where a gradient is needed, but not while it is compiled: call it before.
        """
        if self.key_major is None:
            # plain tensors also when the caller is in inference mode: the next caller may be training
            with torch.inference_mode(False):
                object.__setattr__(self, "key_major", self.transpose())

    def transpose(self) -> BlockIndex:
        """The lists of the transposed map, of the same capacity. Never waits for the device.

        Raises:
            TypeError, ValueError: as `check`; or the transposed map has more rows than an index holds.
        """
        self.check()
        samples, heads, rows, cols = self.shape
        if samples * heads * cols >= INDEX_LIMIT:
            raise ValueError(
                f"A transposed map of {samples * heads * cols} rows does not fit an index; use larger blocks."
            )
        row_ptr, ids, order = transpose_lists(self.row_ptr, self.ids, self.shape)
        return BlockIndex(
            row_ptr, ids, order, (samples, heads, cols, rows), (self.block[1], self.block[0]), self.kv_len, self.q_len
        )

    def check(self) -> None:
        """Raise TypeError or ValueError where a part is of another type, size or device than the rest asks for.

        Reads no values: nothing waits for the device.
        """
        self.check_geometry()
        samples, heads, rows, cols = self.shape
        count = samples * heads * rows
        short = id_dtype(cols)  # int32 is right at any size
        sizes = {"row_ptr": count + 1, "ids": None, "order": count + 1}
        for name, size in sizes.items():
            x = getattr(self, name)
            wrong_size = x.dim() != 1 or (size is not None and x.shape[0] != size)
            is_short = name == "ids" and x.dtype == short
            if (x.dtype != torch.int32 and not is_short) or wrong_size or not x.is_contiguous():
                kind = "int16 or int32" if name == "ids" and short == torch.int16 else "int32"
                expected = "capacity" if size is None else size
                spread = "" if x.is_contiguous() else ", not contiguous"
                raise ValueError(
                    f"BlockIndex.{name} must be {kind} [{expected}] (got {x.dtype} {list(x.shape)}{spread}); "
                    "build it with BlockMap.index()."
                )
            if x.device != self.row_ptr.device:
                raise ValueError(
                    f"BlockIndex.{name} must be on {self.row_ptr.device} like row_ptr (got {x.device}); build it there."
                )

    def check_geometry(self) -> None:
        """Raise TypeError or ValueError where a part is of another type, or a number out of range."""
        for name in ("row_ptr", "ids", "order"):
            check_tensor(f"BlockIndex.{name}", getattr(self, name), ", as BlockMap.index() makes it")
        check_block(self.block)
        if not isinstance(self.shape, tuple) or len(self.shape) != 4:
            raise TypeError(
                f"BlockIndex.shape must be a tuple (samples, heads, rows, columns) (got {shown(self.shape)})."
            )
        for name, value in zip(("samples", "heads", "rows", "columns"), self.shape, strict=True):
            check_whole(f"BlockIndex.shape: {name}", value)
        for name in ("q_len", "kv_len"):
            check_whole(f"BlockIndex.{name}", getattr(self, name))

    @property
    def bytes(self) -> int:
        """Memory of the lists on their device, of the key-major ones, too."""
        more = 0 if self.key_major is None else self.key_major.bytes
        return more + sum(t.numel() * t.element_size() for t in (self.row_ptr, self.ids, self.order))


@dataclass(frozen=True, eq=False)
class PackedIndex:
    """A map that is found while a video is made, a bit a block: buffers of fixed size, written in place.

    At density .2 lists take three times the memory of bits. So a method that searches keeps this between steps, and
    each call expands its lists on the device (`kernels.selection`), which costs a hundredth of it. Wan 14B at 720p
    keeps .28 GB so, not .9 GB.

    Args:
        bits: uint8 [samples, heads, rows, ceil(columns / 8)], lowest bit first; each row starts on a byte, and the
            unused bits of its last byte are 0.
        row_ptr: int32 [samples * heads * rows + 1], as in `BlockIndex`.
        order: int32 [samples * heads * rows + 1], as in `BlockIndex`.
        capacity: most blocks that the map may ever keep, known on the host.
        shape: (samples, heads, rows, columns) of the map.
        block: (row tokens, column tokens) of a block.
        q_len, kv_len: tokens along rows and columns.
    """

    bits: torch.Tensor
    row_ptr: torch.Tensor
    order: torch.Tensor
    capacity: int
    shape: tuple[int, int, int, int]
    block: tuple[int, int]
    q_len: int
    kv_len: int

    @classmethod
    def allocate(
        cls,
        layout: TokenLayout,
        block: tuple[int, int],
        samples: int,
        heads: int,
        capacity: int,
        device: torch.device | str = "cpu",
        pinned: bool = False,
    ) -> PackedIndex:
        """An empty map over `layout.length` tokens.

        Args:
            layout: the sequence.
            block: (query rows, key rows) of a block, each 64 or 128.
            samples, heads: that have maps of their own, each at least 1.
            capacity: most blocks that the map may ever keep, at least 1.
            device: where the buffers are.
            pinned: in page-locked memory of the CPU.

        Raises:
            TypeError: an argument of another type.
            ValueError: a number below 1, or a block or device that there is not; the map has more rows or columns, or
                may keep more blocks, than can be selected and indexed.
        """
        check_is_layout(layout)
        check_block(block)
        for name, value in {"samples": samples, "heads": heads, "capacity": capacity}.items():
            check_whole(name, value)
        check_flag("pinned", pinned)
        device = check_device(device)
        rows, columns = ceil_div(layout.length, block[0]), ceil_div(layout.length, block[1])
        count = samples * heads * rows
        if max(count, capacity) > INDEX_LIMIT:
            raise ValueError(
                f"A block index holds at most {INDEX_LIMIT} rows and entries (got {count} rows, capacity {capacity}); "
                "use a lower density, larger blocks or a smaller batch."
            )
        if columns > SELECTION_LIMIT:
            raise ValueError(
                f"Blocks are selected in rows of at most {SELECTION_LIMIT} (got {columns}); use larger blocks, or a "
                "method with static maps for so long a sequence."
            )
        shape = (samples, heads, rows, columns)
        size = (samples, heads, rows, ceil_div(columns, 8))
        # plain tensors also when the caller is in inference mode: the next call that writes them may not be
        with torch.inference_mode(False):
            bits = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)
            row_ptr, order = torch.zeros(2, count + 1, dtype=torch.int32, device=device, pin_memory=pinned)
        return cls(bits, row_ptr, order, capacity, shape, block, layout.length, layout.length)

    def to(self, device: torch.device | str) -> PackedIndex:
        """A copy on `device`, ordered like the kernels of its current stream; the host does not wait."""
        bits, row_ptr, order = (t.to(device, non_blocking=True, copy=True) for t in self._tensors)
        return replace(self, bits=bits, row_ptr=row_ptr, order=order)

    def copy_(self, other: PackedIndex) -> None:
        """Take over the map of `other`, which may be on another device; for pinned memory the host does not wait."""
        for mine, its in zip(self._tensors, other._tensors, strict=True):
            mine.copy_(its, non_blocking=True)

    def block_map(self) -> BlockMap:
        """The map as a `BlockMap`, for tests and pictures: a byte a block."""
        return BlockMap(unpack_rows(self.bits, self.shape[3]), self.block, self.q_len, self.kv_len)

    @property
    def bytes(self) -> int:
        """Memory of the buffers on their device."""
        return sum(t.numel() * t.element_size() for t in self._tensors)

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.bits, self.row_ptr, self.order


def pack_rows(keep: torch.Tensor) -> torch.Tensor:
    """uint8 [..., ceil(N / 8)] from bool [..., N]: eight blocks a byte, lowest bit first, each row on its own bytes."""
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % 8)).to(torch.uint8)
    padded = padded.view(*keep.shape[:-1], padded.shape[-1] // 8, 8)
    weight = 2 ** torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded * weight).sum(-1, dtype=torch.uint8)


def unpack_rows(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """bool [..., columns] from uint8 [..., ceil(columns / 8)]; the inverse of `pack_rows`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    keep: torch.Tensor = (bits[..., None] >> shifts & 1).flatten(-2)
    return keep[..., :columns].bool()


def transpose_lists(
    row_ptr: torch.Tensor, ids: torch.Tensor, shape: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """row_ptr, ids and order of the transposed map; `shape` = (samples, heads, rows, columns) of the map."""
    samples, heads, rows, cols = shape
    place = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    row = torch.searchsorted(row_ptr, place, right=True, out_int32=True) - 1
    column = row // rows * cols + ids
    # what lies beyond the last row sorts behind everything
    column = torch.where(place < row_ptr[-1], column, samples * heads * cols)
    column, source = column.sort(stable=True)
    bounds = torch.arange(samples * heads * cols + 1, dtype=torch.int32, device=ids.device)
    turned_ptr = torch.searchsorted(column, bounds, out_int32=True)
    turned_ids = (row % rows).to(id_dtype(rows))[source]
    return turned_ptr, turned_ids, work_order(turned_ptr.diff().long())


def work_order(counts: torch.Tensor) -> torch.Tensor:
    """The order in which to start rows, so that no row is left over at the end and neighbours in time share keys.

    First come the long rows, those with more than twice the mean number of blocks: by how many times the mean they are
    long, in powers of two, else as numbered. Then the other rows as numbered, sample by sample and head by head,
    because the rows of one head find its keys in the cache. Only the last ones go longest first: what is started
    last should be short.

    Args:
        counts: int64 [rows], blocks of each row.

    Returns:
        int32 [rows + 1]: a permutation of the rows, then the number of long ones. Nothing waits for the device.
    """
    times = counts * counts.numel() / counts.sum().clamp(min=1)
    long = times > 2
    other = (~long).cumsum(0)  # 1 for the first row that is not long
    last = ~long & (other > other[-1:] - _LAST_ROWS)
    below = counts - counts.max() - 1 if counts.numel() else counts
    key = torch.where(long, times.clamp(min=1).log2().long(), torch.where(last, below, 0))
    return torch.cat([key.argsort(descending=True, stable=True), long.sum(0, keepdim=True)]).int()


def _lists(flat: torch.Tensor, capacity: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """row_ptr, ids and order of the rows of a map, bool [rows, columns]; see `BlockMap.index`."""
    counts = flat.sum(1, dtype=torch.int64)
    row_ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if capacity is not None and flat.is_cuda:
        torch._assert_async(row_ptr[-1] <= capacity, f"The map keeps more blocks than the capacity of {capacity}.")
        row_ptr.clamp_(max=capacity)
    else:
        capacity = _checked_capacity(int(row_ptr[-1]), capacity)
    return row_ptr.int(), compact_rows(flat, row_ptr, capacity), work_order(counts)


def _checked_capacity(total: int, capacity: int | None) -> int:
    """Entries to allocate for a map that keeps `total` blocks."""
    if capacity is not None and total > capacity:
        raise ValueError(f"The map keeps {total} blocks, more than the capacity of {capacity}; pass {total} or more.")
    if total > INDEX_LIMIT:
        raise ValueError(
            f"The map keeps {total} blocks, an index holds at most {INDEX_LIMIT}; use larger blocks or a lower density."
        )
    return total if capacity is None else capacity


def compact_rows(flat: torch.Tensor, row_ptr: torch.Tensor, capacity: int) -> torch.Tensor:
    """Column numbers of the kept entries of bool [rows, cols], row after row: ids [capacity]; no device sync."""
    rows, cols = flat.shape
    column = torch.arange(cols, dtype=id_dtype(cols), device=flat.device)
    ids = torch.zeros(capacity + 1, dtype=column.dtype, device=flat.device)
    slab = max(1, _SLAB // cols)
    for start in range(0, rows, slab):
        part = flat[start : start + slab]
        place = part.cumsum(1, dtype=torch.int64) - 1 + row_ptr[start : start + part.shape[0], None]
        # dropped entries (and any beyond the capacity) go to one extra slot that is cut off
        place = torch.where(part, place, capacity).clamp_(max=capacity)
        ids.scatter_(0, place.flatten(), column.expand_as(part).reshape(-1))
    return ids[:capacity]
