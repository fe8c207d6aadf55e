"""The SM clock and the energy a board takes, read through the driver's NVML library: no package is needed for it."""

from __future__ import annotations

import ctypes

import torch

LIBRARY = "libnvidia-ml.so.1"
SM = 1  # NVML_CLOCK_SM
# Of the highest clock: below this a GPU idles or is throttled by more than the power limit of dense kernels explains.
DECLARED_SHARE = 0.5


class Clock:
    """One device's SM clock in MHz. declared: below which a turn does not count."""

    def __init__(self, device: str, declared: float | None = None):
        """declared: default DECLARED_SHARE of the highest clock. OSError where NVML is missing or refuses."""
        self._nvml = ctypes.CDLL(LIBRARY)
        self._handle = ctypes.c_void_p()
        uuid = "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid.encode()), ctypes.byref(self._handle))
        self.highest = self._mhz("nvmlDeviceGetMaxClockInfo")
        self.declared = DECLARED_SHARE * self.highest if declared is None else declared

    def read(self) -> int:
        """The clock now."""
        return self._mhz("nvmlDeviceGetClockInfo")

    def joules(self) -> float | None:
        """What the board has taken since the driver was loaded, to some tenth of a second; None where it does not count."""
        value = ctypes.c_ulonglong()
        try:
            self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(value))
        except (OSError, AttributeError):
            return None
        return value.value / 1e3

    def _mhz(self, function: str) -> int:
        value = ctypes.c_uint()
        self._call(function, self._handle, ctypes.c_int(SM), ctypes.byref(value))
        return value.value

    def _call(self, function: str, *arguments) -> None:
        status = getattr(self._nvml, function)(*arguments)
        if status:
            raise OSError(f"NVML's {function} gave status {status}")


def of(device: str, declared: float | None) -> tuple[Clock | None, str]:
    """(clock, "") or (None, why it cannot be read)."""
    if not device.startswith("cuda"):
        return None, "a CPU's clock is not read"
    try:
        return Clock(device, declared), ""
    except (OSError, AttributeError) as error:
        return None, f"the SM clock is not read: {error}"
