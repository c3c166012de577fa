"""What a user brought is read by a child process within the walls, with limits of memory and time.

Parsers and templates do what the bytes before them say, so they never work in a process that holds keys or tokens.
The child sees the platform's packages, the folders that it is to read, and a folder of its own; no variable of the
platform, and no network. What it says is checked against types: its shape can be relied on, what it claims cannot.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import re
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from pydantic import BaseModel, Field, ValidationError

from trainers.isolation import sandbox
from trainers.isolation.bubblewrap import IsolationError
from trainers.isolation.program import Program
from trainers.isolation.reader_process import MEMORY_BYTES, UNEXPECTED
from trainers.isolation.sandbox import Room
from tunesmith import caches
from tunesmith.errors import DataError, ModelError, OutOfMemoryError, SpecError, TunesmithError
from tunesmith.frozen import Frozen
from tunesmith.settings import Settings
from tunesmith.visible_text import visible

LOOK_S = 0.25
"""Between two calls of what listens."""
END_S = 2.0
"""What a reader has to end by itself once it has answered."""
MAX_LINE_BYTES = 4 << 20
MAX_PAYLOAD_BYTES = 512 << 20
MAX_LINES = 10_000_000
TAIL_BYTES = 16 << 10
"""What is kept of a reader's stderr, its end."""
DEATHS = ("unreadable", "takes_too_long", "too_much_memory")
"""Codes of a `fault` that the reader itself did not name."""
_FAULTS: dict[str, type[TunesmithError]] = {
    kind.__name__: kind for kind in (SpecError, DataError, ModelError, OutOfMemoryError)
}
"""Errors that a reader may raise. All of them are faults of what it reads: it cannot say that the platform has one."""
_ENDED_BY_MEMORY = re.compile(
    r"memory allocation of \d+ bytes failed|bad_alloc|MemoryError|cannot allocate memory|out of memory", re.IGNORECASE
)
_PACKAGES = ("trainers", "tunesmith", "cluster_configs")

logger = logging.getLogger(__name__)

A = TypeVar("A", bound=BaseModel)
T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """What a reader may take."""

    memory_bytes: int
    """Of each of its processes."""
    time_s: float
    silence_s: float = 600.0
    """How long it may work without saying anything."""
    file_bytes: int = 1 << 30
    """Of each file that it writes."""
    cpus: int = 1


@dataclass(frozen=True)
class Reading(Generic[A]):
    """What is read, by what, and what that may take."""

    name: str
    """As users know it, at the beginning of a sentence: `the check of the model`."""
    place: str
    """`MODULE:FUNCTION`, as `reader_process` says."""
    request: BaseModel
    answer: type[A]
    readable: Sequence[Path]
    limits: Limits
    fault: type[TunesmithError]
    """The error where the child dies or does not end: of a model, or of data."""


class Nothing(Frozen):
    """What readers tell that tell nothing."""


class _Refusal(Frozen):
    """An error as a reader says it."""

    kind: str = Field(max_length=64)
    message: str = ""
    code: str | None = Field(default=None, pattern="^[a-z0-9_]{1,64}$")
    fields: list[str] = Field(default=[])
    hint: str | None = None


def read(
    reading: Reading[A],
    *,
    settings: Settings,
    listen: Callable[[], None] = lambda: None,
    take: Callable[[Path], None] = lambda folder: None,
) -> A:
    """What the reader answers. `listen` is called all the while and may raise what ends it.

    `take` is called with the folder that it has written to, once nothing of it lives; what lies there is not checked.
    Raises what the reader refuses; `fault` where it dies or takes too long; OutOfMemoryError; IsolationError.
    """
    said = stream(reading, Nothing, settings=settings, listen=listen, take=take)
    while True:
        try:
            next(said)
        except StopIteration as end:
            answer: A = end.value
            return answer


def stream(
    reading: Reading[A],
    told: type[T],
    *,
    settings: Settings,
    listen: Callable[[], None] = lambda: None,
    take: Callable[[Path], None] = lambda folder: None,
) -> Generator[tuple[T, bytes], None, A]:
    """As `read`, and yields what the reader tells on its way, each with the bytes that belong to it.

    Close it where it is not read to its end: the reader ends with it.
    """
    with _folders(settings) as (given, own, temporary):
        (given / "request.json").write_text(reading.request.model_dump_json(), encoding="utf-8")
        with _running(reading, given, own, temporary, settings) as child:
            answer = yield from _listened(child, reading, told, listen)
            child.program.wait(END_S)
        take(own)
        return answer


