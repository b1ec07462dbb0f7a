"""Where a run computes: its device and its number of threads, set in this one place."""

import os

import torch

from esper.errors import DeviceError


def available_devices() -> tuple[str, ...]:
    """Names that `run.device` may take on this machine, best first."""
    devices: list[str] = []
    if torch.cuda.is_available():
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return (*devices, "cpu")


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` takes the best there is. Raises `DeviceError` (ESP-315) when it is not there."""
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        raise DeviceError(
            "ESP-315",
            f"run.device: {name!r} is not on this machine",
            hint=f"Available here: {', '.join(available)}, or auto",
        )
    return torch.device(wanted)


def choose_threads(threads: int | str) -> int:
    """`auto`: all cores but one, which the event loop and the forge use (a busy competitor slows two threads more than
    it slows one)."""
    if isinstance(threads, int):
        return threads
    return max(1, (os.cpu_count() or 1) - 1)


def use_threads(threads: int) -> None:
    """Set the threads inside one operation. OpenMP keeps the number for each calling thread, so every thread that
    trains calls this first."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
