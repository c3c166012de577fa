"""The most arithmetic that a large product of torch gets out; FLOP/s, as a JSON line.

Of this machine's processor in fp32, or, with `cuda` behind it, of its first GPU in bf16.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

SIZES = {"cpu": (1024, 2048, 3072, 4096), "cuda": (4096, 8192, 16384)}
REPEATS = 5
PRODUCTS = {"cpu": 1, "cuda": 10}
"""Products between two looks at the clock: a GPU's are started one behind the other."""


def main(device: str = "cpu") -> None:
    peak = max(_flops_per_s(size, device) for size in SIZES[device])
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    sys.stdout.write(json.dumps({"flops_per_s": peak, "threads": torch.get_num_threads(), "device": name}) + "\n")


def _flops_per_s(size: int, device: str) -> float:
    """The median of the repeats, the first one left out."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        for _ in range(PRODUCTS[device]):
            torch.mm(left, right, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 * PRODUCTS[device] / statistics.median(seconds[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
