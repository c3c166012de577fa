"""Where files may be taken from: the one rule for registrations and for images in archives.

A source lies below one of the folders of `TUNESMITH_IMPORT_ROOTS`. Whatever that says, the platform's own home, its
storage, Ray's folders and the system's own file systems are never a source. The door checks an order, and whoever opens
the files checks again: the job may have come without a door.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tunesmith.errors import SpecError
from tunesmith.file_names import ALLOWED, path_fault
from tunesmith.settings import Settings
from tunesmith.visible_text import is_visible, visible

SYSTEM = ("/proc", "/sys", "/dev", "/run", "/var/run")
"""Folders of the system: what lies there tells of processes and devices, and may have no end."""

_BUCKET = re.compile(r"(s3|obs)://([^/]+)(/.*)?")


def check_source(source: str, settings: Settings) -> str:
    """Where to register files from: a bucket's URL as it is, or the real path of a file or folder.

    SpecError where the source is not allowed, or not there.
    """
    bucket = _BUCKET.fullmatch(source)
    given = visible(repr(source), limit=300)
    if bucket is not None:
        _check_bucket(source, settings)
        prefix = (bucket[3] or "").strip("/")
        if prefix and (why := path_fault(prefix)) is not None:
            raise SpecError(
                f"source is {given}, whose prefix {why}", fields=["source"], hint=ALLOWED, code="invalid_source"
            )
        return source
    path = source.removeprefix("file://")
    if not path.startswith("/") or not is_visible(path):
        raise SpecError(
            f"source must be a full path, s3://BUCKET/PREFIX or obs://BUCKET/PREFIX, got {given}",
            fields=["source"],
            code="invalid_source",
        )
    real = check_path(path, settings, what="source")
    if not os.access(real, os.R_OK):
        raise SpecError(
            f"there is no file or folder {source!r} that can be read",
            fields=["source"],
            hint="check the path, or put the files into a bucket",
            code="unknown_source",
        )
    return real


def check_path(path: str, settings: Settings, *, what: str) -> str:
    """The real path of `path`. SpecError where files may not be taken from there; `what` names it in the message."""
    # What is checked is what is opened: a link that is changed later leads nowhere else.
    real = os.path.realpath(path)
    roots = [os.path.realpath(root) for root in settings.import_roots.split(":") if root]
    if not any(_is_below(real, root) for root in roots):
        raise SpecError(
            f"{what} must lie below {' or '.join(roots) or 'a folder that is allowed'}, got {path!r}",
            fields=["source"],
            hint="TUNESMITH_IMPORT_ROOTS names the folders that files are taken from",
            code="source_not_allowed",
        )
    for own in never(settings):
        if _is_below(real, own) or _is_below(own, real):
            where = "lies in" if _is_below(real, own) else "holds"
            raise SpecError(
                f"{what} may not be {path!r}: it {where} {own}, which belongs to the platform or the system",
                fields=["source"],
                hint="put the files into a folder of their own",
                code="source_not_allowed",
            )
    return real


def never(settings: Settings) -> list[str]:
    """The real paths of folders that nothing is taken from, whatever the settings allow."""
    own: list[str | Path] = [settings.home, settings.ray_folder, "/tmp/ray", *SYSTEM]
    storage = settings.storage_url.removeprefix("file://")
    if "://" not in storage:
        own.append(Path(storage).expanduser())
    return list(dict.fromkeys(os.path.realpath(path) for path in own))


def _check_bucket(source: str, settings: Settings) -> None:
    """SpecError where the source and the platform's storage have objects in common."""
    own = _BUCKET.fullmatch(settings.storage_url)
    if own is None:
        return
    (given, here) = (_place(url) for url in (source, settings.storage_url))
    if any(_is_prefix(one, other) for one, other in ((given, here), (here, given))):
        raise SpecError(
            f"source may not be {source!r}: it has objects in common with the platform's own storage",
            fields=["source"],
            hint="put the files into another bucket, or below another prefix",
            code="source_not_allowed",
        )


def _place(url: str) -> list[str]:
    """Bucket and parts of the prefix, whatever the scheme: both speak to the same service."""
    return [part for part in url.partition("://")[2].split("/") if part]


def _is_prefix(one: list[str], other: list[str]) -> bool:
    return other[: len(one)] == one


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
