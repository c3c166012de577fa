"""What the files of a registration say of themselves, asked of a reader within the walls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from trainers.isolation import readers
from trainers.isolation.readers import Limits, Reading
from tunesmith.assets.catalog import Table
from tunesmith.assets.gallery import Gallery
from tunesmith.errors import DataError, ModelError
from tunesmith.frozen import Frozen
from tunesmith.settings import Settings

_READERS = "trainers.registration.description_readers"
_MEMORY_BYTES = 2 << 30
_SILENCE_S = 300.0
_SLOWEST_BYTES_PER_S = 1 << 20
"""Of the slowest data file on the slowest machine."""


class ModelRequest(Frozen):
    """A model's folder to be read, and the task type that was given for it."""

    folder: Path
    task_type: str | None
    present: list[str]
    """The names of all files that the folder will have."""


class ModelAbout(Frozen):
    """What a model's card and its `gallery_train/` say."""

    task_type: str
    framework: str | None
    license: str | None
    gallery: Gallery | None

    @property
    def is_in_image(self) -> bool:
        """Whether its training needs an image of its own."""
        return self.gallery is not None and self.gallery.image_url is not None


class TablesRequest(Frozen):
    """Data files to be described, by their paths below a folder."""

    folder: Path
    files: list[str]


class TablesProgress(Frozen):
    """Which file is read, and how many of its rows were."""

    file: str
    rows: int


class Tables(Frozen):
    """What data files hold, by their paths."""

    tables: dict[str, Table]


def describe_model(
    folder: Path, task_type: str | None, *, present: Collection[str], settings: Settings, listen: Callable[[], None]
) -> ModelAbout:
    """What the model in `folder` says of itself, once it has the files `present`. Raises as `read_model_folder`."""
    reading = Reading(
        name="reading the model's card and gallery_train/",
        place=f"{_READERS}:read_model",
        request=ModelRequest(folder=folder, task_type=task_type, present=list(present)),
        answer=ModelAbout,
        readable=[folder],
        limits=Limits(memory_bytes=1 << 30, time_s=_SILENCE_S),
        fault=ModelError,
    )
    return readers.read(reading, settings=settings, listen=listen)


def describe_tables(
    folder: Path, files: Sequence[str], *, settings: Settings, listen: Callable[[], None]
) -> dict[str, Table]:
    """Columns and rows of the data files below `folder`. DataError names the one that is not what its name says."""
    size = sum((folder / file).stat().st_size for file in files)
    reading = Reading(
        name="reading the data files",
        place=f"{_READERS}:read_tables",
        request=TablesRequest(folder=folder, files=list(files)),
        answer=Tables,
        readable=[folder],
        limits=Limits(_MEMORY_BYTES, time_s=600 + size / _SLOWEST_BYTES_PER_S, silence_s=_SILENCE_S),
        fault=DataError,
    )
    file, said = files[0], readers.stream(reading, TablesProgress, settings=settings, listen=listen)
    try:
        while True:
            told, _ = next(said)
            file = told.file if told.file in files else file
    except StopIteration as end:
        answer: Tables = end.value
    except DataError as error:
        if error.code not in readers.DEATHS:
            raise
        raise DataError(f"{file}: {error.message}", fields=[file], hint=error.hint, code=error.code) from None
    if set(answer.tables) != set(files):
        raise DataError("the data files could not be told apart", fields=["source"], code="unreadable")
    return answer.tables
