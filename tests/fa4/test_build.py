"""What the compiler makes of FA4: products, copies, registers, and its softmax loop."""

from __future__ import annotations

import re

import pytest

from cute_fa.build import compile
from cute_fa.fa4.config import REGISTERS
from cute_fa.sim.umma_instruction import InstructionDescriptor, decode

COPY = "cp.async.bulk.tensor"
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 15.0},
    "window-softcap": {"window_size": (64, 64), "softcap": 15.0},
    "causal-left": {"causal": True, "window_size": (130, -1), "dtype": "float16"},
    "varlen-packed": {
        "varlen": True,
        "seqused_q": True,
        "seqused_k": True,
        "packed_group": 8,
        "window_size": (25, -1),
        "dtype": "float16",
    },
    "fp8-varlen-window-softcap-blocks": {
        "dtype": "float8_e4m3fn",
        "varlen": True,
        "window_size": (64, 64),
        "softcap": 15.0,
        "block_descales": True,
    },
}


def _compile(head_dim: int, mask: str, **how):
    return compile(
        "fa4",
        **{"arch": "sm_100a", "dtype": "bfloat16", "head_dim": head_dim, **how, **MASKS[mask]},
    )


@pytest.mark.parametrize(
    ("head_dim", "mask"),
    [(128, "window-softcap"), (256, "causal-left"), (72, "varlen-packed")],
)
def test_spills_nothing(head_dim, mask):
    """And each role gets the registers that the plan gives it. Kernels that are run are looked at
    as well (tests/rungs/bench.py), and rungs/test_spills.py has the whole table."""
    _assert_no_spills(_compile(head_dim, mask))


def test_launch_control_spills_nothing():
    _assert_no_spills(_compile(128, "causal", has_launch_control=True))


@pytest.mark.parametrize(
    ("dims", "mask"),
    [((192, 128), "full"), ((128, 128), "softcap")],
)
def test_tight_plans_spill_nothing(dims, mask):
    _assert_no_spills(_compile(dims[0], mask, head_dim_v=dims[1]))


def test_fp8_spills_nothing():
    _assert_no_spills(_compile(192, "full", head_dim_v=128, dtype="float8_e4m3fn"))
    _assert_no_spills(_compile(64, "fp8-varlen-window-softcap-blocks"))


@pytest.mark.parametrize(
    ("head_dim", "mask", "how", "stored_bytes"),
    [
        (72, "varlen-packed", {"has_launch_control": True}, 168),
        (128, "softcap", {"dtype": "float8_e4m3fn", "block_descales": True, "causal": True}, 32),
    ],
)
def test_what_spills(head_dim, mask, how, stored_bytes):
    """The exceptions that the README names: at most this much."""
    assert _compile(head_dim, mask, **how).resources.spill_store_bytes <= stored_bytes


def _assert_no_spills(compiled):
    config, resources = compiled.config, compiled.resources
    assert resources.stack_bytes == resources.spill_store_bytes == 0
    assert tuple(resources.role_registers.values()) == REGISTERS[config.num_q_tiles]


def _constants(ptx: str, register: str) -> tuple[int, ...]:
    """What a register is set to: a constant, or one of two."""
    found = re.search(rf"(?:mov|selp)\.b32\s+{register}, (\d+)(?:, (\d+))?[,;]", ptx)
    assert found is not None, register
    return tuple(int(number) for number in found.groups() if number is not None)


def _products(ptx: str) -> list[tuple[bool, list[InstructionDescriptor]]]:
    """Of each product in order, whether A is from tensor memory, and what it may be told to do."""
    found = re.findall(
        r"tcgen05\.mma\.cta_group::\d\.kind::f16\S*\s+\[%r\d+\], (\[?)%\w+\]?, %rd\d+, (%r\d+),",
        ptx,
    )
    return [(bool(a), [decode(bits, "f16") for bits in _constants(ptx, d)]) for a, d in found]