class _Child:
    """A reader that runs. What it says is taken by a thread, a few lines at a time."""

    def __init__(self, program: Program, errors: int) -> None:
        self.program = program
        self._lines: queue.Queue[tuple[bytes, bytes]] = queue.Queue(maxsize=4)
        self._tail: deque[bytes] = deque()
        self._is_over = threading.Event()
        self._errors = threading.Thread(target=self._drain, args=[errors], name="reader-stderr", daemon=True)
        self._errors.start()
        threading.Thread(target=self._take, args=[program.output], name="reader-stdout", daemon=True).start()

    def next(self) -> tuple[bytes, bytes] | None:
        """The next line with its bytes, an empty one at the end; None where none has come for LOOK_S."""
        try:
            return self._lines.get(timeout=LOOK_S)
        except queue.Empty:
            return None

    def stop_taking(self) -> None:
        self._is_over.set()

    def tail(self) -> list[str]:
        """The last lines of stderr, after its end."""
        self._errors.join(5)
        text = b"".join(self._tail)[-TAIL_BYTES:].decode(errors="replace")
        return [shown for line in text.strip().splitlines() if (shown := visible(line, limit=500))]

    def _take(self, output: IO[bytes]) -> None:
        try:
            for _ in range(MAX_LINES):
                line = output.readline(MAX_LINE_BYTES)
                size = _payload_bytes(line)
                if not self._put(line, output.read(size) if size else b"") or not line.endswith(b"\n"):
                    return
        except (OSError, ValueError):
            self._put(b"", b"")

    def _put(self, line: bytes, payload: bytes) -> bool:
        while not self._is_over.is_set():
            try:
                self._lines.put((line, payload), timeout=LOOK_S)
                return True
            except queue.Full:
                continue
        return False

    def _drain(self, errors: int) -> None:
        with os.fdopen(errors, "rb", buffering=0) as pipe:
            while piece := pipe.read(4096):
                self._tail.append(piece)
                while sum(map(len, self._tail)) > TAIL_BYTES + 4096:
                    self._tail.popleft()


@contextmanager
def _folders(settings: Settings) -> Iterator[tuple[Path, Path, Path]]:
    """Folders of a reader: what it is given, what it may write to, and its `/tmp`."""
    scratch = settings.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="read-", dir=scratch))
    with caches.held(place):
        try:
            given, own, temporary = (place / name for name in ("given", "own", "tmp"))
            for folder in (given, own, temporary):
                folder.mkdir()
            yield given, own, temporary
        finally:
            caches.delete(place)


@contextmanager
def _running(reading: Reading[Any], given: Path, own: Path, temporary: Path, settings: Settings) -> Iterator[_Child]:
    limits, packages = reading.limits, _packages(reading.place)
    room = Room(
        readable=[*packages, given, *reading.readable],
        writable=[own],
        temporary=temporary,
        network="none",
        resources={"CPU": limits.cpus},
        largest_file_bytes=limits.file_bytes,
        # Of all its processes together, and of memory that belongs to none of them.
        memory_bytes=limits.memory_bytes * (limits.cpus + 1),
    )
    variables = {
        MEMORY_BYTES: str(limits.memory_bytes),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(str(package.parent) for package in packages)),
        "HF_HUB_OFFLINE": "1",
        # Others take address space ahead, which counts against the limit of memory.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    command = [_python(), "-P", "-m", "trainers.isolation.reader_process", str(given / "request.json"), reading.place]
    launch = sandbox.launch(command, cwd=own, room=room, variables=variables, settings=settings)
    errors, other_end = os.pipe()
    try:
        program = Program(launch, errors=other_end)
    except BaseException:
        os.close(errors)
        raise
    finally:
        os.close(other_end)
    with program:
        child = _Child(program, errors)
        try:
            yield child
        finally:
            child.stop_taking()
            program.end()
            if tail := child.tail():
                logger.info("%s said:\n%s", reading.name, "\n".join(tail[-20:]))


