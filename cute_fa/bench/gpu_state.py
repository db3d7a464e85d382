"""What the GPU is and how it fares: name, driver, clocks, power, temperature, throttling."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import torch

from cute_fa.errors import MissingToolError

# nvidia-smi's field → our name; the units are in ours. Reasons have two names: drivers before 535
# know the second one only.
_REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
_FIELDS = {
    "name": "name",
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    _REASONS_FIELDS[0]: "throttle_bits",
}
# NVML, nvmlClocksEventReasons; "idle" and "applications clocks" are no lack of anything.
_REASONS = {
    0x1: "idle",
    0x2: "applications clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


def require_gpu() -> None:
    """That torch sees a GPU.

    Raises:
        MissingToolError: it does not.
    """
    if not torch.cuda.is_available():
        raise MissingToolError(
            "there is no GPU to measure on",
            got=f"torch {torch.__version__} sees no CUDA device",
            expected="a CUDA device, its driver, and a torch built for CUDA",
            fix="cute-fa doctor says what is missing; cute-fa sim counts what a kernel does, "
            "without any time",
        )


def device_document() -> dict[str, Any]:
    """What the current CUDA device and the software are."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        cudnn = torch.backends.cudnn.version()
    except Exception as error:  # of its libraries, one that does not fit the others
        cudnn = f"unknown: {type(error).__name__}: {error}"
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": cudnn,
    }


def snapshot(ask: Callable[[], str] | None = None) -> dict[str, Any]:
    """Clocks, power, temperature and throttle reasons now; {"unknown": why} where nothing tells.

    Args:
        ask: gives nvidia-smi's answer to a query of ``_FIELDS``, as one CSV line.
    """
    try:
        line = (ask or _nvidia_smi)()
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": f"nvidia-smi: {error}"}
    values = [word.strip() for word in line.strip().split(",")]
    if len(values) != len(_FIELDS):
        return {"unknown": f"nvidia-smi answered {line.strip()!r}"}
    found: dict[str, Any] = {
        name: _number(value) for name, value in zip(_FIELDS.values(), values, strict=True)
    }
    bits = found.pop("throttle_bits")
    try:
        found["throttle_reasons"] = throttle_reasons(int(str(bits), 16))
    except ValueError:
        found["throttle_reasons"] = [f"unknown ({bits})"]
    return found


def throttle_reasons(bits: int) -> list[str]:
    """NVML's clock event reasons in words."""
    known = [text for bit, text in _REASONS.items() if bits & bit]
    rest = bits & ~sum(_REASONS)
    return [*known, *([f"unknown ({rest:#x})"] if rest else [])]


_SMI_SECONDS = 5.0
_smi_hung = threading.Event()  # it is not waited for a second time


def _nvidia_smi() -> str:
    if _smi_hung.is_set():
        raise subprocess.SubprocessError(f"did not answer within {_SMI_SECONDS:g} s before")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise FileNotFoundError("not on the PATH")
    index = torch.cuda.current_device()
    # By its UUID: torch counts the visible devices, nvidia-smi counts all.
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    which = f"--id={index if uuid is None else f'GPU-{uuid}'}"
    for reasons in _REASONS_FIELDS:
        fields = ",".join(_FIELDS).replace(_REASONS_FIELDS[0], reasons)
        command = [tool, which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_SMI_SECONDS
            )
        except subprocess.TimeoutExpired:
            _smi_hung.set()
            raise
        if result.returncode == 0:
            return result.stdout
    said = (result.stdout + result.stderr).strip()
    raise subprocess.SubprocessError(f"exit code {result.returncode}, {said!r}")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
