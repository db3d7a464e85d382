"""Data movement inside a thread: ``mov``, addresses, parameters and special registers.

PTX ISA sections 9.7.9.1 to 9.7.9.5 (``mov``, ``ld.param``), 9.7.9.19 to 9.7.9.24 (``cvta``,
``isspacep``, ``mapa``, ``getctarank``) and chapter 10 (special registers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import addresses
from cute_fa.sim.isa import library, pure
from cute_fa.sim.isa.types import DTYPE, bits
from cute_fa.sim.lanes import WARP_LANES
from cute_fa.sim.names import ROW

if TYPE_CHECKING:
    from cute_fa.sim.wave import Wave

Array = np.ndarray
U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64

# --- special registers ----------------------------------------------------------------------------

# Axes along which a value may vary; everything else is broadcast.
WARP, CTA, LANE = 1, 2, 4
EVERY_LANE = WARP | CTA | LANE


def _thread_index(axis: int) -> Callable[[Wave], Array]:
    def make(wave: Wave) -> Array:
        nx, ny, _ = wave.config.block
        flat = np.arange(wave.num_warps * WARP_LANES, dtype=U4).reshape(-1, 1, WARP_LANES)
        return (flat % U4(nx), flat // U4(nx) % U4(ny), flat // U4(nx * ny))[axis]

    return make


def _cta(function: Callable[[Wave], Any]) -> Callable[[Wave], Array]:
    """A special register with one value per CTA slot."""
    return lambda wave: np.asarray(function(wave)).astype(U4).reshape(1, -1, 1)


def _constant(function: Callable[[Wave], int]) -> Callable[[Wave], Array]:
    """A special register with one value for the launch."""
    return lambda wave: np.array(function(wave), U4)


def _lane_mask(function: Callable[[int], int]) -> Callable[[Wave], Array]:
    table = [function(lane) & 0xFFFFFFFF for lane in range(WARP_LANES)]
    return lambda wave: np.array(table, U4).reshape(1, 1, WARP_LANES)


def _clusters(wave: Wave, axis: int) -> int:
    return wave.config.grid[axis] // wave.config.cluster[axis]


_AXES = {"x": 0, "y": 1, "z": 2}

SPECIALS: dict[str, tuple[int, Callable[[Wave], Array]]] = {
    "%laneid": (LANE, lambda w: np.arange(WARP_LANES, dtype=U4).reshape(1, 1, WARP_LANES)),
    "%warpid": (WARP, lambda w: np.arange(w.num_warps, dtype=U4).reshape(-1, 1, 1)),
    "%nwarpid": (0, _constant(lambda w: w.num_warps)),
    "%lanemask_eq": (LANE, _lane_mask(lambda lane: 1 << lane)),
    "%lanemask_lt": (LANE, _lane_mask(lambda lane: (1 << lane) - 1)),
    "%lanemask_le": (LANE, _lane_mask(lambda lane: (2 << lane) - 1)),
    "%lanemask_gt": (LANE, _lane_mask(lambda lane: -(2 << lane))),
    "%lanemask_ge": (LANE, _lane_mask(lambda lane: -(1 << lane))),
    "%smid": (CTA, _cta(lambda w: np.arange(w.num_ctas))),
    "%nsmid": (0, _constant(lambda w: w.num_ctas)),
    "%gridid": (0, _constant(lambda w: 0)),
    "%cluster_ctarank": (CTA, _cta(lambda w: w.cta_rank)),
    "%cluster_nctarank": (0, _constant(lambda w: w.cluster_size)),
    "%is_explicit_cluster": (0, lambda w: np.array(w.cluster_size > 1)),
    "%dynamic_smem_size": (0, _constant(lambda w: w.config.smem_bytes)),
    "%total_smem_size": (0, _constant(lambda w: w.smem_end - addresses.SHARED_BASE)),
    "%aggr_smem_size": (0, _constant(lambda w: w.smem_end - addresses.SHARED_BASE)),
    "%reserved_smem_offset_begin": (0, _constant(lambda w: 0)),
    "%reserved_smem_offset_end": (0, _constant(lambda w: addresses.SHARED_BASE)),
}


def _coordinates(name: str, axis: int) -> dict[str, tuple[int, Callable[[Wave], Array]]]:
    """The special registers that have an x, a y and a z."""
    return {
        f"%tid.{name}": (WARP | LANE, _thread_index(axis)),
        f"%ntid.{name}": (0, _constant(lambda w: w.config.block[axis])),
        f"%ctaid.{name}": (CTA, _cta(lambda w: w.cta_ids[:, axis])),
        f"%nctaid.{name}": (0, _constant(lambda w: w.config.grid[axis])),
        f"%clusterid.{name}": (CTA, _cta(lambda w: w.cta_ids[:, axis] // w.config.cluster[axis])),
        f"%nclusterid.{name}": (0, _constant(lambda w: _clusters(w, axis))),
        f"%cluster_ctaid.{name}": (
            CTA,
            _cta(lambda w: w.cta_ids[:, axis] % w.config.cluster[axis]),
        ),
        f"%cluster_nctaid.{name}": (0, _constant(lambda w: w.config.cluster[axis])),
    }


for _name, _axis in _AXES.items():
    SPECIALS |= _coordinates(_name, _axis)
"""Each special register: the axes it varies along, and its array for a wave.

