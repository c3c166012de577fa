"""The filter of system calls: its numbers are the kernel's on both machines, and each call has its answer."""

import errno
import re
import struct
from pathlib import Path

import pytest

from trainers.isolation.system_calls import LOOKED_INTO, MACHINES, NEWEST, REFUSED, assemble_filter

ALLOWED = 0x7FFF0000
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def answer(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the kernel would answer: the error's number, or 0 where the call is allowed."""
    kind = MACHINES[machine].audit if audit is None else audit
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, kind, 0, *arguments, *[0] * (6 - len(arguments)))
    program = assemble_filter(machine)
    assert program is not None
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    assert len(code) <= 4096
    at = value = 0
    while True:
        operation, yes, no, word = code[at]
        at += 1
        if operation == 0x20:
            (value,) = struct.unpack_from("<I", data, word)
        elif operation == 0x06:
            return 0 if word == ALLOWED else word & 0xFFFF
        else:
            holds = {0x15: value == word, 0x25: value > word, 0x45: bool(value & word)}[operation]
            at += yes if holds else no


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip("the kernel's headers are not here")
    text = HEADERS[machine].read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    column = MACHINES[machine].column
    ours = {name: numbers[column] for name, numbers in (*REFUSED.items(), *LOOKED_INTO.items())}
    checked = {name: number for name, number in ours.items() if name in known}
    assert len(checked) > 50
    assert {name: number for name, number in checked.items() if number != known[name]} == {}
    assert [name for name, number in ours.items() if number is None and name in known] == []


@pytest.mark.parametrize("machine", HEADERS)
def test_refused_calls_are_refused_and_all_others_are_not(machine: str) -> None:
    column = MACHINES[machine].column
    refused = {numbers[column]: numbers[2] for numbers in REFUSED.values() if numbers[column] is not None}
    looked_into = {numbers[column] for numbers in LOOKED_INTO.values()}
    for number in range(NEWEST + 1):
        if number not in looked_into:
            assert answer(machine, number) == refused.get(number, 0), number
    for number in (NEWEST + 1, 500, 0x40000000, 0x40000027, 0xFFFFFFFF):
        assert answer(machine, number) == errno.ENOSYS
    for audit in (0x40000003, 0x40000028, 0):
        assert answer(machine, 1, audit=audit) == errno.ENOSYS


CASES = [
    ("clone", (0x01200011,), 0),
    ("clone", (0x003D0F00,), 0),
    ("clone", (0x10000011,), errno.EPERM),
    ("clone", (0x7E020000,), errno.EPERM),
    ("unshare", (0x400,), 0),
    ("unshare", (0x80,), errno.EPERM),
    ("unshare", (0x20000,), errno.EPERM),
    ("socket", (1, 1, 0), 0),
    ("socket", (2, 1, 6), 0),
    ("socket", (10, 2, 0), 0),
    ("socket", (16, 3, 0), 0),
    ("socket", (16, 3, 9), errno.EAFNOSUPPORT),
    ("socket", (17, 3, 0), errno.EAFNOSUPPORT),
    ("socket", (38, 5, 0), errno.EAFNOSUPPORT),
    ("socket", (40, 1, 0), errno.EAFNOSUPPORT),
    ("socketpair", (1, 1, 0), 0),
    ("socketpair", (30, 1, 0), errno.EAFNOSUPPORT),
    ("ioctl", (0, 0x5401), 0),
    ("ioctl", (0, 0x5412), errno.EPERM),
    ("ioctl", (0, 0x100005412), errno.EPERM),
    ("ioctl", (0, 0x541C), errno.EPERM),
    ("personality", (0,), 0),
    ("personality", (0xFFFFFFFF,), 0),
    ("personality", (0x0400000,), errno.EPERM),
]


@pytest.mark.parametrize("machine", HEADERS)
@pytest.mark.parametrize(("name", "arguments", "error"), CASES)
def test_some_calls_are_refused_with_some_arguments(
    machine: str, name: str, arguments: tuple[int, ...], error: int
) -> None:
    assert answer(machine, LOOKED_INTO[name][MACHINES[machine].column], *arguments) == error


def test_a_machine_whose_numbers_are_not_known_has_no_filter() -> None:
    assert assemble_filter("riscv64") is None