@pytest.mark.parametrize(("head_dim", "mask"), [(64, "full"), (128, "full"), (256, "full")])
def test_ptx_is_what_the_tiles_imply(head_dim, mask):
    """S and O of each Q tile in one place of the loop: whole k-steps, issued once each."""
    compiled = _compile(head_dim, mask)
    config, ptx = compiled.config, compiled.ptx
    products = _products(ptx)
    # A from tensor memory is P.
    steps = [sum(is_p == of_p for is_p, _ in products) for of_p in (False, True)]
    assert steps == [config.num_q_tiles * n // 16 for n in (config.padded_d, config.tile_n)]
    for is_p, forms in products:
        for form in forms:
            columns = config.padded_dv if is_p else config.tile_n
            assert (form.m, form.n, form.k, form.d) == (128 * config.num_ctas, columns, 16, "f32")
            assert (form.a, form.b) == ("bf16", "bf16")
            assert (form.transpose_a, form.transpose_b) == (False, is_p)  # V's rows are keys
        # A negative scale turns Q's sign.
        assert {form.negate_a for form in forms} == ({False} if is_p else {False, True})
    panels, panels_v = config.padded_d // 64, config.v_columns // 64
    # Q's tiles; K first and in the loop (with one Q tile, also its second block); V in the loop.
    loads = panels * (config.num_q_tiles + (3 if config.num_q_tiles == 1 else 2)) + panels_v
    assert len(re.findall(rf"{COPY}\.4d\.shared::\w+\.global", ptx)) == loads
    stores = ptx.count(f"{COPY}.4d.global.shared::cta")
    assert stores == config.padded_dv // 64 * config.num_q_tiles
    assert "ld.global" not in ptx and "wgmma" not in ptx and "mma.sync" not in ptx
    assert ptx.count("tcgen05.alloc") == ptx.count("tcgen05.dealloc") == 1
    for register in re.findall(r"tcgen05\.(?:de)?alloc\S*\s+\[?%r\d+\]?, (%r\d+);", ptx):
        assert _constants(ptx, register) == (config.tmem_map.columns,)


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize(("head_dim", "mask"), [(128, "full"), (256, "full")])
def test_machine_code_has_each_product_and_copy_once(head_dim, mask):
    """ptxas neither unrolls nor duplicates; the only store to global memory by a thread is LSE."""
    compiled = _compile(head_dim, mask)
    for machine, virtual in {
        "UTCHMMA": "tcgen05.mma.",
        "UTMALDG": ".global.tile.mbarrier",
        "UTMASTG": "global.shared::cta.tile.bulk_group",
        "STG": "st.global",
    }.items():
        assert len(re.findall(rf"\b{machine}\b", compiled.sass)) == compiled.ptx.count(virtual) > 0
    assert compiled.ptx.count("st.global") == 1
    assert not re.search(r"\b(LDG|LDGSTS|HMMA|HGMMA)\b", compiled.sass)


def _mnemonics(sass: str) -> list[str]:
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Za-z0-9_.]+)", sass, re.MULTILINE)


def _bodies(sass: str, tile_n: int) -> list[list[str]]:
    """Mnemonics from the loads of a row of S to its last store of P, masked and not masked."""
    names = _mnemonics(sass)
    chunks = tile_n // 32
    stores = [n for n, name in enumerate(names) if name == "STTM.x16"]
    bodies = []
    for last in stores[chunks - 1 :: chunks][:2]:
        waits = [n for n, name in enumerate(names[:last]) if "TRYWAIT" in name]
        bodies.append(names[waits[-1] : last + 1])
    return bodies


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize(
    ("head_dim", "mask", "arch", "cubics"),
    [(128, "causal", "sm_100a", 36), (128, "full", "sm_103a", 0)],
)
def test_softmax_loop(head_dim, mask, arch, cubics):
    """Per row of 128 scores: packed FMAs, three-input maxima, one conversion for two, and as many
    exponentials of either kind as the plan says; the factor's may stand elsewhere."""
    compiled = _compile(head_dim, mask, arch=arch)
    bodies = _bodies(compiled.sass, compiled.config.tile_n)
    assert len(bodies) == 2
    for body in bodies:
        count = {name: body.count(name) for name in set(body)}
        assert count["MUFU.EX2"] - (128 - cubics) in (0, 1)
        # The scale and anchor of 64 pairs, three steps of each cubic, and maybe the sums.
        assert count["FFMA2"] - (64 + 3 * cubics // 2) in (0, 1)
        # Two new values an instruction, and one clamp for each cubic.
        assert count["FMNMX3.NAN"] == 63 and count.get("FMNMX", 0) <= cubics + 2
        packed = sum(n for name, n in count.items() if name.startswith("F2FP"))
        assert packed == 64
        assert not {"LDL", "STL", "LDS"} & set(body)
        # Nothing is moved about for the sake of packing.
        assert sum(n for name, n in count.items() if "MOV" in name) <= 4


@pytest.mark.usefixtures("nvdisasm")
def test_hand_overs_of_the_softmax_loop():
    """CORRECTION hears of the factors before the exponentials begin in earnest, MMA of the first
    part of P before those of the last chunk: that is why S is read twice."""
    compiled = _compile(128, "full")
    body = _bodies(compiled.sass, compiled.config.tile_n)[1]
    assert body.count("LDTM.x32") == 4 + 3
    exponentials = [n for n, name in enumerate(body) if name == "MUFU.EX2"]

    def before(name: str) -> int:
        return sum(n < body.index(name) for n in exponentials)

    cubics = sum(2 * len(compiled.config.polynomial_pairs_of(chunk)) for chunk in range(3))
    assert before("BAR.ARV") < 16
    first_part = 96 - cubics
    assert first_part <= before("SYNCS.ARRIVE.TRANS64.ART0") <= first_part + 1
