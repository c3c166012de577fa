"""What a worker that hangs leaves for its driver. It lies in Ray itself: storage may be what the worker hangs on."""

from __future__ import annotations

from ray.experimental import internal_kv

_NAMESPACE = "tunesmith-hangs"


def tell(run: str, rank: int) -> None:
    """Called in a worker of the run: it made no progress."""
    internal_kv._internal_kv_put(f"{run}/{rank}", b"", namespace=_NAMESPACE)


def take(run: str) -> list[int]:
    """Called in the driver: ranks of the workers that told it, sorted; each is told once."""
    keys = internal_kv._internal_kv_list(f"{run}/", namespace=_NAMESPACE)
    for key in keys:
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
    return sorted(int(key.rpartition(b"/")[2]) for key in keys)
