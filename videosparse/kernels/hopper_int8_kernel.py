# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Integer attention for Hopper (sm_90), the kernel, in Gluon; `hopper_int8` launches it.

Shapes, all made by `quantize` but v, out and the lists
    q, k          int8 [B, H, P, D], D 64 or 128, P = L rounded up to 128; 0 where no token is
    q_scale       fp32 [B, H, P], with the scale of the scores and log2(e) folded in
    k_scale       fp32 [B, H, P / 64, 32], 32 copies of one number: the least that the copy engine moves
    v             [B, L, H, D] by strides of 16 bytes, fp16 or bf16; or
                  fp8 e4m3 [B, H, D, P], keys in the order of `quantize.KEY_ORDER` within every 16
    v_scale       fp32 [B, H, D], of fp8 values
    out           [B, L, H, D] contiguous, fp16 or bf16
    lse           fp32 [B, H, L], natural log; holds what the smoothing of keys took from each row when it starts
Lists, layout and work are those of `hopper_kernel`, and so are the roles: a producer warp, two consumers of 64 queries.

Scores are exact int32 sums. An int32 n below 2^22 becomes the float 1.5 * 2^23 + n by adding the bits of that number
(SageAttention2, arXiv 2411.10958, does so too), and the offset leaves again in the multiply-add that applies the
scale. Products with fp8 values keep about 14 bits on Hopper, so each tile gets accumulators of its own, added in fp32.
A wait counts products in flight, and of an integer one and an fp8 one behind it the second may end first: scores are
waited for before the product with fp8 values starts.

The softmax takes longer than the products, so that one consumer's softmax must run beside the other's products. They
take turns at the tensor cores (FlashAttention-3, arXiv 2407.08608, does so too), each until its products have ended.
Without fp8 a maximum is kept until scores pass it by 8, base 2, and a warp whose maxima all stay does not shrink its
output (FlashAttention-4 keeps maxima so, too); fp8 weights have no room for that.
INT4 is left out: Hopper's wgmma has no 4-bit integers (PTX ISA, wgmma.mma_async: .s8, .u8 and .b1), and Triton's dot,
3.6 to 3.9, takes none below 8 bits on any card.
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

from videosparse.kernels.hopper_int8_softmax import (
    FLAT,
    PEAK,
    SLACK,
    as_float,
    as_operand,
    hide,
    highest_of_rows,
    key_scales,
    shrink_rows,
    unpack_weights,
    weigh,
)
from videosparse.kernels.hopper_kernel import (
    FLOOR,
    LN_2,
    MAIL,
    accumulator,
    draw,
    drawn,
    fetch_values,
    load_tile,
    make_barriers,
    next_slot,
    plan_row,
    reinterpret,
    row_of_item,
    slot_of,
    starts_of_tile,
    store_tile,
    tell,
    thread_barrier,
    told,
)

QUERY_SLOTS = gl.constexpr(2)  # the row at work and the one ahead
REGISTERS = gl.constexpr([240, 24])  # a thread of the second consumer, and of the producer; the first takes the rest


@gluon.constexpr_function
def _key_slots(head_dim):
    """Tiles of keys that fit shared memory."""
    return 512 // head_dim


@gluon.constexpr_function
def _value_slots(head_dim, bits):
    """Tiles of values that fit shared memory beside the keys."""
    return (4096 if bits == 8 else 6144) // (head_dim * bits)


@gluon.jit
def _announce(descs, sample, head, block_row, tiles, masked, end, queries, mail, slot, phase, HEAD_DIM: gl.constexpr):
    """Copy a row's queries and their scales, and tell the consumers about the row; 0 tiles: there is none left."""
    q_desc, q_scale_desc = descs
    slots, scales, full, empty = queries
    mbarrier.wait(empty.index(slot), phase)
    tell(mail, slot * MAIL, (sample << 16) | head)
    tell(mail, slot * MAIL + 1, block_row * 128)
    tell(mail, slot * MAIL + 2, tiles)
    tell(mail, slot * MAIL + 3, masked)
    tell(mail, slot * MAIL + 4, end)
    thread_barrier()
    mbarrier.expect(full.index(slot), 128 * HEAD_DIM + 128 * 4)
    for w in gl.static_range(2):
        start = block_row * 128 + w * 64
        load_tile(q_desc, [sample, head, start, 0], full.index(slot), slots.index(slot * 2 + w))
        load_tile(q_scale_desc, [sample, head, start], full.index(slot), scales.index(slot * 2 + w))
    return next_slot(slot, phase, QUERY_SLOTS)


