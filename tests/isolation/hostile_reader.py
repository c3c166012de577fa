"""Readers that do what a parser might be brought to do by the file that it reads. They run within the walls."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tunesmith.errors import DataError, StorageError
from tunesmith.frozen import Frozen


class Question(Frozen):
    """What a hostile reader is asked."""

    path: Path = Path("/")


class Answer(Frozen):
    """What it answers."""

    text: str


Tell = Callable[[BaseModel, bytes], None]


def _say(line: bytes) -> None:
    """Write past the protocol to the pipe that the parent reads: the highest descriptor that is one."""
    for number in range(3, 64):
        try:
            if str(Path(f"/proc/self/fd/{number}").readlink()).startswith("pipe:"):
                os.write(number, line)
        except OSError:
            continue


def answers(request: bytes, tell: Tell) -> Answer:
    sys.stdout.write("a library prints\n")
    return Answer(text="well")


def tells(request: bytes, tell: Tell) -> Answer:
    for number in range(5):
        tell(Answer(text=str(number)), b"x" * number)
    return Answer(text="told")


def loops(request: bytes, tell: Tell) -> Answer:
    while True:
        pass


def sleeps(request: bytes, tell: Tell) -> Answer:
    time.sleep(4000)
    return Answer(text="late")


def tells_without_end(request: bytes, tell: Tell) -> Answer:
    while True:
        tell(Answer(text="x"), b"y" * 1000)


def takes_memory(request: bytes, tell: Tell) -> Answer:
    held = []
    while True:
        held.append(bytearray(16 << 20))


def takes_memory_at_once(request: bytes, tell: Tell) -> Answer:
    return Answer(text=str(len(bytearray(1 << 40))))


def takes_memory_in_a_library(request: bytes, tell: Tell) -> Answer:
    import numpy as np

    return Answer(text=str(np.ones(1 << 36).sum()))


def dies_of_memory_in_rust(request: bytes, tell: Tell) -> Answer:
    sys.stderr.write("memory allocation of 3221225472 bytes failed\n")
    sys.stderr.flush()
    os.abort()


def aborts(request: bytes, tell: Tell) -> Answer:
    os.abort()


def crashes(request: bytes, tell: Tell) -> Answer:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Answer(text="alive")


def is_killed(request: bytes, tell: Tell) -> Answer:
    os.kill(os.getpid(), signal.SIGKILL)
    return Answer(text="alive")


def exits(request: bytes, tell: Tell) -> Answer:
    os._exit(3)


def panics(request: bytes, tell: Tell) -> Answer:
    class PanicException(BaseException):
        """As Rust's panics come to Python."""

    raise PanicException("called `Option::unwrap()` on a `None` value")


def recurses(request: bytes, tell: Tell) -> Answer:
    return recurses(request, tell)


def refuses(request: bytes, tell: Tell) -> Answer:
    raise DataError("the file is bad", fields=["source"], hint="mend it", code="bad_file")


def accuses_the_platform(request: bytes, tell: Tell) -> Answer:
    raise StorageError("the disk is full", code="storage_full")


def raises_escapes(request: bytes, tell: Tell) -> Answer:
    raise DataError("\x1b]0;owned\x07\x1b[2J bad" + "x" * 100_000, fields=["f" * 10_000] * 50, hint="\x9b31m\u202e")


def answers_another_shape(request: bytes, tell: Tell) -> BaseModel:
    return Question()


def tells_another_shape(request: bytes, tell: Tell) -> Answer:
    tell(Question(), b"")
    return Answer(text="told")


def answers_too_much(request: bytes, tell: Tell) -> Answer:
    return Answer(text="x" * (64 << 20))


def says_garbage(request: bytes, tell: Tell) -> Answer:
    _say(b"\xff\xfe\0 what no line is\n")
    return Answer(text="garbage")


def says_a_line_without_an_end(request: bytes, tell: Tell) -> Answer:
    while True:
        _say(b"x" * (1 << 16))


def claims_bytes(size: str) -> None:
    _say(f'told {size} {{"text":"x"}}\n'.encode())


def claims_endless_bytes(request: bytes, tell: Tell) -> Answer:
    claims_bytes("99999999999999")
    return Answer(text="claimed")


def claims_negative_bytes(request: bytes, tell: Tell) -> Answer:
    claims_bytes("-1")
    return Answer(text="claimed")


def claims_no_number_of_bytes(request: bytes, tell: Tell) -> Answer:
    claims_bytes("many")
    return Answer(text="claimed")


def claims_more_bytes_than_come(request: bytes, tell: Tell) -> Answer:
    claims_bytes("1000000")
    os._exit(0)


def answers_deep_json(request: bytes, tell: Tell) -> Answer:
    _say(b'answer {"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
    return Answer(text="deep")


def raises_an_unknown_kind(request: bytes, tell: Tell) -> Answer:
    _say(b'error {"kind":"LeaseLostError","message":"give up","code":"lease_lost"}\n')
    return Answer(text="unknown")


def raises_with_a_bad_code(request: bytes, tell: Tell) -> Answer:
    _say(b'error {"kind":"DataError","message":"x","code":"../../etc"}\n')
    return Answer(text="code")


def fills_stderr(request: bytes, tell: Tell) -> Answer:
    for _ in range(2000):
        sys.stderr.write("e" * 16384)
    return Answer(text="well")


def leaves_processes(request: bytes, tell: Tell) -> Answer:
    for _ in range(5):
        subprocess.Popen(["/bin/sleep", "4000"], start_new_session=True)
    return Answer(text="well")


def leaves_processes_and_loops(request: bytes, tell: Tell) -> Answer:
    leaves_processes(request, tell)
    return loops(request, tell)


def leaves_links(request: bytes, tell: Tell) -> Answer:
    Path("model.safetensors").symlink_to("/etc/passwd")
    Path("deep").mkdir()
    Path("deep").chmod(0)
    return Answer(text="well")


def _refused(what: Callable[[], Any]) -> Answer:
    """`well` where the system refuses it."""
    try:
        what()
    except OSError:
        return Answer(text="well")
    return Answer(text="it was done")


def shows_its_variables(request: bytes, tell: Tell) -> Answer:
    return Answer(text=" ".join(f"{name}={value}" for name, value in os.environ.items()))


def reads_a_path(request: bytes, tell: Tell) -> Answer:
    return _refused(lambda: Question.model_validate_json(request).path.read_bytes())


def lists_a_path(request: bytes, tell: Tell) -> Answer:
    return _refused(lambda: [*Question.model_validate_json(request).path.iterdir()])


def writes_a_path(request: bytes, tell: Tell) -> Answer:
    return _refused(lambda: Question.model_validate_json(request).path.write_bytes(b"x"))


def reaches_the_network(request: bytes, tell: Tell) -> Answer:
    return _refused(lambda: socket.create_connection(("127.0.0.1", 22), timeout=2))


def writes_a_large_file(request: bytes, tell: Tell) -> Answer:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def write() -> None:
        with Path("large").open("wb") as file:
            for _ in range(64):
                file.write(b"x" * (1 << 20))
            file.flush()

    return _refused(write)
