"""The machine and the software, named beside every number."""

import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.cpu import cpu_info
from ..version import __version__

if TYPE_CHECKING:
    from torch import nn


def describe() -> dict[str, Any]:
    """A dict as in the JSON: CPU, features and kernels in use, threads, versions."""
    names = ("torch", "transformers", "zentorch", "onnxruntime", "llama-cpp-python", "numpy")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        **cpu_info(),
        "versions": {
            "moeprof": __version__,
            **{name: found for name in names if (found := _version(name))},
            "python": platform.python_version(),
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def in_one_line(machine: Mapping[str, Any]) -> str:
    """The CPU, its features and the threads."""
    features = ", ".join(machine["features"]) or "no SIMD"
    threads = machine["threads"]
    return f"{machine['cpu']} ({features}), {threads} thread{'s' if threads > 1 else ''}"


def cache_bytes() -> int:
    """The largest cache that one CPU sees; 32 MiB where Linux doesn't tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(size.read_text().strip().rstrip("K")) << 10 for size in sizes]
    return max(found, default=32 << 20)


def peak_memory() -> float:
    """The most bytes of this process that were in memory; nan where the system doesn't tell."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def devices_under(model: "nn.Module") -> list[dict[str, Any]]:
    """A row for each device but the CPU that holds weights of a model: "device" ("cuda:0"), its
    "name", and "memory_peak_mb", the most that torch has had there in this process (10^6 bytes),
    or None where torch doesn't tell."""
    import torch

    kinds = {str(weight.device): weight.device.type for weight in model.parameters()}
    rows = []
    for device in sorted(kinds.keys() - {"cpu", "meta"}):
        module: Any = torch.get_device_module(device)
        tell_name = getattr(module, "get_device_name", None)
        tell_peak = getattr(module, "max_memory_allocated", None)
        name = tell_name(device) if tell_name else kinds[device]
        peak = tell_peak(device) / 1e6 if tell_peak else None
        rows.append({"device": device, "name": name, "memory_peak_mb": peak})
    return rows


def check_memory(needed: float) -> None:
    """ValueError where `needed` bytes are more than what is available."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if kib and needed > kib[0] << 10:
        raise ValueError(
            f"this shape needs {needed / 1e9:.1f} GB of memory, {kib[0] / 1e6:.1f} GB are available"
        )


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """torch, and with it moeprof, on so many threads; None: as they are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