@gluon.jit
def _fetch_keys(
    descs, sample, head, key, key2, keys, spots, n,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, TEXT: gl.constexpr,
):  # fmt: skip
    """Copy the n-th tile of keys from one or two positions, with its two scales; with TEXT the positions go along."""
    group: gl.constexpr = 128 // KEYS
    desc, scale_desc = descs
    slots, scales, full, empty = keys
    slot, phase = slot_of(n, _key_slots(HEAD_DIM))
    parts = reinterpret(slots.index(slot), gl.int8, [group, 1, 1, KEYS, HEAD_DIM], desc.layout)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    if TEXT:
        tell(spots, slot * 2, key)
        tell(spots, slot * 2 + 1, key2)
        thread_barrier()
    mbarrier.expect(full.index(slot), 128 * HEAD_DIM + 2 * 128)
    for i in gl.static_range(2):
        start = key + i * 64
        if group == 2:
            start = key if i == 0 else key2
        load_tile(scale_desc, [sample, head, start // 64, 0], full.index(slot), scales.index(slot * 2 + i))
        if i < group:
            load_tile(desc, [sample, head, start, 0], full.index(slot), parts.index(i))


@gluon.jit
def _fetch_turned_values(desc, sample, head, key, key2, values, n, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Copy the n-th tile of fp8 values, [HEAD_DIM, keys]."""
    group: gl.constexpr = 128 // KEYS
    slots, full, empty = values
    slot, phase = slot_of(n, slots.shape[0])
    parts = reinterpret(slots.index(slot), desc.dtype, [group, 1, 1, HEAD_DIM, KEYS], desc.layout)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), 128 * HEAD_DIM)
    for i in gl.static_range(group):
        start = key if i == 0 else key2
        load_tile(desc, [sample, head, 0, start], full.index(slot), parts.index(i))


@gluon.jit
def _fetch_any_values(
    descs, tail, sample, head, key, key2, values, n,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, TEXT: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    v_desc, tail_desc = descs
    if FP8:
        _fetch_turned_values(v_desc, sample, head, key, key2, values, n, KEYS, HEAD_DIM)
    else:
        fetch_values(v_desc, tail_desc, tail, sample, head, key, key2, values, n, KEYS, HEAD_DIM, TEXT)


@gluon.jit
def _produce(
    q_descs, k_descs, v_descs, lists, lens_ptr, next_ptr, work, layout, queries, keys, values, mail, spots,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, SPARSE: gl.constexpr, TEXT: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """The producer warp: runs ahead of the consumers by as many tiles as there are slots; reads lists a tile ahead."""
    total = work[0]
    tail = layout[1] // KEYS * KEYS
    ticket = draw(next_ptr)
    item = gl.program_id(0)
    row, block_row, sample, head = row_of_item(item, lists, work, SPARSE)
    first, count, tiles, masked, end = plan_row(row, block_row, sample, lists, lens_ptr, layout, KEYS, SPARSE, TEXT)
    q_slot, q_phase = _announce(q_descs, sample, head, block_row, tiles, masked, end, queries, mail, 0, 1, HEAD_DIM)
    key, key2 = starts_of_tile(tiles - 1, first, count, lists, layout, KEYS, SPARSE, TEXT)
    _fetch_keys(k_descs, sample, head, key, key2, keys, spots, 0, KEYS, HEAD_DIM, TEXT)
    n = 0
    while item < total:
        item = drawn(ticket) + gl.num_programs(0)
        ticket = draw(next_ptr)
        after, after2 = starts_of_tile(gl.maximum(tiles - 2, 0), first, count, lists, layout, KEYS, SPARSE, TEXT)
        for i in range(1, tiles):
            value, value2 = key, key2
            key, key2 = after, after2
            after, after2 = starts_of_tile(
                gl.maximum(tiles - 2 - i, 0), first, count, lists, layout, KEYS, SPARSE, TEXT
            )
            _fetch_keys(k_descs, sample, head, key, key2, keys, spots, n + 1, KEYS, HEAD_DIM, TEXT)
            _fetch_any_values(v_descs, tail, sample, head, value, value2, values, n, KEYS, HEAD_DIM, TEXT, FP8)
            n += 1
        value, value2, sample1, head1 = key, key2, sample, head
        row, block_row, sample, head = row_of_item(gl.where(item < total, item, 0), lists, work, SPARSE)
        first, count, tiles, masked, end = plan_row(row, block_row, sample, lists, lens_ptr, layout, KEYS, SPARSE, TEXT)
        q_slot, q_phase = _announce(
            q_descs, sample, head, block_row, gl.where(item < total, tiles, 0), masked, end,
            queries, mail, q_slot, q_phase, HEAD_DIM,
        )  # fmt: skip
        key, key2 = starts_of_tile(tiles - 1, first, count, lists, layout, KEYS, SPARSE, TEXT)
        _fetch_keys(k_descs, sample, head, key, key2, keys, spots, n + 1, KEYS, HEAD_DIM, TEXT)
        _fetch_any_values(v_descs, tail, sample1, head1, value, value2, values, n, KEYS, HEAD_DIM, TEXT, FP8)
        n += 1


@gluon.jit
def _scores(q, k, HEAD_DIM: gl.constexpr):
    """Start the integer product of 64 queries and a tile of keys."""
    zero = gl.zeros([64, 128], gl.int32, accumulator(128, 8))
    k = k.reshape([128, HEAD_DIM]).permute((1, 0))
    return warpgroup_mma(q.reshape([64, HEAD_DIM]), k, zero, use_acc=False, is_async=True)


@gluon.jit
def _spread(x, acc):
    """A number for each row, as a column beside acc."""
    return gl.convert_layout(x, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _values_times(operand, v_slots, v_slot, acc, HEAD_DIM: gl.constexpr, FP8: gl.constexpr):
    """Start the product of weights and a tile of values: fp8 by itself, others on top of acc."""
    if FP8:
        v = v_slots.index(v_slot).reshape([HEAD_DIM, 128]).permute((1, 0))
        zero = gl.zeros([64, HEAD_DIM], gl.float32, accumulator(HEAD_DIM, 8))
        return warpgroup_mma(unpack_weights(operand, HEAD_DIM), v, zero, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(operand, v_slots.index(v_slot).reshape([128, HEAD_DIM]), acc, is_async=True)


@gluon.jit
def _open(
    scores, spots, scales, slot, own, masked, end, layout,
    KEYS: gl.constexpr, TEXT: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """The softmax of a row's first tile: (top, weights, their sums by lane)."""
    scores = hide(scores, spots, slot, masked, end, layout, KEYS, TEXT)
    halves = key_scales(scales, slot)
    top = gl.maximum(highest_of_rows(scores, own, halves), FLOOR)
    p, total = weigh(as_float(scores), top - PEAK if FP8 else top, own, halves)
    return top, p, total


@gluon.jit
def _multiply(
    w: gl.constexpr, q, k, v_slots, v_slot, v_ready, v_phase, turns, n, operand, acc, pending, before,
    HEAD_DIM: gl.constexpr, FP8: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """(scores of a tile, acc, product with the values of the tile before it, the n-th); only fp8's scores have ended.

    A consumer waits for its turn at the tensor cores, and passes it on once that product has ended. So the products of
    one run beside the softmax of the other.
    """
    mbarrier.wait(turns.index(w), (n & 1) ^ (1 - w))
    s_run = _scores(q, k, HEAD_DIM)
    if LATE:
        acc = acc * _spread(before, acc) + pending
    elif not FP8:
        acc = shrink_rows(acc, _spread(before, acc))
    if FP8:
        s_run = warpgroup_mma_wait(0, [s_run])
    mbarrier.wait(v_ready, v_phase)
    return s_run, acc, _values_times(operand, v_slots, v_slot, acc, HEAD_DIM, FP8)


@gluon.jit
def _continue(
    w: gl.constexpr, q, own, keys, values, turns, spots, n, operand, top, shrink, total, acc, pending, before,
    masked, end, layout,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, TEXT: gl.constexpr, FP8: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """One more tile of a row: scores, softmax, and the product with the values of the tile before it, the n-th.

    `acc` lacks that product. With fp8 it is to be shrunk by `shrink` before that is added. With LATE it lacks `pending`
    of the tile before, too, and first of all is to be shrunk by `before`, as it is without fp8: both beside the scores.
    """
    k_slots, k_scales, k_full, k_empty = keys
    v_slots, v_full, v_empty = values
    k_slot, k_phase = slot_of(n + 1, _key_slots(HEAD_DIM))
    v_slot, v_phase = slot_of(n, v_slots.shape[0])
    mbarrier.wait(k_full.index(k_slot), k_phase)
    s_run, acc, acc_run = _multiply(
        w, q, k_slots.index(k_slot), v_slots, v_slot, v_full.index(v_slot), v_phase, turns, n, operand,
        acc, pending, before, HEAD_DIM, FP8, LATE,
    )  # fmt: skip
    halves = key_scales(k_scales, k_slot)
    scores = s_run if FP8 else warpgroup_mma_wait(1, [s_run])
    if TEXT and masked:
        scores = hide(scores, spots, k_slot, 0, end, layout, KEYS, True)
    mbarrier.arrive(k_empty.index(k_slot))
    highest = highest_of_rows(scores, own, halves)
    new_top = gl.maximum(top, highest) if FP8 else gl.where(highest > top + SLACK, highest, top)
    new_shrink = gl.exp2(top - new_top)
    p, more = weigh(as_float(scores), new_top - PEAK if FP8 else new_top, own, halves)
    total = total * _spread(new_shrink, total) + more
    product = warpgroup_mma_wait(0, [acc_run])
    mbarrier.arrive(turns.index(1 - w))
    if LATE:
        pending, before = product, shrink
    elif FP8:
        acc = acc * _spread(shrink, acc) + product
    else:
        acc, before = product, new_shrink
    mbarrier.arrive(v_empty.index(v_slot))
    # after the wait: registers of the factor at work must not be written, or ptxas makes all products wait
    return as_operand(p, v_slots.dtype, HEAD_DIM, FP8), new_top, new_shrink, total, acc, pending, before


@gluon.jit
def _finish(
    w: gl.constexpr, acc, top, total, where, start, end, out_desc, out_slots, lse_ptr, v_scale_ptr, heads, layout,
    HEAD_DIM: gl.constexpr, TEXT: gl.constexpr, FP8: gl.constexpr, NEED_LSE: gl.constexpr,
):  # fmt: skip
    """Write a row's output and lse."""
    length, video, text_start = layout
    sample, head = where >> 16, where & 0xFFFF
    line = gl.cast(sample * heads + head, gl.int64)
    row = start + w * 64 + gl.arange(0, 64, top.type.layout)
    denominator = gl.convert_layout(gl.sum(total, 1), top.type.layout)
    factor = gl.where(denominator == 0.0, 0.0, 1.0 / denominator)
    lse = (top + gl.log2(denominator) - (PEAK if FP8 else 0.0)) * LN_2
    acc = acc * _spread(factor, acc)
    if FP8:
        column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, acc.type.layout))
        acc = acc * gl.load(v_scale_ptr + line * HEAD_DIM + column)[None, :]
    if TEXT:  # a NaN among the values must not reach what is no token
        valid = (row < video) | ((row >= text_start) & (row < end))
        lse = gl.where(valid, lse, -float("inf"))
        acc = gl.where(_spread(gl.where(valid, 1.0, 0.0), acc) == 0.0, 0.0, acc)
    slot = out_slots.index(w)
    slot.reshape([64, HEAD_DIM]).store(acc.to(slot.dtype))
    fence_async_shared()
    store_tile(out_desc, [sample, head, start + w * 64, 0], slot)
    if NEED_LSE:
        inside = row < length
        place = lse_ptr + line * length + row
        gl.store(place, gl.load(place, mask=inside, other=0.0) + lse, mask=inside)


@gluon.jit
def _own_scales(scales, slot):
    """The scales of 64 queries."""
    return reinterpret(scales.index(slot), gl.float32, [64], FLAT).load(gl.SliceLayout(1, accumulator(128, 8)))


@gluon.jit
def _consume(
    w: gl.constexpr, out_desc, out_slots, lse_ptr, v_scale_ptr, heads, layout, queries, keys, values, turns,
    mail, spots, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, TEXT: gl.constexpr, FP8: gl.constexpr,
    NEED_LSE: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries of every row that the producer announces."""
    late: gl.constexpr = FP8 and not TEXT  # where tiles may be masked, there are no registers left for it
    q_slots, q_scales, q_full, q_empty = queries
    k_slots, k_scales, k_full, k_empty = keys
    v_slots, v_full, v_empty = values
    mbarrier.wait(q_full.index(0), 0)
    where, start, tiles, masked, end = told(mail, 0), told(mail, 1), told(mail, 2), told(mail, 3), told(mail, 4)
    own = _own_scales(q_scales, w)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma_wait(0, [_scores(q_slots.index(w), k_slots.index(0), HEAD_DIM)])
    top, p, total = _open(scores, spots, k_scales, 0, own, masked, end, layout, KEYS, TEXT, FP8)
    mbarrier.arrive(k_empty.index(0))
    operand = as_operand(p, v_slots.dtype, HEAD_DIM, FP8)
    q_slot, q_phase = 0, 0
    n = 0
    while tiles > 0:
        q = q_slots.index(q_slot * 2 + w)
        acc = gl.zeros([64, HEAD_DIM], gl.float32, accumulator(HEAD_DIM, 8 if FP8 else 16))
        shrink = top * 0.0
        pending, before = acc if late else 0.0, shrink
        for tile in range(1, tiles):
            operand, top, shrink, total, acc, pending, before = _continue(
                w, q, own, keys, values, turns, spots, n, operand, top, shrink, total, acc, pending, before,
                tile < masked, end, layout, KEYS, HEAD_DIM, TEXT, FP8, late,
            )  # fmt: skip
            n += 1
        # the last product of this row, beside the first scores of the next; this row's queries have been read
        mbarrier.arrive(q_empty.index(q_slot))
        k_slot, k_phase = slot_of(n + 1, _key_slots(HEAD_DIM))
        v_slot, v_phase = slot_of(n, v_slots.shape[0])
        q_slot, q_phase = next_slot(q_slot, q_phase, QUERY_SLOTS)
        mbarrier.wait(q_full.index(q_slot), q_phase)
        letter = q_slot * MAIL
        where2, start2, tiles = told(mail, letter), told(mail, letter + 1), told(mail, letter + 2)
        masked, end2 = told(mail, letter + 3), told(mail, letter + 4)
        own = _own_scales(q_scales, q_slot * 2 + w)
        mbarrier.wait(k_full.index(k_slot), k_phase)
        s_run, acc, acc_run = _multiply(
            w, q_slots.index(q_slot * 2 + w), k_slots.index(k_slot), v_slots, v_slot, v_full.index(v_slot), v_phase,
            turns, n, operand, acc, pending, before, HEAD_DIM, FP8, late,
        )  # fmt: skip
        scores = s_run if FP8 else warpgroup_mma_wait(1, [s_run])
        top2, p, total2 = _open(scores, spots, k_scales, k_slot, own, masked, end2, layout, KEYS, TEXT, FP8)
        mbarrier.arrive(k_empty.index(k_slot))
        product = warpgroup_mma_wait(0, [acc_run])
        mbarrier.arrive(turns.index(1 - w))
        acc = acc * _spread(shrink, acc) + product if FP8 else product
        mbarrier.arrive(v_empty.index(v_slot))
        operand = as_operand(p, v_slots.dtype, HEAD_DIM, FP8)
        tma.store_wait(0)  # by now the row before has left its slot
        _finish(
            w, acc, top, total, where, start, end, out_desc, out_slots, lse_ptr, v_scale_ptr, heads, layout,
            HEAD_DIM, TEXT, FP8, NEED_LSE,
        )  # fmt: skip
        where, start, end, top, total = where2, start2, end2, top2, total2
        n += 1
    tma.store_wait(0)


# nothing is specialised: sizes change from call to call, and lists may start anywhere in a buffer
@gluon.jit(
    do_not_specialize=[
        "lse_ptr", "v_scale_ptr", "row_ptr", "ids_ptr", "order_ptr", "lens_ptr", "next_ptr", "total", "rows", "heads",
        "map_rows", "map_heads", "shares", "length", "video", "text_start",
    ]
)  # fmt: skip
def int8_kernel(
    q_desc,
    q_scale_desc,
    k_desc,
    k_scale_desc,
    v_desc,
    tail_desc,
    out_desc,
    lse_ptr,
    v_scale_ptr,
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
    KEYS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    SPARSE: gl.constexpr,
    TEXT: gl.constexpr,
    FP8: gl.constexpr,
    NEED_LSE: gl.constexpr,
):
    """All rows of a call; online softmax in base 2, accumulated in fp32."""
    k_count: gl.constexpr = _key_slots(HEAD_DIM)
    v_count: gl.constexpr = _value_slots(HEAD_DIM, 8 if FP8 else 16)
    v_tile: gl.constexpr = [HEAD_DIM, 128] if FP8 else [128, HEAD_DIM]
    q_full, q_empty = make_barriers(QUERY_SLOTS)
    k_full, k_empty = make_barriers(k_count)
    v_full, v_empty = make_barriers(v_count)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    q_slots = gl.allocate_shared_memory(gl.int8, [QUERY_SLOTS * 2, 1, 1, 64, HEAD_DIM], q_desc.layout)
    q_scales = gl.allocate_shared_memory(gl.float32, [QUERY_SLOTS * 2, 1, 1, 64], q_scale_desc.layout)
    k_slots = gl.allocate_shared_memory(gl.int8, [k_count, 1, 1, 128, HEAD_DIM], k_desc.layout)
    k_scales = gl.allocate_shared_memory(gl.float32, [k_count * 2, 1, 1, 1, 32], k_scale_desc.layout)
    v_slots = gl.allocate_shared_memory(v_desc.dtype, [v_count, 1, 1, v_tile[0], v_tile[1]], v_desc.layout)
    out_slots = gl.allocate_shared_memory(out_desc.dtype, [2, 1, 1, 64, HEAD_DIM], out_desc.layout)
    mail = gl.allocate_shared_memory(gl.int32, [QUERY_SLOTS * MAIL, 1], FLAT)
    spots = gl.allocate_shared_memory(gl.int32, [k_count * 2, 1], FLAT)
    queries = (q_slots, q_scales, q_full, q_empty)
    keys = (k_slots, k_scales, k_full, k_empty)
    values = (v_slots, v_full, v_empty)
    layout = (length, video, text_start)
    lists = (row_ptr, ids_ptr, order_ptr)
    work = (total, rows, heads, map_rows, map_heads, shares)
    gl.warp_specialize(
        [
            (_consume, (0, out_desc, out_slots, lse_ptr, v_scale_ptr, heads, layout, queries, keys, values, turns,
                        mail, spots, KEYS, HEAD_DIM, TEXT, FP8, NEED_LSE)),
            (_consume, (1, out_desc, out_slots, lse_ptr, v_scale_ptr, heads, layout, queries, keys, values, turns,
                        mail, spots, KEYS, HEAD_DIM, TEXT, FP8, NEED_LSE)),
            (_produce, ((q_desc, q_scale_desc), (k_desc, k_scale_desc), (v_desc, tail_desc), lists, lens_ptr, next_ptr,
                        work, layout, queries, keys, values, mail, spots, KEYS, HEAD_DIM, SPARSE, TEXT, FP8)),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip
