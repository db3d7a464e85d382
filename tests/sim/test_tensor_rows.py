"""Tensor copies that gather and scatter four rows of a matrix (PTX ISA 5.5.3.4)."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from cute_fa.sim.tensor_map import swizzled_chunks
from tests.sim.test_mbarrier import init, wait
from tests.sim.test_tensor_copy import BAR, FENCE, POLICIES, Tensor, dump, dumped, program
from tests.sim.tiny import run

ROW = 128  # bytes of one row of the box


def coordinates(column: int, rows: tuple[int, ...]) -> str:
    moves = [f"mov.u32 %r{20 + i}, {x};" for i, x in enumerate((column, *rows))]
    return "\n".join(moves)


NAMES = "{%r20, %r21, %r22, %r23, %r24}"


def in_order(memory: bytes, swizzle: int) -> np.ndarray:
    """Four rows of shared memory, f16, with the swizzle undone; shared memory begins at 1024."""
    chunks = np.frombuffer(memory, np.uint8).reshape(-1, 16)
    order = swizzled_chunks(1024, 4 * ROW, swizzle) - 64
    return chunks[order].reshape(4, ROW).view(np.uint16)


@POLICIES
@pytest.mark.parametrize("swizzle", [0, 128])
@pytest.mark.parametrize("rows", [(3, 0, 7, 3), (19, -1, 20, 4)])
def test_gather(rows: tuple[int, ...], swizzle: int, completion: str) -> None:
    tensor = Tensor((80, 20), (64, 1), swizzle=swizzle)
    body = (
        init(1, f"+{BAR}")
        + coordinates(8, rows)
        + f"""
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+{BAR}], {4 * ROW};
    @%p0 cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes
        [%smem], [%in0, {NAMES}], [%smem+{BAR}];
    """
        + wait(0, f"+{BAR}")
        + dump(4)
    )
    result = program(body, tensor, words=4, completion=completion, seed=1)
    assert result.rules == []
    got = in_order(dumped(result), swizzle)
    matrix = tensor.data[: 20 * 160].view(np.uint16).reshape(20, 80)
    for line, row in zip(got, rows, strict=True):
        want = matrix[row, 8:72] if 0 <= row < 20 else np.zeros(64, np.uint16)
        assert (line == want).all()
    inside = sum(0 <= row < 20 for row in rows)
    assert result.launch.counters["global_bytes_read"] >= inside * ROW


@POLICIES
def test_scatter(completion: str) -> None:
    tensor = Tensor((80, 20), (64, 1), swizzle=128)
    before = tensor.data[: 20 * 160].view(np.uint16).reshape(20, 80).copy()
    rows = (5, 25, 0, 19)
    body = (
        """
    setp.eq.u32 %p0, %tid, 0;
    shl.b32 %r40, %tid, 4; add.u32 %r40, %r40, %smem; add.u32 %r41, %tid, 1000;
    st.shared.v4.u32 [%r40], {%r41, %r41, %r41, %r41};
    """
        + FENCE
        + "bar.sync 0;\n"
        + coordinates(16, rows)
        + f"""
    @%p0 cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group
        [%in0, {NAMES}], [%smem];
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 0;
    """
    )
    result = program(body, tensor, completion=completion, seed=1)
    assert result.rules == []
    threads = np.repeat(np.arange(1000, 1032, dtype=np.uint32), 4)
    sent = in_order(threads.tobytes(), 128)
    after = tensor.data[: 20 * 160].view(np.uint16).reshape(20, 80)
    for number, row in enumerate(rows):
        if row < 20:
            before[row, 16:80] = sent[number]
    assert (after == before).all()


def test_the_box_of_the_map_has_to_be_one_row() -> None:
    tensor = Tensor((80, 20), (64, 2))
    body = (
        init(1, f"+{BAR}")
        + coordinates(0, (0, 1, 2, 3))
        + f"""
    @%p0 cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes
        [%smem], [%in0, {NAMES}], [%smem+{BAR}];
    """
    )
    assert program(body, tensor).rules == ["bulk-operands"]


@pytest.mark.parametrize(
    "line",
    [
        "2d.global.shared::cta.tile::gather4.bulk_group [%in0, {%r1, %r2, %r3, %r4, %r5}], [%smem]",
        "2d.global.shared::cta.tile::scatter4.bulk_group [%in0, {%r1, %r2}], [%smem]",
        "3d.global.shared::cta.tile::scatter4.bulk_group "
        "[%in0, {%r1, %r2, %r3, %r4, %r5}], [%smem]",
    ],
)
def test_forms_that_do_not_exist_are_refused(line: str) -> None:
    with pytest.raises(UnsupportedError, match="line"):
        run(f"cp.async.bulk.tensor.{line};", arch="sm_100a")
