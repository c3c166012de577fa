"""Which calls of the kernel a user's program is refused, as a filter that the kernel itself runs (seccomp).

A training needs none of them: they change the machine, look into other processes, make namespaces and mounts, or have
been the way out of many containers. The filter is assembled here, for one machine's numbers at a time; calls of other
machines' numbers (32 bits, x32), and calls newer than the table, are answered as by a kernel that does not know them.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

NEWEST = 462
"""The newest call that was looked at for this table (mseal); whatever has a higher number does not exist."""
NEW_NAMESPACES = 0x7E020080
"""The flags that make a namespace."""
FAMILIES = (1, 2, 10)
"""Kinds of sockets that are allowed: Unix, IPv4 and IPv6. Netlink is allowed for the names of network devices alone."""


@dataclass(frozen=True)
class Machine:
    """A kind of processor: what the kernel calls it, and where its numbers stand in the table."""

    audit: int
    column: int


MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}

REFUSED: dict[str, tuple[int | None, int | None, int]] = {
    # Mounts and the root.
    "mount": (165, 40, errno.EPERM),
    "umount2": (166, 39, errno.EPERM),
    "pivot_root": (155, 41, errno.EPERM),
    "chroot": (161, 51, errno.EPERM),
    "fsopen": (430, 430, errno.EPERM),
    "fsconfig": (431, 431, errno.EPERM),
    "fsmount": (432, 432, errno.EPERM),
    "fspick": (433, 433, errno.EPERM),
    "open_tree": (428, 428, errno.EPERM),
    "move_mount": (429, 429, errno.EPERM),
    "mount_setattr": (442, 442, errno.EPERM),
    "statmount": (457, 457, errno.ENOSYS),
    "listmount": (458, 458, errno.ENOSYS),
    "open_by_handle_at": (304, 265, errno.EPERM),
    "fanotify_init": (300, 262, errno.EPERM),
    "quotactl": (179, 60, errno.EPERM),
    "quotactl_fd": (443, 443, errno.EPERM),
    "swapon": (167, 224, errno.EPERM),
    "swapoff": (168, 225, errno.EPERM),
    # Namespaces. The flags of clone3 lie in memory, where a filter cannot look: a C library then takes clone.
    "setns": (308, 268, errno.EPERM),
    "clone3": (435, 435, errno.ENOSYS),
    # The kernel and the machine.
    "init_module": (175, 105, errno.EPERM),
    "finit_module": (313, 273, errno.EPERM),
    "delete_module": (176, 106, errno.EPERM),
    "create_module": (174, None, errno.ENOSYS),
    "query_module": (178, None, errno.ENOSYS),
    "get_kernel_syms": (177, None, errno.ENOSYS),
    "kexec_load": (246, 104, errno.EPERM),
    "kexec_file_load": (320, 294, errno.EPERM),
    "reboot": (169, 142, errno.EPERM),
    "syslog": (103, 116, errno.EPERM),
    "acct": (163, 89, errno.EPERM),
    "bpf": (321, 280, errno.EPERM),
    "perf_event_open": (298, 241, errno.EPERM),
    "lookup_dcookie": (212, 18, errno.ENOSYS),
    "nfsservctl": (180, 42, errno.ENOSYS),
    "uselib": (134, None, errno.ENOSYS),
    "ustat": (136, None, errno.ENOSYS),
    "sysfs": (139, None, errno.ENOSYS),
    "_sysctl": (156, None, errno.ENOSYS),
    "vhangup": (153, 58, errno.EPERM),
    "iopl": (172, None, errno.EPERM),
    "ioperm": (173, None, errno.EPERM),
    "modify_ldt": (154, None, errno.ENOSYS),
    "settimeofday": (164, 170, errno.EPERM),
    "clock_settime": (227, 112, errno.EPERM),
    "clock_adjtime": (305, 266, errno.EPERM),
    "adjtimex": (159, 171, errno.EPERM),
    "sethostname": (170, 161, errno.EPERM),
    "setdomainname": (171, 162, errno.EPERM),
    # Keys of the node's users.
    "add_key": (248, 217, errno.EPERM),
    "request_key": (249, 218, errno.EPERM),
    "keyctl": (250, 219, errno.EPERM),
    # Large and rarely needed parts of the kernel.
    "io_uring_setup": (425, 425, errno.ENOSYS),
    "io_uring_enter": (426, 426, errno.ENOSYS),
    "io_uring_register": (427, 427, errno.ENOSYS),
    "userfaultfd": (323, 282, errno.EPERM),
    # Other processes. ptrace is allowed: it reaches the program's own processes alone, which debuggers need.
    "process_vm_readv": (310, 270, errno.EPERM),
    "process_vm_writev": (311, 271, errno.EPERM),
    "kcmp": (312, 272, errno.EPERM),
    # Memory that belongs to no process, and that a look at processes does not see.
    "memfd_secret": (447, 447, errno.ENOSYS),
    "shmget": (29, 194, errno.ENOSYS),
    "msgget": (68, 186, errno.ENOSYS),
    "semget": (64, 190, errno.ENOSYS),
}
"""Calls by name: their numbers on x86_64 and aarch64, and the error that they give."""

LOOKED_INTO = {
    "clone": (56, 220),
    "unshare": (272, 97),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ioctl": (16, 29),
    "personality": (135, 92),
}
"""Calls that are refused with some arguments: their numbers on x86_64 and aarch64."""
_NETLINK = 16
_TERMINAL_INPUT = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX, which type into a terminal."""
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""Linux, with 32 bits or an old version's name; the last one only asks."""

