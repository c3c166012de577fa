"""How a worker tells its driver that it hangs. It lies in Ray itself, for storage may be what it hangs on."""

from __future__ import annotations

from ray.experimental import internal_kv

_NAMESPACE = "tunesmith-hangs"


def tell_hang(run: str, rank: int) -> None:
    """Called in a worker of the run: it made no progress."""
    internal_kv._internal_kv_put(f"{run}/{rank}", b"", namespace=_NAMESPACE)


def take_hangs(run: str) -> list[int]:
    """Called in the driver at a run's end: ranks of the workers that told it, sorted. Ray keeps nothing of it."""
    keys = internal_kv._internal_kv_list(f"{run}/", namespace=_NAMESPACE)
    for key in keys:
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
    return sorted(int(key.rpartition(b"/")[2]) for key in keys)
