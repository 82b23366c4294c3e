# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Block-sparse attention for Hopper (sm_90), the kernel, in Gluon; `hopper_forward` launches it.

Shapes
    q, k, v       [B, L, H, D] by strides of 16 bytes, fp16 or bf16, D 64 or 128
    out           [B, L, H, D] contiguous
    lse           fp32 [B, H, L], natural log
    row_ptr       int32 [map_rows + 1], map_rows = samples * heads * rows of the map
    ids, order    int16 or int32 [capacity], int32 [map_rows + 1], see `BlockIndex`
    lens          int32 [B], where each sample's text ends
    tail          [B, L - T, H, D], the values from position T = video // KEYS * KEYS on, see `value_tail`
    table         int32 [H, 8], see `ordering.axis_table`
Positions [0, video) are video, [text_start, lens[b]) are text, what all others hold never counts.

One persistent program per multiprocessor. A producer warp draws rows (128 queries each) from a counter and copies
their queries, keys and values to shared memory; two groups of four warps, the consumers, take 64 queries each. A tile
is 128 keys: one list entry of 128 or two of 64. The lists are walked from their end, where the blocks are that may
hold something else than tokens (the last video block, text): only these `masked` tiles look at positions. A row's
first scores are multiplied beside the last product of the row before it, and its output leaves while the next one runs.
With a token order its rows leave one by one to their raster places. Gluon is experimental: Triton 3.6 to 3.9 work.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN_2 = gl.constexpr(0.6931471805599453)
FLOOR = gl.constexpr(-1.0e30)  # below every score, yet finite: a tile without keys gives 0, no NaN
FAR = gl.constexpr(1 << 23)  # a block outside every tensor: it reads as zeros
QUERY_SLOTS = gl.constexpr(3)  # the row at work, the one ahead, and the one whose output is still leaving
MAIL = gl.constexpr(5)  # what a consumer is told of a row: sample and head, first query, tiles, masked, end
WAY_BACK = gl.constexpr(5)  # with a token order, what it is told behind all mail: the way back to raster order
REGISTERS = gl.constexpr([232, 40])  # a thread of the second consumer, and of the producer; the first takes the rest
TAIL_BLOCKS = gl.constexpr(128)  # entries at the end of a list among which the masked ones are counted

