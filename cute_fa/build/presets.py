"""Which kernels go into a bundle: the named selections, and the candidates for tuning.

A preset asks every rung of an architecture for the same variants; what a rung does not serve is
left out, with the reason kept in the bundle's manifest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cute_fa.build import registry
from cute_fa.build.compile import Request
from cute_fa.build.registry import KernelEntry
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import KernelVariant
from cute_fa.target import Target, get_target

DEFAULT, CANDIDATE = "default", "candidate"


@dataclass(frozen=True)
class Wish:
    """A kernel that a preset asks for.

    Attributes:
        variant: what it must serve.
        generations: the rungs that are asked; empty for every rung.
        overrides: fields of the config, for a candidate.
    """

    variant: KernelVariant
    generations: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Selected:
    """A kernel to compile, and whether launches choose it by themselves ("default")."""

    request: Request
    role: str


@dataclass(frozen=True)
class LeftOut:
    """A wish that a rung does not serve on an architecture."""

    what: str
    reason: str


def _benchmark() -> Iterator[Wish]:
    """The papers' shapes on every rung; FA1, the slowest, at two head dims in one dtype."""
    for dtype, dim, causal in itertools.product(_HALVES, (64, 128, 256), (False, True)):
        variant = KernelVariant(dtype, dim, dim, causal=causal)
        yield Wish(variant, ("fa2", "fa3", "fa4"))
        if dtype == "bfloat16" and dim < 256:
            yield Wish(variant, ("fa1",))
    for dim, causal in itertools.product((64, 128, 256), (False, True)):
        yield Wish(KernelVariant("float8_e4m3fn", dim, dim, causal=causal), ("fa3", "fa4"))
    for dtype, causal in itertools.product(("bfloat16", "float8_e4m3fn"), (False, True)):
        packed = KernelVariant(dtype, 128, 128, causal=causal, is_varlen=True)
        yield Wish(packed, ("fa3", "fa4") if dtype == "float8_e4m3fn" else ("fa2", "fa3", "fa4"))


def _check() -> Iterator[Wish]:
    """Every feature once at a small head dim, and every class of head dims once."""
    base = KernelVariant("bfloat16", 64, 64)
    masks: tuple[dict[str, Any], ...] = (
        {},
        {"causal": True},
        {"has_window_left": True, "has_window_right": True},
        {"has_window_left": True, "causal": True},
        {"has_window_left": True},
        {"has_window_right": True},
        {"has_softcap": True},
        {"has_softcap": True, "causal": True},
        {"is_varlen": True},
        {"is_varlen": True, "causal": True},
        {"is_varlen": True, "has_seqused_q": True, "has_seqused_k": True},
    )
    for features in masks:
        yield Wish(replace(base, **features))
    for causal in (False, True):
        yield Wish(replace(base, packed_group=4, causal=causal), ("fa3", "fa4"))
    for dim, dim_v in ((8, 8), (40, 120), (96, 96), (128, 128), (192, 128), (256, 256)):
        yield Wish(KernelVariant("bfloat16", dim, dim_v, causal=True))
    yield Wish(KernelVariant("float16", 128, 128))
    fp8 = KernelVariant("float8_e4m3fn", 128, 128, causal=True)
    features_of_fp8: tuple[dict[str, Any], ...] = (
        {},
        {"has_block_descales": True},
        {"is_varlen": True, "has_seqused_k": True},
    )
    for features in features_of_fp8:
        yield Wish(replace(fp8, **features), ("fa3", "fa4"))
    packed_blocks = KernelVariant("float8_e4m3fn", 64, 64, is_varlen=True, has_block_descales=True)
    yield Wish(packed_blocks, ("fa3", "fa4"))


Grid = Mapping[str, Sequence[Any]]

