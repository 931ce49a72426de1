"""The machine and its software: which device, what is installed, and how much memory tensors hold.

A leaf: it imports nothing of the project but its errors, so every floor may import it.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import resource
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vidaccel.errors import UsageError, first_line

# Where a control group of either version says what it may take of memory, and has taken.
CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)

__all__ = [
    "cpu_cores",
    "device_of",
    "environment",
    "free_memory",
    "memory_ran_out",
    "peak_memory_gib",
    "peak_reserved_gib",
    "reset_peak_memory",
    "usable_bytes",
]


def device_of(name: str | None) -> torch.device:
    """The device called ``name``; for None the first GPU, or this process's own under ``torchrun``; else the CPU.

    Raises:
        UsageError: this machine has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # not every device has numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    return device


def cpu_cores() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Everything about this machine and its software that moves a figure."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "cpu": _cpu(),
        "cpu_cores": cpu_cores(),
        "cpu_threads": torch.get_num_threads(),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("vidaccel", "torch", "triton", "diffusers", "transformers")},
    }


def _commit() -> str | None:
    """Of the checkout that this file belongs to, if it does; an installed package may lie in somebody else's."""
    root = Path(__file__).parents[1]
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return _output_of("git", "-C", str(root), *describe) if (root / ".git").exists() else None


def _cpu() -> str:
    """The processor's name as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    """First line that ``command`` prints, or None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def free_memory() -> None:
    """Give back what nobody refers to any more, so that one measurement does not weigh on the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_ran_out(error: BaseException) -> bool:
    """Whether memory of a GPU did, or of the host, for which PyTorch has no error of its own; or none could do."""
    known = "DefaultCPUAllocator", "Storage size calculation overflowed"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in known)


def _free_host_bytes() -> int:
    """What this process may still take of the host's memory, by the limits of its container and of its own, too.

    Where it takes more than a container has, Linux ends it, and nothing is raised. Files in the page cache give way.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if found := re.search(r"^MemAvailable: *(\d+) kB", _text_of("/proc/meminfo"), re.MULTILINE):
        free = int(found[1]) * 1024
    for folder, most, taken in CONTAINERS:
        allowed, used = _text_of(f"{folder}/{most}"), _text_of(f"{folder}/{taken}")
        if allowed.strip().isdigit() and used:
            files = re.findall(r"inactive_file (\d+)$", _text_of(f"{folder}/memory.stat"), re.MULTILINE)
            free = min(free, int(allowed) - int(used) + int(files[-1] if files else 0))  # the last is of all below, too
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return free
    pages, *_ = _text_of("/proc/self/statm").split()
    return min(free, limit - int(pages) * resource.getpagesize())


def usable_bytes(device: torch.device) -> int:
    """What this process may allocate on ``device``, counting what it has allocated, if that is a GPU of CUDA's."""
    if device.type != "cuda":
        return _free_host_bytes()
    driver_free, total = torch.cuda.mem_get_info(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(driver_free + torch.cuda.memory_reserved(device), limit)


def _text_of(path: str) -> str:
    """What is in a file of the kernel's; nothing, if there is no such."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def reset_peak_memory(device: torch.device) -> None:
    """Start :func:`peak_memory_gib` and :func:`peak_reserved_gib` afresh."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory that tensors held since the reset, or None where PyTorch does not count it."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def peak_reserved_gib(device: torch.device) -> float | None:
    """Most memory that PyTorch held since the reset, used or not: the pool of a CUDA graph counts only here."""
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None