def _listened(
    child: _Child, reading: Reading[A], told: type[T], listen: Callable[[], None]
) -> Generator[tuple[T, bytes], None, A]:
    limits, began = reading.limits, time.monotonic()
    heard = began
    while True:
        listen()
        said = child.next()
        now = time.monotonic()
        if now - began > limits.time_s or (said is None and now - heard > limits.silence_s):
            raise _endless(reading, now - began > limits.time_s)
        if said is None:
            continue
        heard = now
        line, payload = said
        kind, _, text = line.partition(b" ")
        try:
            if kind == b"told":
                yield told.model_validate_json(text.partition(b" ")[2]), payload
                # The time that others take with what it said is not its own.
                began += time.monotonic() - now
                heard = time.monotonic()
            elif kind == b"answer":
                return reading.answer.model_validate_json(text)
            elif kind == b"error":
                raise _refusal(_Refusal.model_validate_json(text), reading)
            else:
                raise _death(child, reading)
        except ValidationError as error:
            logger.warning("%s said what it may not: %s", reading.name, str(error)[:2000])
            raise reading.fault(f"{reading.name} has answered what no answer is", code="unreadable") from None


def _refusal(said: _Refusal, reading: Reading[Any]) -> TunesmithError:
    fields = [visible(field, limit=200) for field in said.fields[:20]]
    message = visible(said.message, lines=True, limit=4000)
    hint = visible(said.hint, lines=True, limit=1000) if said.hint else None
    if said.kind == MemoryError.__name__:
        return _too_large(reading, message)
    if said.kind in _FAULTS:
        return _FAULTS[said.kind](message, fields=fields, hint=hint, code=said.code)
    if said.kind != UNEXPECTED:
        message = f"{said.kind}: {message}"
    return reading.fault(
        f"{reading.name} failed: {message}",
        hint="the job's log has more; if the files are in order, this is a fault of the platform",
        code="unreadable",
    )


def _death(child: _Child, reading: Reading[Any]) -> TunesmithError:
    """Why the reader ended without an answer."""
    child.stop_taking()
    code = child.program.wait(LOOK_S * 20)
    child.program.end()
    tail = child.tail()
    last = tail[-1] if tail else "none"
    if last.startswith(("bwrap: ", "setpriv: ", "tunesmith: ")):
        return IsolationError(f"{reading.name} could not begin: {last}")
    if code == 128 + 9:
        return OutOfMemoryError(
            f"{reading.name} ended with signal 9: the memory of the machine may have run out",
            hint="try again where more memory is free",
        )
    if any(_ENDED_BY_MEMORY.search(line) for line in tail[-20:]):
        return _too_large(reading, f"its last line: {last}")
    how = "no exit code" if code is None else f"signal {code - 128}" if code > 128 else f"exit code {code}"
    return reading.fault(
        f"{reading.name} ended with {how}; its last line: {last}",
        hint="reading these files ends the process that reads them",
        code="unreadable",
    )


def _too_large(reading: Reading[Any], why: str) -> TunesmithError:
    return reading.fault(
        f"{reading.name} takes more memory than the {reading.limits.memory_bytes >> 20} MiB that it may have"
        + (f": {why}" if why else ""),
        hint="files of this size should not need so much: look at what they hold",
        code="too_much_memory",
    )


def _endless(reading: Reading[Any], in_all: bool) -> TunesmithError:
    limits = reading.limits
    how = f"has not ended within {limits.time_s:.0f} s" if in_all else f"made no progress for {limits.silence_s:.0f} s"
    return reading.fault(
        f"{reading.name} {how}",
        hint="files of this size should not take so long: look at what they hold",
        code="takes_too_long",
    )


def _payload_bytes(line: bytes) -> int:
    """How many bytes follow the line. ValueError where it claims what is not allowed."""
    if not line.startswith(b"told "):
        return 0
    size = int(line[5:20].partition(b" ")[0])
    if not 0 <= size <= MAX_PAYLOAD_BYTES:
        raise ValueError(f"{size} bytes at once")
    return size


def _packages(place: str) -> list[Path]:
    """The folders of the platform's packages, and of the reader's own."""
    found = []
    for name in dict.fromkeys((*_PACKAGES, place.partition(".")[0])):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += [Path(location).resolve() for location in spec.submodule_search_locations]
    return found


def _python() -> str:
    """The interpreter by a path that the room has: not by a link to its environment."""
    return str(Path(sys.executable).parent.resolve() / Path(sys.executable).name)
