"""Files in storage as a manifest lists them: whoever reads them takes no other, and checks what comes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import DamagedError, NotFoundError
from tunesmith.frozen import Tolerant
from tunesmith.storage.base import Storage, checked_key


class File(Tolerant):
    """One file of a manifest."""

    path: str
    """Relative to the folder of the files."""
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredFiles:
    """The files below one prefix that belong together; what else lies there is not part of them."""

    prefix: str
    files: Sequence[File]

    def below(self, folder: str) -> StoredFiles:
        """Those in one of the folders."""
        inside = [file for file in self.files if file.path.startswith(f"{folder}/")]
        own = [file.model_copy(update={"path": file.path.removeprefix(f"{folder}/")}) for file in inside]
        return StoredFiles(f"{self.prefix}/{folder}", own)

    def read(self, storage: Storage, path: str) -> bytes:
        """One of the files. NotFoundError where there is none of that path; DamagedError where it is another."""
        file = next((file for file in self.files if file.path == path), None)
        if file is None:
            raise NotFoundError(f"{self.prefix} has no file {path!r}", code="unknown_file")
        key = f"{self.prefix}/{path}"
        try:
            data = storage.get(key)
        except NotFoundError:
            raise _gone(file, key) from None
        _check(file, key, len(data), hashlib.sha256(data).hexdigest())
        return data

    def copy(self, storage: Storage, folder: Path) -> None:
        """Copy all of them to a local folder, each checked; DamagedError names the file that is another, or is gone."""
        for file in self.files:
            key, place = f"{self.prefix}/{file.path}", folder / file.path
            try:
                storage.download_file(key, place)
            except NotFoundError:
                raise _gone(file, key) from None
            _check(file, key, place.stat().st_size, hash_file(place))

    def check(self, folder: Path, *, hashes: bool = True) -> None:
        """Check them where they lie on disk, by size and by hash, or by size alone; DamagedError as for `copy`."""
        for file in self.files:
            place = folder / checked_key(file.path)
            if not place.is_file():
                raise _gone(file, str(place))
            _check(file, str(place), place.stat().st_size, hash_file(place) if hashes else file.sha256)


def describe_files(folder: Path) -> list[File]:
    """Path, size and sha256 of every file below a local folder, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [describe_file(path, path.relative_to(folder).as_posix()) for path in paths]


def describe_file(local: Path, path: str) -> File:
    """A local file as a manifest lists it."""
    return File(path=path, size_bytes=local.stat().st_size, sha256=hash_file(local))


def hash_file(path: Path) -> str:
    """sha256 of a local file, hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(file: File, where: str, size_bytes: int, sha256: str) -> None:
    if size_bytes != file.size_bytes:
        raise _damaged(f"{where} has {size_bytes} bytes; its manifest says {file.size_bytes}")
    if sha256 != file.sha256:
        raise _damaged(f"{where} has the sha256 {sha256}; its manifest says {file.sha256}")


def _gone(file: File, where: str) -> DamagedError:
    return _damaged(f"{where} is gone; its manifest says {file.size_bytes} bytes with the sha256 {file.sha256}")


def _damaged(message: str) -> DamagedError:
    return DamagedError(message, hint="something wrote to or deleted from storage; register or train it again")