# Per rung, for 16-bit inputs: each line is a grid over fields of its config; with a head dim it is
# for that one only. Illegal combinations (registers, shared memory, divisibility) are dropped by
# the config itself, and those that turn out to spill registers are left out of the bundle.
CANDIDATES: Mapping[str, tuple[Grid, ...]] = {
    "fa2": (
        {"tile_m": (64,), "tile_n": (32, 64, 128), "num_threads": (128,), "stages": (1, 2)},
        {"tile_m": (128,), "tile_n": (32, 64, 128), "num_threads": (256,), "stages": (2,)},
        # 32 rows per warp: S and O are Dv + tile_n of 255 registers, and more than 160 spilled.
        *(
            {
                "head_dim": (dim,),
                "tile_m": (warps * 32,),
                "tile_n": columns,
                "num_threads": (warps * 32,),
                "stages": stages,
            }
            for dim, columns in ((64, (32, 64)), (128, (32,)))
            for warps, stages in ((4, (1, 2)), (8, (2,)))
        ),
    ),
    # wgmma reads 64 rows of Q and all of K for each block: below 96 columns that is more than 107
    # bytes per cycle, of 128, and 16 % more instructions per score. So D = 256 alone, which has no
    # room for more, tries them, and what has three strips of 160 registers.
    "fa3": (
        {
            "head_dim": (64,),
            "num_consumers": (3,),
            "tile_n": (80, 96, 112, 128),
            "has_turns": (True, False),
        },
        {"head_dim": (64,), "num_consumers": (3,), "tile_n": (96, 128), "stages": (3, 4)},
        {
            "head_dim": (64,),
            "num_consumers": (2,),
            "tile_n": (128, 160, 176, 192, 224),
            "has_turns": (True, False),
        },
        {"head_dim": (64,), "num_consumers": (2,), "tile_n": (128, 176), "stages": (3,)},
        {
            "head_dim": (128,),
            "tile_n": (96, 112, 128, 144, 160, 176, 192),
            "has_own_o": (False,),
            "has_turns": (True, False),
        },
        {"head_dim": (128,), "tile_n": (96, 112, 128, 144, 160), "has_own_o": (True,)},
        {"head_dim": (128,), "tile_n": (96, 112, 128), "has_own_o": (False,), "stages": (3,)},
        {"head_dim": (128,), "num_consumers": (3,), "tile_n": (64, 80), "has_own_o": (True, False)},
        {"head_dim": (256,), "tile_n": (64, 80), "has_turns": (True, False)},
        {"head_dim": (256,), "tile_n": (48,), "stages": (3,)},
        # Pairs of CTAs that share K and V, which takes half of what L2 has to send.
        {
            "head_dim": (128,),
            "is_paired": (True,),
            "has_own_o": (True, False),
            "tile_n": (128, 144, 160, 176),
        },
        {
            "head_dim": (128,),
            "is_paired": (True,),
            "is_persistent": (False,),
            "has_own_o": (False,),
            "tile_n": (128, 176),
        },
        {"head_dim": (256,), "is_paired": (True,), "tile_n": (64, 80)},
        {"is_persistent": (False,), "has_own_o": (False,)},
        {
            "head_dim": (128,),
            "is_persistent": (False,),
            "has_own_o": (False,),
            "tile_n": (112, 128, 144, 160, 176),
        },
        {"is_persistent": (True,), "has_own_o": (True, False)},
    ),
    "fa4": (
        {"polynomial_pairs": (0, 2, 4, 6, 8)},
        {"rescale_threshold": (0.0, 4.0)},
        {"tile_n": (64, 96, 128), "stages": (3, 4)},
        {"is_persistent": (False,), "has_own_o": (False,)},
        {"is_persistent": (True,), "has_own_o": (True, False)},
        {
            "is_persistent": (False,),
            "has_launch_control": (True,),
            "has_own_o": (True, False),
            "stages": (3, 5),
        },
        # Where one CTA has one Q tile, against pairs of CTAs.
        {"is_paired": (False,), "tile_n": (64, 96, 128), "stages": (3, 4, 5)},
        {
            "is_paired": (False,),
            "is_persistent": (False,),
            "has_launch_control": (True,),
            "tile_n": (64,),
        },
    ),
}

# The same for FP8 inputs, whose K and V take half the room and have a third ring, or longer tiles.
FP8_CANDIDATES: Mapping[str, tuple[Grid, ...]] = {
    "fa3": (
        {
            "head_dim": (64,),
            "num_consumers": (3,),
            "tile_n": (96, 128, 160),
            "has_turns": (True, False),
        },
        {
            "head_dim": (64,),
            "num_consumers": (2,),
            "tile_n": (128, 160, 192, 224, 256),
            "has_turns": (True, False),
        },
        {
            "head_dim": (128,),
            "tile_n": (96, 128, 160, 192, 224),
            "has_turns": (True, False),
        },
        {"head_dim": (128,), "tile_n": (96, 128), "stages": (3, 4)},
        {"head_dim": (128,), "num_consumers": (3,), "tile_n": (96,), "stages": (2, 3)},
        {
            "head_dim": (128,),
            "is_persistent": (False,),
            "has_own_o": (False,),
            "tile_n": (128, 160),
        },
        {"head_dim": (256,), "tile_n": (64, 96), "has_turns": (True, False)},
        {"head_dim": (256,), "tile_n": (64,), "stages": (3,)},
        {"head_dim": (256,), "is_paired": (True,), "tile_n": (64, 96)},
        {"is_persistent": (False,), "has_own_o": (False,)},
        {"is_persistent": (True,), "has_own_o": (True, False)},
    ),
    "fa4": (
        {"polynomial_pairs": (0, 2, 4, 6, 8)},
        {"tile_n": (64, 128), "stages": (3, 4, 6)},
        {"is_persistent": (True, False)},
    ),
}


