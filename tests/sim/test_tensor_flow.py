"""Which tcgen05.ld are over because their registers are used, and pieces of warps and CTAs."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa import ptx
from cute_fa.sim.tensor_flow import used_loads
from cute_fa.sim.tensor_pieces import Piece, pieces
from tests.sim.tiny import FRAME

LD = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r20, %r21}, [%r10];\n"
ONE, BOTH = "add.u32 %r22, %r20, 1;\n", "add.u32 %r22, %r20, %r21;\n"
ST = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r10], {%r9};\n"


def is_used(body: str) -> bool:
    text = FRAME.format(
        arch="sm_100a", module="", declarations="", body=LD + body, in_bytes=4, out_bytes=4
    )
    kernel = ptx.parse(text).kernels["tiny"]
    load = next(i.index for i in kernel.body if i.parts[:2] == ("tcgen05", "ld"))
    return load in used_loads(kernel)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (BOTH + "bar.sync 0;\n", True),
        (ONE + "bar.sync 0;\n" + BOTH, False),  # half of the registers
        ("bar.sync 0;\n" + BOTH, False),
        (BOTH + ST, True),
        (ST + BOTH, False),
        ("tcgen05.st.sync.aligned.32x32b.x2.b32 [%r10], {%r20, %r21};\n", True),  # it uses them
        ("tcgen05.wait::ld.sync.aligned;\nbar.sync 0;\n", True),
        ("tcgen05.wait::st.sync.aligned;\nbar.sync 0;\n" + BOTH, False),
        ("mbarrier.arrive.shared.b64 _, [%smem];\n" + BOTH, False),
        ("mbarrier.try_wait.parity.shared.b64 %p1, [%smem], 0;\n" + BOTH + ST, True),
        ("bar.warp.sync -1;\n" + BOTH + ST, True),  # other lanes of the warp only
        ("mov.u32 %r20, 0;\n" + BOTH + "bar.sync 0;\n", False),  # overwritten, not used
        ("st.release.cta.shared.u32 [%smem], %r9;\n" + BOTH, False),
        ("st.shared.u32 [%smem], %r9;\n" + BOTH + ST, True),
        ("", True),  # nobody is let on before the end
        # one of two ways does not use them
        ("@%p1 bra A;\n" + BOTH + "A:\nbar.sync 0;\n", False),
        ("@%p1 bra A;\n" + BOTH + "bra B;\nA:\n" + BOTH + "B:\nbar.sync 0;\n", True),
        # a loop in between, and one around it
        ("A:\nadd.u32 %r9, %r9, 1;\n@%p1 bra A;\n" + BOTH + ST, True),
        ("A:\nadd.u32 %r9, %r9, 1;\n@%p1 bra A;\n" + ONE + ST, False),
        ("A:\n" + ONE + "@%p1 bra A;\nadd.u32 %r22, %r21, 1;\n" + ST, True),
    ],
)
def test_loads_that_are_over(body: str, expected: bool) -> None:
    assert is_used(body) is expected


def parts(
    rect: tuple[int, int, int, int], keys: list[list[int]]
) -> set[tuple[int, int, int, int, int]]:
    out = set()
    for key, piece in pieces(rect, np.array(keys)):
        assert isinstance(piece, Piece)
        warps, slots = piece.warps, piece.slots
        out.add((key, warps.start, warps.stop, slots.start, slots.stop))
    return out


def test_one_piece_for_each_warpgroup() -> None:
    assert parts((4, 12, 2, 5), [[7] * 3] * 8) == {(7, 4, 8, 2, 5), (7, 8, 12, 2, 5)}
    assert parts((2, 6, 0, 1), [[7]] * 4) == {(7, 2, 4, 0, 1), (7, 4, 6, 0, 1)}


def test_pieces_of_warps_that_differ() -> None:
    keys = [[1, 1], [1, 1], [2, 2], [1, 1]]
    assert parts((0, 4, 0, 2), keys) == {(1, 0, 2, 0, 2), (2, 2, 3, 0, 2), (1, 3, 4, 0, 2)}


def test_pieces_of_ctas_that_differ() -> None:
    keys = [[1, 2, 2], [1, 2, 2], [1, 2, 3]]
    want = {(1, 0, 3, 0, 1), (2, 0, 2, 1, 3), (2, 2, 3, 1, 2), (3, 2, 3, 2, 3)}
    assert parts((0, 3, 0, 3), keys) == want


def test_pieces_cover_every_access_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        keys = rng.integers(-1, 3, (int(rng.integers(1, 9)), int(rng.integers(1, 5))))
        rect = 1, 1 + keys.shape[0], 2, 2 + keys.shape[1]
        covered = np.full(keys.shape, -1)
        for key, piece in pieces(rect, keys):
            assert piece.warps.start // 4 == (piece.warps.stop - 1) // 4
            view = covered[
                piece.warps.start - 1 : piece.warps.stop - 1,
                piece.slots.start - 2 : piece.slots.stop - 2,
            ]
            assert (view == -1).all()
            view[...] = key
        np.testing.assert_array_equal(covered, keys)
