"""Where files are registered from, and how they are copied."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainers.attempt.context import Attempt
from tunesmith.assets.model_folder import refuse_links
from tunesmith.errors import SpecError
from tunesmith.storage.urls import open_storage


def copy_source(source: str, folder: Path, attempt: Attempt) -> None:
    """Copy a folder, a file, or all below an `s3://` or `obs://` prefix to `folder`; links are refused."""
    if "://" in source and not source.startswith("file://"):
        remote = open_storage(source, attempt.settings)
        for entry in remote.entries():
            remote.download_file(entry.key, folder / entry.key)
        if not folder.is_dir():
            raise SpecError(
                f"there is nothing at {source}", fields=["source"], hint="give a prefix with files below it"
            )
        return
    path = Path(source.removeprefix("file://"))
    if not path.exists():
        raise SpecError(
            f"there is nothing at {source} on the machine that registers",
            fields=["source"],
            hint="give a full path, or an s3:// or obs:// prefix",
        )
    refuse_links(path)
    if path.is_dir():
        # A link that was made meanwhile stays one.
        shutil.copytree(path, folder, symlinks=True)
    else:
        folder.mkdir()
        shutil.copyfile(path, folder / path.name, follow_symlinks=False)
    refuse_links(folder)
