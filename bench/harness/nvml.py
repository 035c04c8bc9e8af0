"""Reads a GPU's clocks, temperature and power from the driver's library. A call takes microseconds, while nvidia-smi
takes 50 ms."""

import functools
from collections.abc import Callable
from types import ModuleType

import torch

from jasper_fast.bench.harness.console import say

# The reasons for a lowered clock that are recorded. Not recorded: the GPU is idle, or the user has lowered its clock.
REASONS = {
    "SwPowerCap": "software power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "software thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "hardware power brake",
}


@functools.cache
def library() -> ModuleType | None:
    """Returns pynvml, initialised, or None if there is no driver or pynvml is not installed. In the second case it also
    prints how to install pynvml."""
    try:
        import pynvml
    except ImportError:
        say(
            "the result will lack the GPU's clocks, temperature and driver version; to have them: "
            "pip install nvidia-ml-py"
        )
        return None
    return None if _call(pynvml.nvmlInit, default=pynvml) is pynvml else pynvml


@functools.cache
def handle(device: torch.device) -> object | None:
    """Returns the library's handle of PyTorch's device, or None. The handle is found by UUID, because
    CUDA_VISIBLE_DEVICES changes PyTorch's indices of devices but not the library's."""
    nvml = library()
    if nvml is None:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    # The library's UUIDs have a prefix that PyTorch's UUIDs lack.
    found = (_call(nvml.nvmlDeviceGetHandleByUUID, prefix + uuid) for prefix in ("GPU-", "MIG-", ""))
    return next((at for at in found if at is not None), None)


def read(device: torch.device) -> dict:
    """Returns the clocks in MHz, the temperature in degrees Celsius, the power in watts, and the reasons for a lowered
    clock. What the driver does not report is left out."""
    nvml, at = library(), handle(device)
    if at is None:
        return {}
    milliwatts = _call(nvml.nvmlDeviceGetPowerUsage, at)
    bits = _call(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, at)
    found = {
        "sm_mhz": _call(nvml.nvmlDeviceGetClockInfo, at, nvml.NVML_CLOCK_SM),
        "memory_mhz": _call(nvml.nvmlDeviceGetClockInfo, at, nvml.NVML_CLOCK_MEM),
        "temperature_c": _call(nvml.nvmlDeviceGetTemperature, at, nvml.NVML_TEMPERATURE_GPU),
        "power_w": None if milliwatts is None else milliwatts / 1000,
        "held_by": None if bits is None else [
            reason for name, reason in REASONS.items() if bits & getattr(nvml, f"nvmlClocksThrottleReason{name}")
        ],
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def driver() -> str | None:
    """Returns the driver's version, or None."""
    return _call(library().nvmlSystemGetDriverVersion) if library() else None


def cuda_driver() -> str | None:
    """Returns the newest CUDA version that the driver supports, or None."""
    number = _call(library().nvmlSystemGetCudaDriverVersion_v2) if library() else None
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


def _call(function: Callable, *args: object, default: object = None) -> object:
    """Returns the library's answer, or `default` if the call fails or the driver has no such function."""
    from pynvml import NVMLError

    try:
        return function(*args)
    except NVMLError:
        return default
