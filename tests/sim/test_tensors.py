"""CPU tensors as device tensors: DLPack views and memory regions."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import tvm_ffi

from cute_fa.sim import tensors
from cute_fa.sim.memory import GlobalMemory
from cute_fa.sim.patching import Patches


def describe(memory: GlobalMemory) -> list[tuple[str, int, int]]:
    return [(region.name, region.base, region.nbytes) for region in memory.regions]


@pytest.mark.parametrize("source", [torch.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3)])
def test_views_are_the_same_memory_on_another_device(source: torch.Tensor | np.ndarray) -> None:
    view = tvm_ffi.from_dlpack(tensors.DeviceView(source))
    assert str(view.device) == "cuda:0"
    assert tuple(view.shape) == (2, 3)
    address = source.data_ptr() if isinstance(source, torch.Tensor) else source.ctypes.data
    assert view.data_ptr() == address
    assert str(tvm_ffi.from_dlpack(source).device) == "cpu:0"  # the source is untouched


def test_fp8_is_told_to_readers_whatever_torch_hands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of torch before DLPack 1.1 refuse to."""
    source = torch.arange(16.0).reshape(2, 8).to(torch.float8_e4m3fn)
    hand_out = torch.Tensor.__dlpack__

    def refusing(self: torch.Tensor, **options: object) -> object:
        assert self.dtype != torch.float8_e4m3fn, "float8 types are not supported by dlpack"
        return hand_out(self, **options)

    monkeypatch.setattr(torch.Tensor, "__dlpack__", refusing)
    view = tvm_ffi.from_dlpack(tensors.DeviceView(source))
    assert (str(view.dtype), str(view.device), view.shape) == ("float8_e4m3fn", "cuda:0", (2, 8))
    assert view.data_ptr() == source.data_ptr()


def test_compiled_readers_of_torch_tensors_see_the_device_only_while_it_is_entered() -> None:
    """TVM-FFI reads torch tensors through DLPack's C interface, which it looks up once."""
    echo = tvm_ffi.convert(lambda tensor: str(tensor.device))
    x = torch.zeros(3)
    assert echo(x) == "cpu:0"
    for _ in range(2):
        patches = Patches()
        tensors.wrap_exchange_api(patches)
        try:
            assert echo(x) == "cuda:0"
        finally:
            patches.undo()
        assert echo(x) == "cpu:0"


def test_conversion_reaches_into_containers_and_leaves_the_rest() -> None:
    x = torch.zeros(3)
    converted = tensors.to_tvm_ffi((x, [x, 7], 2.5, None))
    assert [str(t.device) for t in (converted[0], converted[1][0])] == ["cuda:0"] * 2
    assert (converted[1][1], converted[2], converted[3]) == (7, 2.5, None)
    meta = torch.zeros(3, device="meta")
    assert tensors.to_tvm_ffi(meta) is meta


def test_arguments_become_regions_of_their_whole_storage() -> None:
    memory = GlobalMemory()
    x, y = torch.zeros(100), torch.zeros(8, dtype=torch.uint8)
    array = np.zeros((4, 4), np.int16)
    with tensors.CallRegions(memory) as regions:
        regions.add_arguments((x[10:20], 1, [y]), {"table": array[::-1, 1:]})
        assert sorted(describe(memory)) == sorted(
            [
                ("argument 0", x.data_ptr(), 400),
                ("argument 2[0]", y.data_ptr(), 8),
                ("argument table", array.ctypes.data, 32),
            ]
        )
        region = memory.find(x.data_ptr())
        assert region is not None
        region.data[:4] = np.frombuffer(np.float32(3.5).tobytes(), np.uint8)
    assert x[0] == 3.5
    assert memory.regions == ()


def test_two_views_of_one_storage_are_one_region_and_empty_tensors_none() -> None:
    memory = GlobalMemory()
    x = torch.zeros(100)
    with tensors.CallRegions(memory) as regions:
        regions.add_arguments((x[:50], x[50:], torch.zeros(0)), {})
        assert describe(memory) == [("argument 0", x.data_ptr(), 400)]


def test_regions_that_the_caller_registered_stay() -> None:
    memory = GlobalMemory()
    x = torch.zeros(100)
    mine = memory.register(x.numpy(), name="mine")
    with tensors.CallRegions(memory) as regions:
        regions.add_arguments((x,), {})
        assert memory.regions == (mine,)
    assert memory.regions == (mine,)


def test_unknown_addresses_are_looked_up_among_live_tensors() -> None:
    memory = GlobalMemory()
    hidden = torch.zeros(50, dtype=torch.float64)
    with tensors.CallRegions(memory):
        region = memory.resolve(hidden.data_ptr() + 80, 8)
        assert region is not None
        assert (region.base, region.nbytes) == (hidden.data_ptr(), 400)
        assert "tensor (50,) torch.float64 that is no argument" in region.name
        assert memory.resolve(0x7000_1234_5678) is None
    assert memory.regions == () and memory.resolver is None


def test_objects_with_properties_that_fail_do_not_disturb_the_search() -> None:
    class Hostile:
        @property
        def __class__(self) -> type:  # type: ignore[override]
            raise RuntimeError("do not look at me")

    hostile = Hostile()
    assert gc.is_tracked(hostile)
    needle = torch.zeros(3)
    assert any(tensor is needle for tensor in tensors.live_tensors())


def test_sparse_tensors_do_not_disturb_the_search() -> None:
    sparse = torch.eye(3).to_sparse()
    needle = torch.zeros(3)
    found = list(tensors.live_tensors())
    assert any(tensor is needle for tensor in found)
    assert not any(tensor is sparse for tensor in found)


def test_fake_tensors_have_no_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(4)
    assert not tensors.is_host_tensor(fake)
    assert tensors.is_host_tensor(torch.empty(4)) and not tensors.is_host_tensor([1.0])