# Triton 3.7 renamed these
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.constexpr_function
def accumulator(columns, bits=16):
    """Layout of a product of 64 rows by one consumer, of factors of so many bits."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 256 // bits])


@gluon.constexpr_function
def _slots(head_dim):
    """Tiles of keys, and of values, that fit shared memory."""
    return 256 // head_dim


@gluon.jit
def slot_of(n, SLOTS: gl.constexpr):
    """(slot, phase of its barriers) of the n-th tile."""
    if SLOTS & (SLOTS - 1):
        return n % SLOTS, (n // SLOTS) & 1
    else:
        return n & (SLOTS - 1), (n & SLOTS) // SLOTS


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The slot after this one, and the phase of its barriers, for any number of slots."""
    wrap = slot + 1 == SLOTS
    return gl.where(wrap, 0, slot + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def draw(next_ptr):
    """Draw a number, for `drawn` to read later: until then nothing waits for memory."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.atomic_add(next_ptr + lane * 0, lane * 0 + 1, mask=lane == 0, sem="relaxed")


@gluon.jit
def drawn(ticket):
    """The number that was drawn."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.sum(gl.where(lane == 0, ticket, 0), 0)


@gluon.jit
def row_of_item(item, lists, work, SPARSE: gl.constexpr):
    """(row of the lists, block row, sample, head) of a piece of work: the long rows first, then head by head."""
    order_ptr = lists[2]
    _, rows, heads, map_rows, map_heads, shares = work
    row = item
    if SPARSE:
        long = gl.load(order_ptr + map_rows)
        early = item < long * shares
        base = gl.where(early, 0, long)
        span = gl.where(early, long, map_rows - long)
        item -= base * shares
        share = item // span
        row = gl.load(order_ptr + base + item % span)
        sharing = heads // map_heads
        head = (row // rows) % map_heads + share % sharing
        sample = row // (rows * map_heads) + share // sharing
    else:
        head = (item // rows) % heads
        sample = item // rows // heads
    return row, row % rows, sample, head


@gluon.jit
def _entries(row, end, lists, layout, KEYS: gl.constexpr, SPARSE: gl.constexpr, TEXT: gl.constexpr):
    """(first entry, entries, those of them from the tail on) of a row; what holds no token at its end is left out.

    Without lists the first entry is the number of blocks between video and text that are passed over.
    """
    row_ptr, ids_ptr, _ = lists
    _, video, text_start = layout
    tail_block = video // KEYS
    if SPARSE:
        first = gl.load(row_ptr + row)
        count = gl.load(row_ptr + row + 1) - first
        tail = 0
        if TEXT:
            stop = gl.where(end > text_start, gl.maximum(end, video), video)
            place = count - 1 - gl.arange(0, TAIL_BLOCKS, gl.BlockedLayout([TAIL_BLOCKS // 32], [32], [1], [0]))
            ids = gl.load(ids_ptr + first + place, mask=place >= 0, other=-1).to(gl.int32)
            found = gl.sum((ids >= tail_block).to(gl.int32) + ((ids * KEYS >= stop).to(gl.int32) << 16), 0)
            tail = (found & 0xFFFF) - (found >> 16)
            count -= found >> 16
    else:
        blocks = gl.cdiv(video, KEYS)
        first = 0
        count = blocks
        if TEXT:
            first = gl.maximum(text_start // KEYS - blocks, 0)
            count += gl.where(end > text_start, gl.maximum(gl.cdiv(end, KEYS) - first - blocks, 0), 0)
        tail = count - gl.minimum(count, tail_block)
    return first, count, tail


@gluon.jit
def _block(place, first, count, lists, layout, KEYS: gl.constexpr, SPARSE: gl.constexpr, TEXT: gl.constexpr):
    """The key block of an entry of a row, `FAR` past its last."""
    if SPARSE:
        block = gl.cast(gl.load(lists[1] + first + place, mask=place < count, other=0), gl.int32)
    else:
        block = place
        if TEXT:
            block += gl.where(place < gl.cdiv(layout[1], KEYS), 0, first)
    return gl.where(place < count, block, FAR)


@gluon.jit
def plan_row(
    row, block_row, sample, lists, lens_ptr, layout, KEYS: gl.constexpr, SPARSE: gl.constexpr, TEXT: gl.constexpr
):
    """(first entry, entries, tiles, masked, end) of a row.

    `masked` is the number of tiles to mask by position; without TEXT, the number of keys in the first tile.
    """
    group: gl.constexpr = 128 // KEYS
    length, video, text_start = layout
    end = length
    if TEXT:
        end = gl.minimum(gl.load(lens_ptr + sample), length)
    first, count, tail = _entries(row, end, lists, layout, KEYS, SPARSE, TEXT)
    if TEXT:
        # a row wholly in the gap or in padding has nothing to do
        query = block_row * 128
        outside = (query >= video) & ((query + 128 <= text_start) | (query >= end))
        count = gl.where(outside, 0, count)
        tail = gl.where(outside, 0, tail)
    tiles = gl.maximum(gl.cdiv(count, group), 1)
    if TEXT:
        masked = gl.maximum(tiles - (count - tail) // group, 1)
    else:
        last = _block(gl.maximum(count - 1, 0), first, count, lists, layout, KEYS, SPARSE, TEXT)
        keys = (count - (tiles - 1) * group - 1) * KEYS + gl.minimum(length - last * KEYS, KEYS)
        masked = gl.where(count > 0, keys, 0)
    return first, count, tiles, masked, end


@gluon.jit
def tell(box, i, value):
    """Write a number for the consumers."""
    box.index(i).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def told(box, i):
    """Read a number from the producer."""
    return gl.max(box.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _announce(
    desc, sample, head, block_row, tiles, masked, end, table_ptr, queries, mail, slot, phase,
    HEAD_DIM: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Copy a row's queries, and tell the consumers about the row; 0 tiles say that there is none left."""
    slots, full, empty = queries
    mbarrier.wait(empty.index(slot), phase)
    tell(mail, slot * MAIL, (sample << 16) | head)
    tell(mail, slot * MAIL + 1, block_row * 128)
    tell(mail, slot * MAIL + 2, tiles)
    tell(mail, slot * MAIL + 3, masked)
    tell(mail, slot * MAIL + 4, end)
    if ORDER:
        for i in gl.static_range(WAY_BACK):
            tell(mail, QUERY_SLOTS * MAIL + slot * WAY_BACK + i, gl.load(table_ptr + head * 8 + 3 + i))
    thread_barrier()
    mbarrier.expect(full.index(slot), 128 * HEAD_DIM * 2)
    for w in gl.static_range(2):
        place = [sample, head, block_row * 128 + w * 64, 0]
        load_tile(desc, place, full.index(slot), slots.index(slot * 2 + w))
    return next_slot(slot, phase, QUERY_SLOTS)


@gluon.jit
def _fetch_keys(
    desc, sample, head, key, key2, keys, spots, n,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, TEXT: gl.constexpr,
):  # fmt: skip
    """Copy the n-th tile of keys from one or two positions, 64 columns at a time; with TEXT the positions go along."""
    group: gl.constexpr = 128 // KEYS
    slots, full, empty = keys
    slot, phase = slot_of(n, _slots(HEAD_DIM))
    parts = reinterpret(slots.index(slot), desc.dtype, [group * (HEAD_DIM // 64), 1, 1, KEYS, 64], desc.layout)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    if TEXT:
        tell(spots, slot * 2, key)
        tell(spots, slot * 2 + 1, key2)
        thread_barrier()
    mbarrier.expect(full.index(slot), 128 * HEAD_DIM * 2)
    for c in gl.static_range(HEAD_DIM // 64):
        load_tile(desc, [sample, head, key, c * 64], full.index(slot), parts.index(c * group))
        if group == 2:
            load_tile(desc, [sample, head, key2, c * 64], full.index(slot), parts.index(c * group + 1))


@gluon.jit
def fetch_values(
    desc, tail_desc, tail, sample, head, key, key2, values, n,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, TEXT: gl.constexpr,
):  # fmt: skip
    """Copy the n-th tile of values; with TEXT, those from position `tail` on from their clean copy."""
    group: gl.constexpr = 128 // KEYS
    slots, full, empty = values
    slot, phase = slot_of(n, slots.shape[0])
    parts = reinterpret(slots.index(slot), desc.dtype, [group * (HEAD_DIM // 64), 1, 1, KEYS, 64], desc.layout)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), 128 * HEAD_DIM * 2)
    for i in gl.static_range(group):
        start = key if i == 0 else key2
        for c in gl.static_range(HEAD_DIM // 64):
            part = parts.index(c * group + i)
            if TEXT:
                load_tile(desc, [sample, head, start, c * 64], full.index(slot), part, pred=start < tail)
                load_tile(tail_desc, [sample, head, start - tail, c * 64], full.index(slot), part, pred=start >= tail)
            else:
                load_tile(desc, [sample, head, start, c * 64], full.index(slot), part)


@gluon.jit
def starts_of_tile(tile, first, count, lists, layout, KEYS: gl.constexpr, SPARSE: gl.constexpr, TEXT: gl.constexpr):
    """The positions of the one or two list entries of a tile."""
    group: gl.constexpr = 128 // KEYS
    key = _block(tile * group, first, count, lists, layout, KEYS, SPARSE, TEXT) * KEYS
    key2 = key
    if group == 2:
        key2 = _block(tile * group + 1, first, count, lists, layout, KEYS, SPARSE, TEXT) * KEYS
    return key, key2


@gluon.jit
def _produce(
    descs, lists, lens_ptr, next_ptr, table_ptr, work, layout, queries, keys, values, mail, spots,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, SPARSE: gl.constexpr, TEXT: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """The producer warp: runs ahead of the consumers by as many tiles as there are slots."""
    q_desc, k_desc, v_desc, tail_desc = descs
    total = work[0]
    tail = layout[1] // KEYS * KEYS
    ticket = draw(next_ptr)
    item = gl.program_id(0)
    row, block_row, sample, head = row_of_item(item, lists, work, SPARSE)
    first, count, tiles, masked, end = plan_row(row, block_row, sample, lists, lens_ptr, layout, KEYS, SPARSE, TEXT)
    q_slot, q_phase = _announce(
        q_desc, sample, head, block_row, tiles, masked, end, table_ptr, queries, mail, 0, 1, HEAD_DIM, ORDER
    )
    key, key2 = starts_of_tile(tiles - 1, first, count, lists, layout, KEYS, SPARSE, TEXT)
    _fetch_keys(k_desc, sample, head, key, key2, keys, spots, 0, KEYS, HEAD_DIM, TEXT)
    n = 0
    while item < total:
        item = drawn(ticket) + gl.num_programs(0)
        ticket = draw(next_ptr)
        for i in range(1, tiles):
            value, value2 = key, key2
            key, key2 = starts_of_tile(tiles - 1 - i, first, count, lists, layout, KEYS, SPARSE, TEXT)
            _fetch_keys(k_desc, sample, head, key, key2, keys, spots, n + 1, KEYS, HEAD_DIM, TEXT)
            fetch_values(v_desc, tail_desc, tail, sample, head, value, value2, values, n, KEYS, HEAD_DIM, TEXT)
            n += 1
        value, value2, sample1, head1 = key, key2, sample, head
        row, block_row, sample, head = row_of_item(gl.where(item < total, item, 0), lists, work, SPARSE)
        first, count, tiles, masked, end = plan_row(row, block_row, sample, lists, lens_ptr, layout, KEYS, SPARSE, TEXT)
        q_slot, q_phase = _announce(
            q_desc, sample, head, block_row, gl.where(item < total, tiles, 0), masked, end,
            table_ptr, queries, mail, q_slot, q_phase, HEAD_DIM, ORDER,
        )  # fmt: skip
        key, key2 = starts_of_tile(tiles - 1, first, count, lists, layout, KEYS, SPARSE, TEXT)
        _fetch_keys(k_desc, sample, head, key, key2, keys, spots, n + 1, KEYS, HEAD_DIM, TEXT)
        fetch_values(v_desc, tail_desc, tail, sample1, head1, value, value2, values, n, KEYS, HEAD_DIM, TEXT)
        n += 1


@gluon.jit
def _scores(q, k, HEAD_DIM: gl.constexpr):
    """Start the product of 64 queries and a tile of keys."""
    zero = gl.zeros([64, 128], gl.float32, accumulator(128))
    k = k.reshape([128, HEAD_DIM]).permute((1, 0))
    return warpgroup_mma(q.reshape([64, HEAD_DIM]), k, zero, use_acc=False, is_async=True)


@gluon.jit
def _hide(scores, spots, slot, masked, end, layout, KEYS: gl.constexpr, TEXT: gl.constexpr):
    """-inf for the scores of a tile that belong to no token; selected, so that NaN in memory stays out."""
    column = gl.arange(0, 128, gl.SliceLayout(0, accumulator(128)))
    if TEXT:
        _, video, text_start = layout
        position = told(spots, slot * 2) + column
        if KEYS == 64:
            position = gl.where(column < 64, position, told(spots, slot * 2 + 1) + column - 64)
        token = (position < video) | ((position >= text_start) & (position < end))
    else:
        token = column < masked
    return gl.where(token[None, :], scores, -float("inf"))


@gluon.jit
def _weigh(scores, top, scale):
    """(weights, their sums by lane): 2 ** (scale * (scores - top)); a lane sums its own columns, without shuffles."""
    p = gl.exp2(scores * scale - (top * scale)[:, None])
    return p, gl.sum(gl.sum(gl.reshape(p, [64, 16, 4, 2]), 3), 1)


@gluon.jit
def _operand(p, dtype: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Weights as the left factor of the product with values."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, accumulator(HEAD_DIM), 2))


@gluon.jit
def _open(scores, spots, slot, masked, end, layout, scale, KEYS: gl.constexpr, TEXT: gl.constexpr):
    """The softmax of a row's first tile: (top, weights, their sums by lane)."""
    scores = _hide(scores, spots, slot, masked, end, layout, KEYS, TEXT)
    top = gl.maximum(gl.max(scores, 1), FLOOR)
    p, total = _weigh(scores, top, scale)
    return top, p, total


@gluon.jit
def _continue(
    q, keys, values, spots, n, operand, top, total, acc, masked, end, layout, scale,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, TEXT: gl.constexpr,
):  # fmt: skip
    """One more tile of a row: its softmax beside the product with the values of the tile before it, the n-th."""
    k_slots, k_full, k_empty = keys
    v_slots, v_full, v_empty = values
    k_slot, k_phase = slot_of(n + 1, _slots(HEAD_DIM))
    v_slot, v_phase = slot_of(n, _slots(HEAD_DIM))
    mbarrier.wait(k_full.index(k_slot), k_phase)
    s_run = _scores(q, k_slots.index(k_slot), HEAD_DIM)
    mbarrier.wait(v_full.index(v_slot), v_phase)
    acc_run = warpgroup_mma(operand, v_slots.index(v_slot).reshape([128, HEAD_DIM]), acc, is_async=True)
    scores = warpgroup_mma_wait(1, [s_run])
    if TEXT and masked:
        scores = _hide(scores, spots, k_slot, 0, end, layout, KEYS, True)
    mbarrier.arrive(k_empty.index(k_slot))
    new_top = gl.maximum(top, gl.max(scores, 1))
    shrink = gl.exp2((top - new_top) * scale)
    p, more = _weigh(scores, new_top, scale)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + more
    acc = warpgroup_mma_wait(0, [acc_run])
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    mbarrier.arrive(v_empty.index(v_slot))
    return _operand(p, k_slots.dtype, HEAD_DIM), new_top, total, acc


@gluon.constexpr_function
def _by_row(head_dim):
    """Layout of 64 rows of a head that leave one by one, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])


@gluon.jit
def _way_back(mail, slot):
    """What leads from positions of a row's head to raster order, see `ordering.axis_table`."""
    at = QUERY_SLOTS * MAIL + slot * WAY_BACK
    return told(mail, at), told(mail, at + 1), told(mail, at + 2), told(mail, at + 3), told(mail, at + 4)


@gluon.jit
def _raster(position, back, ordered):
    """Where positions of a head are in raster order; those from `ordered` on stay where they are.

    Divides in fp32, which is exact for positions up to 2 ** 20.
    """
    big, middle, a, b, c = back
    slow = ((position.to(gl.float32) + 0.5) * (1.0 / gl.cast(big, gl.float32))).to(gl.int32)
    rest = position - slow * big
    mid = ((rest.to(gl.float32) + 0.5) * (1.0 / gl.cast(middle, gl.float32))).to(gl.int32)
    token = slow * a + mid * b + (rest - mid * middle) * c
    return gl.where(position < ordered, token, position)


@gluon.jit
def _scatter(q, empty, out_ptr, token, inside, sample, head, heads, length, HEAD_DIM: gl.constexpr):
    """Write 64 rows, which lie in a slot of queries, to where their tokens are; frees the slot."""
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, _by_row(HEAD_DIM)))
    rows = q.reshape([64, HEAD_DIM]).load(_by_row(HEAD_DIM))
    fence_async_shared()
    mbarrier.arrive(empty)
    start = (gl.cast(sample, gl.int64) * length * heads + head) * HEAD_DIM
    offset = gl.cast(token, gl.int64) * (heads * HEAD_DIM)
    gl.store(out_ptr + start + offset[:, None] + column[None, :], rows, mask=inside[:, None])


@gluon.jit
def _consume(
    w: gl.constexpr, out, lse_ptr, heads, layout, scale, queries, keys, values, mail, spots,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, TEXT: gl.constexpr, NEED_LSE: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries of every row that the producer announces."""
    q_slots, q_full, q_empty = queries
    k_slots, k_full, k_empty = keys
    v_slots, v_full, v_empty = values
    length, video, text_start = layout
    out_desc, out_ptr, ordered = out
    by_score: gl.constexpr = gl.SliceLayout(1, accumulator(128))
    by_out: gl.constexpr = gl.SliceLayout(1, accumulator(HEAD_DIM))
    mbarrier.wait(q_full.index(0), 0)
    where, start, tiles, masked, end = told(mail, 0), told(mail, 1), told(mail, 2), told(mail, 3), told(mail, 4)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma_wait(0, [_scores(q_slots.index(w), k_slots.index(0), HEAD_DIM)])
    top, p, total = _open(scores, spots, 0, masked, end, layout, scale, KEYS, TEXT)
    mbarrier.arrive(k_empty.index(0))
    operand = _operand(p, k_slots.dtype, HEAD_DIM)
    q_slot, q_phase, before = 0, 0, -1
    n = 0
    while tiles > 0:
        q = q_slots.index(q_slot * 2 + w)
        acc = gl.zeros([64, HEAD_DIM], gl.float32, accumulator(HEAD_DIM))
        for tile in range(1, tiles):
            operand, top, total, acc = _continue(
                q, keys, values, spots, n, operand, top, total, acc, tile < masked, end, layout, scale,
                KEYS, HEAD_DIM, TEXT,
            )  # fmt: skip
            n += 1
        # the last product of this row, beside the first scores of the next
        k_slot, k_phase = slot_of(n + 1, _slots(HEAD_DIM))
        v_slot, v_phase = slot_of(n, _slots(HEAD_DIM))
        q_slot2, q_phase2 = next_slot(q_slot, q_phase, QUERY_SLOTS)
        mbarrier.wait(q_full.index(q_slot2), q_phase2)
        letter = q_slot2 * MAIL
        where2, start2, tiles = told(mail, letter), told(mail, letter + 1), told(mail, letter + 2)
        masked, end2 = told(mail, letter + 3), told(mail, letter + 4)
        mbarrier.wait(k_full.index(k_slot), k_phase)
        s_run = _scores(q_slots.index(q_slot2 * 2 + w), k_slots.index(k_slot), HEAD_DIM)
        mbarrier.wait(v_full.index(v_slot), v_phase)
        acc_run = warpgroup_mma(operand, v_slots.index(v_slot).reshape([128, HEAD_DIM]), acc, is_async=True)
        if not ORDER:
            tma.store_wait(0)  # by now the row before has left its slot
            mbarrier.arrive(q_empty.index(gl.maximum(before, 0)), pred=before >= 0)
        row = start + w * 64 + gl.arange(0, 64, by_score)
        denominator = gl.convert_layout(gl.sum(total, 1), by_score)
        factor = gl.where(denominator == 0.0, 0.0, 1.0 / denominator)
        lse = (top * scale + gl.log2(denominator)) * LN_2
        if TEXT:  # queries that are no tokens may hold NaN, and are told from others by a negative factor
            valid = (row < video) | ((row >= text_start) & (row < end))
            factor = gl.where(valid, factor, -1.0)
            lse = gl.where(valid, lse, -float("inf"))
        target = row
        if ORDER:
            back = _way_back(mail, q_slot)
            target = _raster(row, back, ordered)
            position = start + w * 64 + gl.arange(0, 64, gl.SliceLayout(1, _by_row(HEAD_DIM)))
            token = _raster(position, back, ordered)
        scores = warpgroup_mma_wait(1, [s_run])
        top, p, total = _open(scores, spots, k_slot, masked, end2, layout, scale, KEYS, TEXT)
        mbarrier.arrive(k_empty.index(k_slot))
        acc = warpgroup_mma_wait(0, [acc_run])
        mbarrier.arrive(v_empty.index(v_slot))
        operand = _operand(p, k_slots.dtype, HEAD_DIM)
        factor = gl.convert_layout(factor, by_out)
        acc = acc * factor[:, None]
        if TEXT:
            acc = gl.where((factor < 0)[:, None], 0.0, acc)
        q.reshape([64, HEAD_DIM]).store(acc.to(q.dtype))
        if ORDER:
            _scatter(
                q, q_empty.index(q_slot), out_ptr, token, position < length, where >> 16, where & 0xFFFF, heads, length,
                HEAD_DIM,
            )  # fmt: skip
        else:
            fence_async_shared()
            store_tile(out_desc, [where >> 16, where & 0xFFFF, start + w * 64, 0], q)
        if NEED_LSE:
            offset = gl.cast((where >> 16) * heads + (where & 0xFFFF), gl.int64) * length
            gl.store(lse_ptr + offset + target, lse, mask=row < length)
        where, start, end = where2, start2, end2
        before, q_slot, q_phase = q_slot, q_slot2, q_phase2
        n += 1
    tma.store_wait(0)


@gluon.jit
def make_barriers(SLOTS: gl.constexpr):
    """(full, empty) barriers of some slots; both consumers must have left a slot before it is filled again."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return full, empty


# nothing is specialised: sizes change from call to call, and lists may start anywhere in a buffer
@gluon.jit(
    do_not_specialize=[
        "table_ptr", "lse_ptr", "row_ptr", "ids_ptr", "order_ptr", "lens_ptr", "next_ptr", "total", "rows", "heads",
        "map_rows", "map_heads", "shares", "length", "video", "text_start", "ordered",
    ]
)  # fmt: skip
def forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    tail_desc,
    out_desc,
    out_ptr,
    table_ptr,
    lse_ptr,
    row_ptr,
    ids_ptr,
    order_ptr,
    lens_ptr,
    next_ptr,
    total,
    rows,
    heads,
    map_rows,
    map_heads,
    shares,
    length,
    video,
    text_start,
    ordered,
    scale_log2,
    KEYS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    SPARSE: gl.constexpr,
    TEXT: gl.constexpr,
    NEED_LSE: gl.constexpr,
    ORDER: gl.constexpr,
):
    """All rows of a call; online softmax in base 2, accumulated in fp32."""
    slots: gl.constexpr = _slots(HEAD_DIM)
    words: gl.constexpr = QUERY_SLOTS * (MAIL + WAY_BACK * ORDER)
    q_full, q_empty = make_barriers(QUERY_SLOTS)
    k_full, k_empty = make_barriers(slots)
    v_full, v_empty = make_barriers(slots)
    q_slots = gl.allocate_shared_memory(q_desc.dtype, [QUERY_SLOTS * 2, 1, 1, 64, HEAD_DIM], q_desc.layout)
    k_slots = gl.allocate_shared_memory(q_desc.dtype, [slots, 1, 1, 128, HEAD_DIM], q_desc.layout)
    v_slots = gl.allocate_shared_memory(q_desc.dtype, [slots, 1, 1, 128, HEAD_DIM], q_desc.layout)
    mail = gl.allocate_shared_memory(gl.int32, [words, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    spots = gl.allocate_shared_memory(gl.int32, [slots * 2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries = (q_slots, q_full, q_empty)
    keys = (k_slots, k_full, k_empty)
    values = (v_slots, v_full, v_empty)
    layout = (length, video, text_start)
    descs = (q_desc, k_desc, v_desc, tail_desc)
    lists = (row_ptr, ids_ptr, order_ptr)
    work = (total, rows, heads, map_rows, map_heads, shares)
    out = (out_desc, out_ptr, ordered)
    gl.warp_specialize(
        [
            (_consume, (0, out, lse_ptr, heads, layout, scale_log2, queries, keys, values, mail, spots,
                        KEYS, HEAD_DIM, TEXT, NEED_LSE, ORDER)),
            (_consume, (1, out, lse_ptr, heads, layout, scale_log2, queries, keys, values, mail, spots,
                        KEYS, HEAD_DIM, TEXT, NEED_LSE, ORDER)),
            (_produce, (descs, lists, lens_ptr, next_ptr, table_ptr, work, layout, queries, keys, values, mail, spots,
                        KEYS, HEAD_DIM, SPARSE, TEXT, ORDER)),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip
