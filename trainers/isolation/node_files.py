"""What a program sees of its node's own files: what any Python program needs, and nothing that tells secrets.

As options of bubblewrap. What lies in `/proc` and `/sys` is read only, and what tells of the kernel is covered.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
_SETTINGS = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/alternatives",
    "/etc/localtime",
    "/etc/protocols",
    "/etc/services",
)
_CERTIFICATES = (
    # Never all of /etc/ssl or /etc/pki, which hold private keys as well.
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/openssl.cnf",
    "/etc/ca-certificates/extracted",
    "/etc/pki/ca-trust/extracted",
    "/etc/pki/tls/certs",
    "/etc/pki/tls/cert.pem",
    "/etc/pki/tls/openssl.cnf",
)
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""Variables of the node that name certificates, for programs that see the node's system."""
_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/host.conf")
_COVERED = (
    *("acpi", "asound", "bus", "fs", "irq", "scsi", "tty"),
    *("cmdline", "config.gz", "interrupts", "iomem", "ioports", "kallsyms", "kcore", "key-users", "keys", "kmsg"),
    *("kpagecgroup", "kpagecount", "kpageflags", "latency_stats", "locks", "modules", "mtrr", "pagetypeinfo"),
    *("sched_debug", "slabinfo", "softirqs", "sysrq-trigger", "timer_list", "timer_stats", "vmallocinfo"),
)
"""Names in `/proc` that tell of the kernel or of other programs, or that steer the machine."""
_COVERED_SYS = ("debug", "firmware", "fs", "hypervisor", "kernel", "power")

DEVICES = {
    "GPU": ("nvidia*", "kfd", "dri"),
    "NPU": ("davinci*", "devmm_svm", "hisi_hdc"),
}
"""Patterns of device files by Ray's name of the accelerator."""


@dataclass(frozen=True)
class Content:
    """A word of a command that becomes the number of an open file with this content."""

    data: bytes


Word = str | Content


def system_options(*, has_network: bool) -> Iterator[Word]:
    """The system's programs and libraries, the public part of `/etc`, and a list of users with nobody in it."""
    for path in (*SYSTEM, *_SETTINGS, *_CERTIFICATES, *(_NETWORK if has_network else ())):
        if Path(path).exists():
            yield from bind("--ro-bind", path)
    for path in sorted(certificate_paths()):
        yield from bind("--ro-bind-try", path)


def users_options(user: int, group: int) -> Iterator[Word]:
    """`/etc/passwd` and `/etc/group`, in which the program's own user is called job."""
    users = f"root:x:0:0:root:/nonexistent:/usr/sbin/nologin\njob:x:{user}:{group}:job:/tmp:/bin/sh\n"
    groups = f"root:x:0:\njob:x:{group}:\n"
    for path, text in (("/etc/passwd", users), ("/etc/group", groups)):
        yield from ("--perms", "0444", "--ro-bind-data", Content(text.encode()), path)


def proc_options(*, has_accelerators: bool) -> Iterator[Word]:
    """`/proc` of the program's own processes."""
    yield from ("--proc", "/proc")
    # As root's subtree of the node it would be writable for root, capability or not.
    yield from ("--ro-bind", "/proc/sys", "/proc/sys")
    # The libraries of an accelerator read what their driver tells.
    yield from _covers("/proc", [*_COVERED, *([] if has_accelerators else ["driver"])])
    # Nor are a process's own files written to, of which one says whom the kernel kills when memory runs out.
    yield from ("--remount-ro", "/proc")


def device_options(found: Iterable[Path]) -> Iterator[Word]:
    """`/dev` with these devices besides; with one of them, `/sys` as far as it tells of devices."""
    devices = list(found)
    if devices and Path("/sys").is_dir():
        yield from ("--ro-bind", "/sys", "/sys")
        yield from _covers("/sys", _COVERED_SYS)
    for device in devices:
        yield from ("--dev-bind-try", str(device), str(device))
    yield from ("--remount-ro", "/dev")


def devices(resources: Mapping[str, float]) -> list[Path]:
    """The node's device files of the accelerators that are among Ray's resources."""
    patterns = [pattern for kind in DEVICES if resources.get(kind) for pattern in DEVICES[kind]]
    return sorted(found for pattern in patterns for found in Path("/dev").glob(pattern))


def certificate_paths() -> set[str]:
    """What the node's variables name besides, where it is not in the folders that every room shows."""
    named = {path for name in CERTIFICATES for path in os.environ.get(name, "").split(os.pathsep) if path}
    return {path for path in named if Path(path).is_absolute() and not is_shown(Path(path))}


def is_shown(path: Path) -> bool:
    """Whether every room shows this path of the node, to be read by all."""
    return any(path.is_relative_to(above) for above in (*SYSTEM, *_SETTINGS, *_CERTIFICATES))


def bind(option: str, path: str | Path) -> Iterator[Word]:
    """Show a path at its own place. The folders above it are open to all, whatever they are on the node."""
    for above in reversed(Path(path).parents[:-1]):
        yield from ("--perms", "0755", "--dir", str(above))
    yield from (option, str(path), str(path))


def _covers(above: str, names: Iterable[str]) -> Iterator[Word]:
    for path in (Path(above, name) for name in names):
        if path.is_dir():
            yield from ("--perms", "0555", "--tmpfs", str(path), "--remount-ro", str(path))
        elif path.exists():
            yield from ("--ro-bind", "/dev/null", str(path))