_LOAD, _IF_EQUAL, _IF_ABOVE, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_NUMBER, _MACHINE = 0, 4
"""Where a filter finds the call's number and the machine's kind; arguments of 8 bytes follow from 16 on."""

Instruction = tuple[int, int, int, int]


def assemble_filter(machine: str | None = None) -> bytes | None:
    """The filter for a machine as `os.uname` names it, by default this one; None where its numbers are not known."""
    known = MACHINES.get(machine or os.uname().machine)
    if known is None:
        return None
    return b"".join(struct.pack("<HBBI", *each) for each in _instructions(known))


def _instructions(machine: Machine) -> Iterator[Instruction]:
    """A filter: each instruction with how many to skip where its question is answered by yes, and by no."""
    yield _LOAD, 0, 0, _MACHINE
    yield _IF_EQUAL, 1, 0, machine.audit
    yield _refuse(errno.ENOSYS)
    yield _LOAD, 0, 0, _NUMBER
    # x32 as well: its numbers have a high bit.
    yield _IF_ABOVE, 0, 1, NEWEST
    yield _refuse(errno.ENOSYS)
    for *numbers, error in REFUSED.values():
        number = numbers[machine.column]
        if number is not None:
            yield _IF_EQUAL, 0, 1, number
            yield _refuse(error)
    for name, numbers_of in LOOKED_INTO.items():
        rule = list(_rule(name))
        yield _IF_EQUAL, 0, len(rule), numbers_of[machine.column]
        yield from rule
    yield _RETURN, 0, 0, _ALLOW


def _rule(name: str) -> Iterator[Instruction]:
    """What is asked once the call is that one; it always ends in an answer."""
    match name:
        case "clone":
            # Its lowest byte is a signal.
            yield from _refused_bits(NEW_NAMESPACES & ~0xFF)
        case "unshare":
            yield from _refused_bits(NEW_NAMESPACES)
        case "ioctl":
            yield from _refused_values(1, _TERMINAL_INPUT)
        case "personality":
            yield from _allowed_values(0, _PERSONALITIES, errno.EPERM)
        case "socketpair":
            yield from _allowed_values(0, FAMILIES, errno.EAFNOSUPPORT)
        case _:
            yield _LOAD, 0, 0, _argument(0)
            yield _IF_EQUAL, 0, 4, _NETLINK
            yield _LOAD, 0, 0, _argument(2)
            yield _IF_EQUAL, 0, 1, 0
            yield _RETURN, 0, 0, _ALLOW
            yield _refuse(errno.EAFNOSUPPORT)
            yield from _allowed_values(0, FAMILIES, errno.EAFNOSUPPORT)


def _refused_bits(bits: int) -> Iterator[Instruction]:
    yield _LOAD, 0, 0, _argument(0)
    yield _IF_ANY_BIT, 0, 1, bits
    yield _refuse(errno.EPERM)
    yield _RETURN, 0, 0, _ALLOW


def _refused_values(argument: int, values: tuple[int, ...]) -> Iterator[Instruction]:
    yield _LOAD, 0, 0, _argument(argument)
    for value in values:
        yield _IF_EQUAL, 0, 1, value
        yield _refuse(errno.EPERM)
    yield _RETURN, 0, 0, _ALLOW


def _allowed_values(argument: int, values: tuple[int, ...], error: int) -> Iterator[Instruction]:
    yield _LOAD, 0, 0, _argument(argument)
    for value in values:
        yield _IF_EQUAL, 0, 1, value
        yield _RETURN, 0, 0, _ALLOW
    yield _refuse(error)


def _refuse(error: int) -> Instruction:
    return _RETURN, 0, 0, _ERROR | error


def _argument(position: int) -> int:
    """Where the lower half of an argument lies; all that are asked for have 32 bits."""
    return 16 + 8 * position
