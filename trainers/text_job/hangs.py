"""What a driver and its workers tell each other beside the reports. It lies in Ray itself, for storage may be away."""

from __future__ import annotations

from ray.experimental import internal_kv

_HANGS, _STORED = "tunesmith-hangs", "tunesmith-stored"


def tell_hang(run: str, rank: int) -> None:
    """Called in a worker of the run: it made no progress."""
    internal_kv._internal_kv_put(f"{run}/{rank}", b"", namespace=_HANGS)


def take_hangs(run: str) -> list[int]:
    """Called in the driver: ranks of the workers that told it, sorted; each is told once."""
    keys = internal_kv._internal_kv_list(f"{run}/", namespace=_HANGS)
    for key in keys:
        internal_kv._internal_kv_del(key, namespace=_HANGS)
    return sorted(int(key.rpartition(b"/")[2]) for key in keys)


def tell_stored(attempt: str, step: int) -> None:
    """Called in the attempt's driver: storage has the metrics of this step and of all before."""
    internal_kv._internal_kv_put(attempt, str(step).encode(), namespace=_STORED)


def stored_step(attempt: str) -> int:
    """Called in a worker: the newest step that the driver told; -1 before the first."""
    told = internal_kv._internal_kv_get(attempt, namespace=_STORED)
    return -1 if told is None else int(told)
