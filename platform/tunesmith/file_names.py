"""The one rule of what may name a file: in a key of storage, in a source, in an output, and in a file of a user.

A name that keeps it means the same file to a folder, to a bucket and to whoever lists them, and never one outside.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from tunesmith.visible_text import is_visible

MAX_NAME_BYTES = 255
"""Of one part of a path: what file systems take."""
MAX_PATH_BYTES = 768
"""Of the path of a file of a model or dataset: the key in storage that it becomes is longer by its prefix."""
ALLOWED = (
    f"names are text in UTF-8 of at most {MAX_NAME_BYTES} bytes without '/', backslashes and control characters, "
    "and are not '.' or '..'"
)
"""For hints."""


def path_fault(path: str, *, max_bytes: int = MAX_PATH_BYTES) -> str | None:
    """Why `path` cannot be the path of a file relative to its folder, as the end of a sentence; None where it can."""
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        return "holds what is not UTF-8"
    if size > max_bytes:
        return f"has {size} bytes, and {max_bytes} are allowed"
    if path.startswith("/"):
        return "begins with '/', so it would lie outside"
    return next((why for part in path.split("/") if (why := _part_fault(part))), None)


def name_fault(name: str) -> str | None:
    """Why `name` cannot be the plain name of a file in a folder, as the end of a sentence; None where it can."""
    return "is a path, not the name of a file" if "/" in name else path_fault(name)


def collision(paths: Iterable[str], *, folds: bool) -> tuple[str, str] | None:
    """Two of the paths that cannot lie beside each other in a file system; None where all can.

    One is the folder of the other, which a bucket may hold and a folder cannot; or, where the file system folds names,
    they are one to it.
    """
    known: dict[str, str] = {}
    paths = sorted(paths)
    seen = folded if folds else str
    for path in paths:
        other = known.setdefault(seen(path), path)
        if other != path:
            return other, path
    for path in paths:
        parts = seen(path).split("/")
        for end in range(1, len(parts)):
            above = known.get("/".join(parts[:end]))
            if above is not None:
                return above, path
    return None


def folded(path: str) -> str:
    """The path as a file system has it that tells neither capitals nor ways of composing characters apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _part_fault(part: str) -> str | None:
    if part == "":
        return "has an empty part"
    if part in (".", ".."):
        return f"has the part {part!r}, which names a folder"
    if "\\" in part:
        return "holds a backslash"
    if not is_visible(part):
        return "holds characters that are not shown"
    size = len(part.encode())
    return f"has a part of {size} bytes, and {MAX_NAME_BYTES} are allowed" if size > MAX_NAME_BYTES else None
