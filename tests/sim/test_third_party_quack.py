"""quack-kernels (softmax, RMSNorm, cross-entropy, …) run unmodified on simulated devices.

Nobody here wrote these programs: they ask torch and the driver about the device, compile through
their own caches for TVM-FFI, use cp.async, shuffles, shared-memory reductions and register tricks.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from cute_fa.sim.device import Device
from tests.sim.third_party import import_quack

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="no quack-kernels"),
]

ROWS = 8  # a whole number of the kernels' row tiles


@pytest.fixture(scope="module")
def quack(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return import_quack(tmp_path_factory.mktemp("quack"))


@pytest.fixture
def device(quack: ModuleType) -> Iterator[Device]:
    torch.manual_seed(0)
    with Device("sm_80", workers=1) as dev:
        yield dev
    assert dev.launches
    assert all(launch.hazards == [] for launch in dev.launches)


def sample(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """A random leaf, and the same values as a float32 leaf for the reference."""
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    return x, x.detach().float().requires_grad_()


def check(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    torch.testing.assert_close(got.to(dtype), want.to(dtype), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("columns", [504, 4096])
def test_softmax(quack: ModuleType, device: Device, columns: int) -> None:
    x, reference = sample(ROWS, columns)
    out, want = quack.softmax(x), reference.softmax(-1)
    weight = torch.randn_like(out)
    out.backward(weight)
    want.backward(weight.float())
    check(out, want)
    check(x.grad, reference.grad)
    assert [launch.grid[1:] for launch in device.launches] == [(1, 1), (1, 1)]


@pytest.mark.parametrize("columns", [512, 4096])
def test_rmsnorm(quack: ModuleType, device: Device, columns: int) -> None:
    x, reference = sample(ROWS, columns)
    weight = torch.randn(columns, requires_grad=True)
    reference_weight = weight.detach().clone().requires_grad_()
    out = quack.rmsnorm(x, weight)
    want = F.rms_norm(reference, (columns,), reference_weight, eps=1e-6)
    grad = torch.randn_like(out)
    out.backward(grad)
    want.backward(grad.float())
    check(out, want)
    check(x.grad, reference.grad)
    torch.testing.assert_close(weight.grad, reference_weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [1024, 4096])
def test_cross_entropy(quack: ModuleType, device: Device, columns: int) -> None:
    x, reference = sample(ROWS, columns)
    target = torch.randint(0, columns, (ROWS,), device="cuda")
    loss = quack.cross_entropy(x, target, reduction="none")
    want = F.cross_entropy(reference, target, reduction="none")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    want.sum().backward()
    check(x.grad, reference.grad)


def test_completion_policies_agree_bit_for_bit(quack: ModuleType) -> None:
    x, _ = sample(ROWS, 504)
    results = []
    for completion in ("eager", "late", "random"):
        with Device("sm_80", workers=1, completion=completion, seed=1) as dev:
            results.append(quack.softmax(x).detach())
        assert not dev.launches[0].hazards
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_topk(quack: ModuleType, device: Device) -> None:
    from quack.topk import topk

    x = torch.randn(ROWS, 256, device="cuda", dtype=torch.float32)
    values, indices = topk(x, 8)
    want, want_indices = torch.topk(x, 8)
    # The kernel carries the column in the low mantissa bits while it sorts.
    torch.testing.assert_close(values, want, rtol=2**-15, atol=0)
    assert torch.equal(indices.long(), want_indices)


def test_rotary(quack: ModuleType, device: Device) -> None:
    from quack.rotary import apply_rotary_emb

    x = torch.randn(1, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    angle = torch.randn(16, 32, device="cuda")
    out = apply_rotary_emb(x, angle.cos(), angle.sin())
    first, second = x.float().chunk(2, -1)
    cos, sin = (f(angle)[None, :, None, :] for f in (torch.cos, torch.sin))
    check(out, torch.cat([first * cos - second * sin, first * sin + second * cos], -1))


def test_hadamard(quack: ModuleType, device: Device) -> None:
    from quack.transform.hadamard import hadamard_transform

    x = torch.randn(ROWS, 256, device="cuda", dtype=torch.float32)
    matrix = torch.ones(1, 1)
    for _ in range(8):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    torch.testing.assert_close(hadamard_transform(x), x @ matrix, rtol=1e-4, atol=1e-4)


def test_a_row_tile_that_is_not_full_reads_shared_memory_that_nobody_wrote(
    quack: ModuleType,
) -> None:
    """The simulator sees that warps of absent rows skip their load and use what they did not load.

    Nothing of it is stored, so the result is right all the same: a warning, which strict lets pass.
    """
    with Device("sm_80", workers=1) as dev:
        x, reference = sample(5, 504)
        check(quack.softmax(x), reference.softmax(-1))
    found = {(hazard.rule, hazard.severity) for hazard in dev.launches[0].hazards}
    assert found == {("uninitialised-shared-read", "warning")}


def test_another_architecture_with_kernels_that_the_package_kept_on_disk(tmp_path: Path) -> None:
    """Processes of their own, as the package remembers the device; the second compiles nothing."""
    program = f"""
        import torch
        from pathlib import Path
        from cute_fa.sim.device import Device
        from tests.sim.test_third_party_quack import check, sample
        from tests.sim.third_party import import_quack
        quack = import_quack(Path({str(tmp_path)!r}))
        with Device("sm_120a", workers=1) as dev:
            x, reference = sample(8, 1000)
            check(quack.softmax(x), reference.softmax(-1))
        assert not dev.launches[0].hazards
        print("ran", len(dev.launches))
    """
    kept: set[tuple[Path, int]] = set()
    for _ in range(2):
        command = [sys.executable, "-c", textwrap.dedent(program)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert result.stdout.strip() == "ran 1", result.stderr
        kept |= {(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.o")}
    assert len(kept) == 1
