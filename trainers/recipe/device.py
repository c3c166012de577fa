"""The one place that picks the torch device and the collective backend of a worker."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Where a worker computes."""

    torch_device: torch.device
    backend: str
    """Collective backend: nccl, hccl or gloo."""
    has_bf16: bool


def pick_device(local_rank: int = 0) -> Device:
    """The accelerator of this worker, or the CPU where torch sees none."""
    if torch.cuda.is_available():
        place = local_rank % torch.cuda.device_count()
        return Device(torch.device("cuda", place), "nccl", torch.cuda.is_bf16_supported())
    npu = getattr(torch, "npu", None)  # torch_npu adds it
    if npu is not None and npu.is_available():
        return Device(torch.device("npu", local_rank % npu.device_count()), "hccl", True)
    return Device(torch.device("cpu"), "gloo", False)


def collective_backend(resources: Mapping[str, float]) -> str:
    """The backend of workers that get these Ray resources; it is known before any worker has started."""
    return next((backend for name, backend in (("GPU", "nccl"), ("NPU", "hccl")) if resources.get(name)), "gloo")


def keep_freed_memory(device: Device) -> None:
    """On a CPU, keep freed memory for what comes next: every step needs as much as the one before.

    Otherwise the C library gives it back to the kernel, and each page that is taken again costs a page fault.
    """
    if device.torch_device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
