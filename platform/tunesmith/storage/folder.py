"""A storage that is a plain folder."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.errors import StorageError
from tunesmith.storage.base import PARTIAL, Entry, Storage, _missing, checked_key, escape, full


class FolderStorage(Storage):
    """A plain folder. Writes go to a file beside their place, are synced, and are moved or linked there."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.url = str(self.root)

    def get(self, key: str) -> bytes:
        with _not_found(key):
            return self._path(key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        with self._written(key, data) as partial:
            partial.replace(self._path(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._written(key, data) as partial:
            try:
                # A hard link is made only where nothing is: the folder's conditional write.
                self._path(key).hardlink_to(partial)
            except FileExistsError:
                return False
            finally:
                partial.unlink()
        return True

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def entries(self, prefix: str = "", *, after: str = "") -> Iterator[Entry]:
        top = self._path(prefix) if prefix else self.root
        keys = []
        for folder, _, names in os.walk(top):
            place = Path(folder).relative_to(self.root).as_posix()
            found = (name if place == "." else f"{place}/{name}" for name in names if not name.startswith(PARTIAL))
            keys += [key for key in found if key > after]
        for key in sorted(keys):
            path = self.root / key
            with suppress(FileNotFoundError):
                if not path.is_symlink():
                    yield Entry(key, path.stat().st_size)

    def children(self, prefix: str = "") -> list[str]:
        top = self._path(prefix) if prefix else self.root
        try:
            return sorted(path.name for path in top.iterdir() if path.is_dir() and any(path.iterdir()))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        self._remove_empty(path.parent)

    def delete_folder(self, prefix: str) -> None:
        path = self._path(prefix)
        shutil.rmtree(path, ignore_errors=True)
        self._remove_empty(path.parent)

    def upload_file(self, path: Path, key: str) -> None:
        with self._partial(key) as partial:
            shutil.copyfile(path, partial)
            _sync(partial)
            partial.replace(self._path(key))

    def download_file(self, key: str, path: Path) -> None:
        source = self._path(key)
        with _not_found(key):
            _make_folder(path)
            shutil.copyfile(source, path)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        path = self.root / checked_key(key)
        # A link inside the root could lead out of it.
        if not path.resolve().is_relative_to(self.root):
            raise escape(key)
        return path

    @contextmanager
    def _partial(self, key: str) -> Iterator[Path]:
        place = self._path(key)
        partial = place.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
        try:
            while True:
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    partial.touch(exist_ok=False)
                    break
                except FileNotFoundError:
                    # Between the two lines a deletion took the empty folder away.
                    continue
            yield partial
            _sync(place.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full(key, self.url) from error
            raise StorageError(f"{key} could not be written to {self.url}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[Path]:
        with self._partial(key) as partial:
            partial.write_bytes(data)
            _sync(partial)
            yield partial

    def _remove_empty(self, folder: Path) -> None:
        """Remove folders that hold nothing: as on S3, a folder exists only while it holds objects."""
        while folder != self.root and folder.is_relative_to(self.root):
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


@contextmanager
def _not_found(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise _missing(key) from error


def _make_folder(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