# The same for packed sequences, at D = 128: how row tiles fall on SMs is another matter there. What
# is best within a tile is learnt from dense problems.
VARLEN_CANDIDATES: Mapping[str, tuple[Grid, ...]] = {
    "fa3": (
        {"is_persistent": (True, False), "has_own_o": (False,), "tile_n": (112, 128, 160, 176)},
        {"is_persistent": (True,), "has_own_o": (True,), "tile_n": (112, 128, 144, 160)},
        {"is_paired": (True,), "has_own_o": (True, False), "tile_n": (128, 176)},
    ),
    "fa4": (
        {"is_persistent": (True, False), "has_own_o": (True, False)},
        {"tile_n": (64, 128), "stages": (3, 4)},
    ),
}
VARLEN_FP8_CANDIDATES: Mapping[str, tuple[Grid, ...]] = {
    "fa3": ({"is_persistent": (True, False), "has_own_o": (False,), "tile_n": (128, 160, 192)},),
    "fa4": ({"is_persistent": (True, False), "tile_n": (64, 128)},),
}


def _tune() -> Iterator[Wish]:
    """The candidates for what is benchmarked in bfloat16, which float16 is like, and in FP8; beside
    what they compete with."""
    dense = (("bfloat16", CANDIDATES), ("float8_e4m3fn", FP8_CANDIDATES))
    packed = (("bfloat16", VARLEN_CANDIDATES), ("float8_e4m3fn", VARLEN_FP8_CANDIDATES))
    found = [
        (KernelVariant(dtype, dim, dim, causal=causal, is_varlen=is_varlen), table)
        for is_varlen, dims, tables in ((False, (64, 128, 256), dense), (True, (128,), packed))
        for dtype, table in tables
        for dim, causal in itertools.product(dims, (False, True))
    ]
    for variant, table in found:
        for generation, grids in table.items():
            yield Wish(variant, (generation,))
            for grid in grids:
                for values in itertools.product(*grid.values()):
                    overrides = dict(zip(grid, values, strict=True))
                    yield Wish(variant, (generation,), overrides)


def _all() -> Iterator[Wish]:
    for name in ("benchmark", "check", "tune"):
        yield from PRESETS[name].wishes()


@dataclass(frozen=True)
class Preset:
    """A named selection of kernels."""

    summary: str
    wishes: Callable[[], Iterator[Wish]]


_HALVES = ("float16", "bfloat16")
PRESETS: Mapping[str, Preset] = {
    "benchmark": Preset("the benchmark's shapes on every rung", _benchmark),
    "check": Preset("every feature and class of head dims, for tools/gpu_check.py", _check),
    "tune": Preset("candidate configurations, for gpu_check.py --tune", _tune),
    "all": Preset("benchmark, check and tune", _all),
}


def select(
    presets: Sequence[str], archs: Sequence[str | Target]
) -> tuple[tuple[Selected, ...], tuple[LeftOut, ...]]:
    """The kernels of some presets for some architectures, each once, and what is not served.

    A candidate that equals the default config is the default.

    Raises:
        InvalidArgumentError: an unknown preset or architecture, or none.
    """
    targets = [get_target(arch) for arch in archs]
    for name in presets:
        if name not in PRESETS:
            raise InvalidArgumentError(
                "unknown preset",
                got=repr(name),
                expected=", ".join(PRESETS),
                fix="cute-fa aot --help says what is in each",
            )
    if not targets or not presets:
        raise InvalidArgumentError(
            "a bundle needs an architecture and a preset",
            got=f"{len(targets)} architectures, {len(presets)} presets",
            expected="at least one of each",
            fix="e.g. --arch sm_90a --preset benchmark",
        )
    wishes = [wish for name in presets for wish in PRESETS[name].wishes()]
    # Defaults first, so that a candidate that equals one does not take its place.
    wishes.sort(key=lambda wish: bool(wish.overrides))
    selected: dict[tuple[Any, ...], Selected] = {}
    left_out = {
        target.arch: LeftOut(target.arch, registry.NOT_COMPILED[target.arch])
        for target in targets
        if target.arch in registry.NOT_COMPILED
    }
    targets = [target for target in targets if target.arch not in left_out]
    for wish, target, entry in itertools.product(wishes, targets, _entries()):
        if wish.generations and entry.generation not in wish.generations:
            continue
        if target.arch not in entry.archs:
            continue
        request = Request(entry, wish.variant, target, wish.overrides)
        try:
            config = request.config
        except UnsupportedError as error:
            left_out.setdefault(request.label, LeftOut(request.label, str(error)))
            continue
        except InvalidArgumentError:
            if not wish.overrides:
                raise
            continue  # a point of a candidate grid that the config refuses
        role = CANDIDATE if wish.overrides else DEFAULT
        key = (entry.generation, target.arch, wish.variant, config)
        selected.setdefault(key, Selected(request, role))
    return tuple(selected.values()), tuple(left_out.values())


def _entries() -> tuple[KernelEntry, ...]:
    return tuple(entry for entry in registry.KERNELS if entry.direction == "fwd")
