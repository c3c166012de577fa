"""The most of this machine's arithmetic that a large fp32 product of torch gets out; FLOP/s, as a JSON line."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

SIZES, REPEATS = (1024, 2048, 3072, 4096), 5


def main() -> None:
    peak = max(_flops_per_s(size) for size in SIZES)
    sys.stdout.write(json.dumps({"flops_per_s": peak, "threads": torch.get_num_threads()}) + "\n")


def _flops_per_s(size: int) -> float:
    """The median of the repeats, the first one left out."""
    left, right, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
