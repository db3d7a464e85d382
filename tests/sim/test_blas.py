"""numpy's BLAS threads during a launch."""

import numpy as np
import pytest

from cute_fa.sim import blas


def thread_counts():
    np.ones((2, 2)) @ np.ones((2, 2))
    return [int(get()) for get, _ in blas._switches()]


def test_one_thread_inside_and_the_former_number_after():
    if not blas._switches():
        pytest.skip("numpy uses another BLAS here")
    before = thread_counts()
    with blas.one_blas_thread():
        assert thread_counts() == [1] * len(before)
    assert thread_counts() == before


def test_the_number_comes_back_after_an_error():
    before = thread_counts()
    with pytest.raises(RuntimeError, match="inside"), blas.one_blas_thread():
        raise RuntimeError("inside")
    assert thread_counts() == before
