"""What figures depend on: the processor and its level, memory, accelerator, versions."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# each limits one library to less than the processor has
LIMITS = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
)  # fmt: skip
PACKAGES = ("minipeft", "torch", "transformers", "peft", "bitsandbytes", "numpy", "numba")


def allocator_environment() -> dict[str, str]:
    """The variables of a process whose memory is measured: {"MALLOC_MMAP_THRESHOLD_": "65536"}.

    The GNU C library keeps blocks of up to 32 MiB in a heap that shrinks from its end alone, so a
    freed activation stays with the process and its peak says little of what a step needs.  With
    this setting each block from 64 KiB (65,536 bytes) on goes back when it is freed.  The library
    reads it when a process starts, so it belongs into the environment of a new process:
    {**os.environ, **allocator_environment()}.  Empty where another C library is in use.
    """
    return {"MALLOC_MMAP_THRESHOLD_": "65536"} if platform.libc_ver()[0] == "glibc" else {}


def hardware() -> dict[str, Any]:
    """Processor and its level, cores, memory, accelerator.

    `cpu_capability` is what ATen uses; `cpu_amx` whether there are AMX tiles, which oneDNN uses for
    bfloat16; `cpu_limits` the variables that keep libraries from using what there is.
    """
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    found: dict[str, Any] = {"processor": name, "cores": os.cpu_count()}
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found["cpu_amx"] = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    found["cpu_limits"] = {name: os.environ[name] for name in LIMITS if os.environ.get(name)}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found["memory_gib"] = round(size / 2**30, 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str | None]:
    """Versions of everything whose version can change a figure."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