``%smid`` numbers the CTA slots of a wave. Clocks are not here: they change while a wave runs.
"""

CLOCKS = {
    "%clock": "u4",
    "%clock_hi": "u4",
    "%clock64": "u8",
    "%globaltimer": "u8",
    "%globaltimer_lo": "u4",
    "%globaltimer_hi": "u4",
}


@library
def read_clock(ctx: Any, name: str) -> Array:
    """A clock: block executions of the wave so far, which only ever rises (10.22 to 10.26)."""
    ticks = int(ctx.wave.steps)
    if name in ("%clock64", "%globaltimer"):
        return np.array(ticks, U8)
    return np.array(ticks >> 32 if name.endswith("_hi") else ticks & 0xFFFFFFFF, U4)


@library
def load_result(ctx: Any, address: Array, size: int) -> Array:
    """``ld.param`` of the result of a call, which lies in each thread's local memory."""
    w0, w1, c0, c1 = ctx.rect
    addresses = np.full((w1 - w0, c1 - c0, WARP_LANES), int(address), U8)
    return ctx.subsystem("local").load(ctx, addresses, size, ctx.lanes.dense_mask())


# --- semantics ------------------------------------------------------------------------------------


_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


@library
def pack_words(*items: Array) -> Array:
    """``mov`` of a vector into one register: the first item is least significant (9.7.9.2)."""
    shape = items[0].shape
    if any(item.shape != shape for item in items):
        shape = np.broadcast_shapes(*(item.shape for item in items))
    packed = np.empty((*shape, len(items)), items[0].dtype)
    for index, item in enumerate(items):
        packed[..., index] = item
    return packed.view(_UNSIGNED[items[0].dtype.itemsize * len(items)])[..., 0]


@library
def unpack_word(word: Array, index: int, size: int) -> Array:
    """Item ``index`` of ``size`` bytes of a register moved into a vector (9.7.9.2)."""
    return (word >> word.dtype.type(8 * size * index)).astype(_UNSIGNED[size])


