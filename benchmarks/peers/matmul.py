"""The most arithmetic that a large product of torch gets out; FLOP/s, as a JSON line.

Of this machine's processor in fp32, or, with `cuda` behind it, of its first GPU in bf16. On a processor torch carries
two libraries, of which `torch.mm` is not always the faster one: the peak is the faster one's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

SIZES = {"cpu": (1024, 2048, 3072, 4096), "cuda": (4096, 8192, 16384)}
REPEATS = 5
PRODUCTS = {"cpu": 1, "cuda": 10}
"""Products between two looks at the clock: a GPU's are started one behind the other."""


def main(device: str = "cpu") -> None:
    peaks = {"torch.mm": max(_flops_per_s(size, device, torch.mm) for size in SIZES[device])}
    if device == "cpu" and torch._C._has_mkldnn:
        peaks["oneDNN"] = max(_flops_per_s(size, device, _by_onednn) for size in SIZES[device])
    peak = max(peaks.values())
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    told = {"flops_per_s": peak, "by": peaks, "threads": torch.get_num_threads(), "device": name}
    sys.stdout.write(json.dumps(told) + "\n")


def _by_onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return made


def _flops_per_s(size: int, device: str, product: Callable[..., torch.Tensor]) -> float:
    """The median of the repeats, the first one left out."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        for _ in range(PRODUCTS[device]):
            product(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 * PRODUCTS[device] / statistics.median(seconds[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
