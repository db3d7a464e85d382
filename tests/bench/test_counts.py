"""What is counted per tile, and what the model makes of a forward."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from cute_fa.bench.counts import count, rescales_skipped, roofline, table
from cute_fa.bench.model import model_forward
from cute_fa.problem import AttentionProblem
from cute_fa.sim.timeline import machine_of

PROBLEM = AttentionProblem(1, 128, 512, 2, 2, 64, 64, "bfloat16")
TILES = 2 * 4


@pytest.fixture(scope="module")
def forward():
    return model_forward(PROBLEM, "fa2", "sm_80")


def test_counts_are_per_tile(forward):
    row = json.loads(json.dumps(count(forward)))
    assert row["tiles"] == TILES
    assert row["mma_flops_per_tile"] == 4 * 128 * 128 * 64
    assert 1.0 <= row["exponentials_per_score"] < 1.2  # and one per row and block for the rescaling
    assert row["spill_bytes"] == 0
    assert row["rescales_skipped"] is None
    (role,) = row["warp_instructions_per_tile"].items()
    assert role[0] == "all"
    assert role[1]["mma"] == 4 * 128 * 128 * 64 / (2 * 16 * 8 * 16)
    assert sum(v for k, v in role[1].items() if k != "all") <= role[1]["all"]
    read = 2 * 64 * (128 + 2 * 512)  # bytes of Q, K and V of one head
    assert row["bytes_per_tile"]["global"] >= 2 * (read + 2 * 64 * 128) / TILES


def test_the_model_is_bounded_by_the_roofline(forward):
    row = count(forward)
    bounds = roofline(machine_of("sm_80"), PROBLEM)
    assert bounds == {"tensor core": 2048, "exponentials": 1024, "shared memory": 384}
    assert row["modelled"]["cycles_per_tile"] > max(bounds["tensor core"], bounds["exponentials"])
    units = row["modelled"]["units"]
    assert all(0 < share <= 1 for share in units.values())
    assert units["tensor core"] == pytest.approx(row["modelled"]["share_of_tensor_peak"], rel=1e-6)
    expected = bounds["tensor core"] / row["modelled"]["cycles_per_tile"]
    assert units["tensor core"] == pytest.approx(expected, rel=1e-6)


def test_as_many_ctas_are_replayed_as_share_an_sm(forward):
    assert len(forward.ctas) == min(2, forward.kernel.resources.ctas_per_sm)
    assert list(forward.roles) == ["all"]


def test_ctas_of_a_pair_are_on_two_sms():
    wide = AttentionProblem(1, 256, 256, 1, 1, 256, 256, "bfloat16")
    row = count(model_forward(wide, "fa4", "sm_100a"))
    modelled = row["modelled"]
    assert modelled["ctas_on_the_sm"] == 1
    share = modelled["share_of_tensor_peak"]
    assert share == pytest.approx(modelled["units"]["tensor core"], rel=1e-6)
    assert 2048 / modelled["cycles_per_tile"] == pytest.approx(share, rel=1e-6)


def test_table_and_picture(forward):
    row = count(forward)
    text = table([row, row])
    assert text.splitlines()[0].split()[-4:] == ["fa2", "sm_80", "fa2", "sm_80"]
    assert "rescales of O skipped" in text
    svg = ET.fromstring(forward.picture())
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert any("FA2 forward" in t for t in texts)
    assert any("Modelled, not measured" in t and "A100" in t for t in texts)


def test_rescaling_cannot_be_told_without_a_correction_role(forward):
    assert rescales_skipped(forward) is None