@library
def split_word(word: Array, index: int, size: int) -> Array:
    """The same as a view of ``word``, which must not change as long as the item is used."""
    if word.ndim and word.strides[-1] == word.itemsize:
        return word.view(_UNSIGNED[size])[..., index :: word.itemsize // size]
    return unpack_word(word, index, size)


@library
def map_shared(address: Array, rank: Array) -> Array:
    """``mapa``: the same shared offset in the CTA of ``rank`` of the cluster (9.7.9.23)."""
    kind = address.dtype.type
    return (address & kind(addresses.SHARED_OFFSET_MASK)) | (
        rank.astype(kind) << kind(addresses.RANK_SHIFT)
    )


@library
def rank_of(address: Array) -> Array:
    """``getctarank``: rank of the CTA that a shared address belongs to (9.7.9.24)."""
    return (address >> address.dtype.type(addresses.RANK_SHIFT)).astype(U4)


@library
def is_in_space(address: Array, space: str, own_rank: Array | None = None) -> Array:
    """``isspacep``: whether a generic address lies in a state space (9.7.9.20)."""
    shared = address < U8(addresses.SHARED_WINDOW_END)
    span = U8(addresses.PRIVATE_WINDOW_BYTES)
    in_param = (address - U8(addresses.PARAM_BASE)) < span
    in_local = (address - U8(addresses.LOCAL_BASE)) < span
    if space in ("shared", "shared::cta"):
        return shared & ((address >> U8(addresses.RANK_SHIFT)) == own_rank)
    if space == "shared::cluster":
        return shared
    if space == "local":
        return in_local
    if space.startswith("param"):
        return in_param
    if space == "global":
        return ~(shared | in_param | in_local)
    return np.zeros(np.shape(address), bool)  # const: its variables live in global memory


@library
def load_params(params: Array, address: Array, nbytes: int) -> Array:
    """``ld.param`` at computed addresses: one element per lane; outside the block it reads 0."""
    offset = address.astype(np.int64) & np.int64(0xFFFFFFFF)
    inside = (offset >= 0) & (offset + nbytes <= params.size)
    first = np.where(inside, offset, 0)
    index = first[..., None] + np.arange(nbytes)
    data = np.ascontiguousarray(params[np.minimum(index, params.size - 1)])
    return np.where(inside, data.view(f"u{nbytes}")[..., 0], np.dtype(f"u{nbytes}").type(0))


# --- emitters -------------------------------------------------------------------------------------


@pure("mov", counter_class="move")
def emit_mov(e: Any) -> None:
    """``mov.type d, a``; a vector on one side packs or unpacks (9.7.9.1, 9.7.9.2)."""
    target, source = e.operands[0], e.operands[1]
    if isinstance(target, ptx.Vector):
        _emit_unpack(e, target, source)
    elif isinstance(source, ptx.Vector):
        _emit_pack(e, target, source)
    elif e.type == "b128":
        e.copy_wide(target, source)
    else:
        e.dst(e.src(1, DTYPE[e.type]), DTYPE[e.type], alias=True)


def _emit_unpack(e: Any, target: ptx.Vector, source: ptx.Operand) -> None:
    size = bits(e.type) // 8 // len(target.items)
    if e.type == "b128":
        for item, half in zip(target.items, e.wide(source), strict=True):
            if not isinstance(item, ptx.Sink):
                e.dst(half, "u8", operand=item)
        return
    word = e.value(source, DTYPE[e.type])
    # A row of the register file may be overwritten while the items are in use.
    function = "unpack_word" if ROW.fullmatch(word) else "split_word"
    parts = [
        (item, e.let(f"{function}({word}, {index}, {size})"))
        for index, item in enumerate(target.items)
        if not isinstance(item, ptx.Sink)
    ]
    for item, expr in parts:
        held = e.dtype_of(item)
        if int(held[1]) > size:  # 8-bit registers are kept in 16 bits
            e.dst(f"{expr}.astype({held})", held, operand=item)
        else:
            e.dst(expr, f"u{size}", operand=item)


def _emit_pack(e: Any, target: ptx.Operand, source: ptx.Vector) -> None:
    if e.type == "b128":
        low, high = (e.value(item, "u8") for item in source.items)
        e.set_wide(target, low, high)
        return
    size = bits(e.type) // 8 // len(source.items)
    items = ", ".join(e.value(item, f"u{size}") for item in source.items)
    e.dst(f"pack_words({items})", DTYPE[e.type], operand=target)


@pure("ld.param", "ld.param::entry", counter_class="ld_param")
def emit_ld_param(e: Any) -> None:
    """``ld.param{.v}.type d, [name+offset]`` or ``[register]`` (9.7.9.8)."""
    target, source = e.operands[0], e.operands[1]
    if not isinstance(source, ptx.Address):
        raise e.unsupported("operand is not an address")
    items = target.items if isinstance(target, ptx.Vector) else (target,)
    size = bits(e.type) // 8
    for index, item in enumerate(items):
        if isinstance(item, ptx.Sink):
            continue
        if isinstance(source.base, ptx.Symbol) and source.base.name in e.kernel.param_vars:
            expr = e.let(f"load_result(ctx, {e.address(source, index * size)}, {size})")
            e.axes = EVERY_LANE
        elif isinstance(source.base, ptx.Symbol):
            start = e.kernel.param(source.base.name).offset + source.base.offset
            expr = e.param(start + source.offset + index * size, size)
        else:
            expr = e.let(f"load_params({e.params()}, {e.address(source, index * size)}, {size})")
        _put_loaded(e, item, expr, size)


def _put_loaded(e: Any, item: ptx.Operand, expr: str, size: int) -> None:
    """Assign ``size`` loaded bytes; a wider register is extended as the type says (9.7.9.8)."""
    held = e.dtype_of(item)
    if int(held[1]) == size:
        e.dst(expr, f"u{size}", operand=item)
        return
    sign = "i" if e.type[0] == "s" else "u"
    wide = f"{sign}{held[1]}"
    narrow = f"{expr}.view(i{size})" if sign == "i" else expr
    e.dst(f"{narrow}.astype({wide})", wide, operand=item)


@pure("cvta")
def emit_cvta(e: Any) -> None:
    """``cvta{.to}.space.u32|u64 d, a``: state spaces are windows of one space (9.7.9.19)."""
    dtype = DTYPE[e.type]
    e.dst(e.src(1, dtype), dtype, alias=True)


@pure("isspacep")
def emit_isspacep(e: Any) -> None:
    """``isspacep.space p, a`` (9.7.9.20)."""
    held = e.register_dtype(1) or "u8"
    address = e.src(1, held)
    wide = address if held == "u8" else f"{address}.astype(u8)"
    own = e.parts[1] in ("shared", "shared::cta")
    rank = f", {e.special('%cluster_ctarank')}" if own else ""
    e.dst(f"is_in_space({wide}, {e.parts[1]!r}{rank})", "b1")


@pure("mapa")
def emit_mapa(e: Any) -> None:
    """``mapa{.shared::cluster}.u32|u64 d, a, b`` (9.7.9.23)."""
    dtype = DTYPE[e.type]
    e.dst(f"map_shared({e.src(1, dtype)}, {e.src(2, 'u4')})", dtype)


@pure("getctarank")
def emit_getctarank(e: Any) -> None:
    """``getctarank{.shared::cluster}.u32|u64 d, a`` (9.7.9.24)."""
    e.dst(f"rank_of({e.src(1, DTYPE[e.type])})", "u4")
