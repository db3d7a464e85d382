"""Bulk copies of some bytes of each 16 (PTX ISA 9.7.9.25.4.1, ``.cp_mask``)."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from tests.sim.tiny import run

BODY = """
    setp.eq.u32 %p0, %tid, 0;
    shl.b32 %r10, %tid, 2; add.u32 %r10, %r10, %smem; add.u32 %r11, %tid, 0x01020300;
    st.shared.b32 [%r10], %r11;
    mov.b32 %r12, 0xeeeeeeee; st.global.b32 [%out], %r12;
    fence.proxy.async.shared::cta; bar.sync 0;
    mov.u32 %r13, 128; mov.b64 %rd3, 0; mov.b16 %h1, {mask};
    @%p0 cp.async.bulk.global.shared::cta.bulk_group{hint}.cp_mask
        [%out0], [%smem], %r13{policy}, %h1;
    @%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group 0;
"""


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
@pytest.mark.parametrize("mask", [0xFFFF, 0, 0x8001, 0x00F2])
@pytest.mark.parametrize("hint", ["", ".L2::cache_hint"])
def test_masked_bytes_stay(mask: int, hint: str, completion: str) -> None:
    body = BODY.format(mask=mask, hint=hint, policy=", %rd3" if hint else "")
    result = run(body, arch="sm_100a", completion=completion, seed=1)
    assert result.rules == []
    sent = (np.arange(32, dtype=np.uint32) + 0x01020300).view(np.uint8).reshape(-1, 16)
    chosen = np.array([mask >> i & 1 for i in range(16)], bool)
    assert (result.out.view(np.uint8).reshape(-1, 16) == np.where(chosen, sent, 0xEE)).all()


def test_loads_have_no_byte_mask() -> None:
    with pytest.raises(UnsupportedError, match="byte mask"):
        run(
            "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.cp_mask "
            "[%smem], [%in0], %r1, [%smem], %h1;",
            arch="sm_100a",
        )
