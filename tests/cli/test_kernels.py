"""``cute-fa list`` says what the registry says."""

from __future__ import annotations

from cute_fa.build import registry
from cute_fa.target import TARGETS


def test_json_is_the_registry(cute_fa) -> None:
    assert cute_fa("list", "--json") == (0, {"kernels": registry.rows()})


def test_every_kernel_feature_and_arch_is_shown(cute_fa) -> None:
    code, text = cute_fa("list")
    assert code == 0
    for entry in registry.KERNELS:
        assert entry.name in text and entry.summary in text
        assert all(feature in text for feature in entry.features)
    lines = text.splitlines()
    for arch, target in TARGETS.items():
        [line] = [line for line in lines if line.startswith(arch + " ")]
        served = ["yes" if arch in entry.archs else "-" for entry in registry.KERNELS]
        assert line.split(target.part)[1].split() == served


def test_a_feature_that_a_kernel_lacks_is_marked(cute_fa, monkeypatch) -> None:
    from dataclasses import replace

    poor = replace(registry.KERNELS[0], generation="fa9", features=("causal",), archs=("sm_80",))
    monkeypatch.setattr(registry, "KERNELS", (*registry.KERNELS, poor))
    _, text = cute_fa("list")
    [softcap] = [line for line in text.splitlines() if line.startswith("softcap")]
    [causal] = [line for line in text.splitlines() if line.startswith("causal")]
    assert softcap.split()[-1] == "-" and causal.split()[-1] == "yes"
