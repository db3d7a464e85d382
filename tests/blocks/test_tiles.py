"""Shared-memory tile geometry: panels, swizzle, and what they promise about banks."""

from __future__ import annotations

import pytest

from cute_fa.blocks.tiles import panel_columns, round_up, rows_per_copy, swizzle_bits

COLUMNS = [16, 32, 48, 64, 80, 96, 128, 160, 192, 256]


def _address(row: int, column: int, columns: int) -> int:
    """Byte address of an element of a 16-row tile, by the definition in ``blocks.tiles``."""
    panel = panel_columns(columns)
    address = 2 * ((column // panel) * 16 * panel + row * panel + column % panel)
    chunk_bits = ((1 << swizzle_bits(columns)) - 1) << 4
    return address ^ ((address >> 3) & chunk_bits)


@pytest.mark.parametrize("columns", COLUMNS)
def test_swizzle_is_a_bijection_of_the_tile(columns):
    chunks = {
        _address(row, column, columns) for row in range(16) for column in range(0, columns, 8)
    }
    assert chunks == set(range(0, 16 * columns * 2, 16))


@pytest.mark.parametrize("columns", COLUMNS)
def test_eight_rows_of_a_chunk_touch_all_banks_once(columns):
    """What one phase of ldmatrix reads: 8 rows × 16 bytes, 32 banks of 4 bytes."""
    for first_row in (0, 8):
        for column in range(0, columns, 8):
            rows = range(first_row, first_row + 8)
            assert len({_address(row, column, columns) % 128 for row in rows}) == 8


@pytest.mark.parametrize("columns", COLUMNS)
def test_eight_threads_of_a_copy_touch_all_banks_once(columns):
    """A quarter warp's 16-byte copies: consecutive chunks of consecutive panel rows."""
    per_row = panel_columns(columns) // 8
    places = [divmod(thread, per_row) for thread in range(8)]
    assert len({_address(row, 8 * chunk, columns) % 128 for row, chunk in places}) == 8


def test_rows_per_copy():
    assert [rows_per_copy(128, columns) for columns in (16, 96, 64)] == [64, 32, 16]


def test_no_panel_for_odd_widths():
    with pytest.raises(ValueError, match="multiple of 16"):
        panel_columns(72)
    assert round_up(72, 16) == 80
