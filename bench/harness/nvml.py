"""A GPU's clocks, temperature and power by the driver's own library: a call takes microseconds, nvidia-smi 50 ms."""

import ctypes
import functools

import torch

__all__ = ["cuda_driver", "driver", "read"]
SM, MEMORY = 1, 2  # nvmlClockType_t
GPU_SENSOR = 0  # nvmlTemperatureSensors_t
# bits of nvmlDeviceGetCurrentClocksThrottleReasons that tell of a clock held down; idle and the user's own are left out
REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The driver's library, ready; None where there is none."""
    try:
        found = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return found if found.nvmlInit_v2() == 0 else None


@functools.cache
def handle(device: torch.device) -> ctypes.c_void_p | None:
    """The library's handle of PyTorch's device, found by its UUID: indices differ under CUDA_VISIBLE_DEVICES."""
    lib = library()
    if lib is None:
        return None
    uuid, found = str(torch.cuda.get_device_properties(device).uuid), ctypes.c_void_p()
    for prefix in ("GPU-", "MIG-", ""):  # PyTorch leaves it out
        if lib.nvmlDeviceGetHandleByUUID(f"{prefix}{uuid}".encode(), ctypes.byref(found)) == 0:
            return found
    return None


def read(device: torch.device) -> dict:
    """MHz of the multiprocessors and the memory, degrees, watts, and what holds the clock down; what can be read."""
    at = handle(device)
    if at is None:
        return {}
    mhz = {name: _uint("nvmlDeviceGetClockInfo", at, kind) for name, kind in (("sm_mhz", SM), ("memory_mhz", MEMORY))}
    milliwatts = _uint("nvmlDeviceGetPowerUsage", at)
    found = mhz | {"temperature_c": _uint("nvmlDeviceGetTemperature", at, GPU_SENSOR)}
    found["power_w"] = None if milliwatts is None else milliwatts / 1000
    bits = _told("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong(), at)
    if bits is not None:
        found["held_by"] = [name for bit, name in REASONS.items() if bits & bit]
    return {name: value for name, value in found.items() if value is not None}


def driver() -> str | None:
    """The driver's version."""
    lib, text = library(), ctypes.create_string_buffer(96)
    return text.value.decode() if lib is not None and lib.nvmlSystemGetDriverVersion(text, 96) == 0 else None


def cuda_driver() -> str | None:
    """The newest CUDA that the driver serves."""
    lib, number = library(), ctypes.c_int()
    if lib is None or lib.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number)) != 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _uint(function: str, *args: object) -> int | None:
    return _told(function, ctypes.c_uint(), *args)


def _told(function: str, value: ctypes.c_uint | ctypes.c_ulonglong, *args: object) -> int | None:
    """What `function` writes into `value`; None where it fails, or this driver has no such function."""
    ask = getattr(library(), function, None)
    return value.value if ask is not None and ask(*args, ctypes.byref(value)) == 0 else None
