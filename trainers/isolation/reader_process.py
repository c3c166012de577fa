"""The child's side of `readers`: a process that reads what a user brought, and says what it found in lines.

`python -m trainers.isolation.reader_process REQUEST MODULE:FUNCTION` calls `FUNCTION(request, tell)` with the bytes of
the file REQUEST; its folder is where it may write. On stdout come lines: `told N {JSON}` with N bytes behind it, and at
last `answer {JSON}` or `error {JSON}`.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from tunesmith.errors import TunesmithError

MEMORY_BYTES = "READER_MEMORY_BYTES"
"""Variable with the memory that each process of a reader may take."""
UNEXPECTED = "unexpected"
"""Kind of an error that the reader did not foresee."""

Tell = Callable[[BaseModel, bytes], None]
"""Says something on the way, with bytes that belong to it."""
Reader = Callable[[bytes, Tell], BaseModel]


def main(request: Path, place: str) -> int:
    """Read, and say what was found; 0 once an answer or an error was said."""
    limit = int(os.environ[MEMORY_BYTES])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    # Libraries write to stdout as well; only what is said here goes to the real one.
    said = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with os.fdopen(said, "wb") as out:
        kind, value = _outcome(request, place, out)
        out.write(b"%s %s\n" % (kind, value))
        out.flush()
        # What libraries do at their end is of no use to anybody, and may take long or fail.
        os._exit(0)


def _outcome(request: Path, place: str, out: BinaryIO) -> tuple[bytes, bytes]:
    def tell(item: BaseModel, payload: bytes = b"") -> None:
        out.write(b"told %d %s\n" % (len(payload), item.model_dump_json().encode()))
        out.write(payload)
        out.flush()

    try:
        module, _, function = place.partition(":")
        reader: Reader = getattr(importlib.import_module(module), function)
        return b"answer", reader(request.read_bytes(), tell).model_dump_json().encode()
    except TunesmithError as error:
        return b"error", _error(type(error).__name__, error.as_dict())
    except MemoryError as error:
        return b"error", _error(MemoryError.__name__, {"message": str(error)})
    except BaseException as error:  # noqa: BLE001 - the process's border; a panic in Rust is no Exception
        traceback.print_exc()
        first = (str(error).strip() or "no reason is given").splitlines()[0]
        return b"error", _error(UNEXPECTED, {"message": f"{type(error).__name__}: {first}"})


def _error(kind: str, about: dict[str, Any]) -> bytes:
    return json.dumps({"kind": kind, **about}).encode()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
