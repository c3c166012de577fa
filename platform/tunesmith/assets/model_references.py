"""Names of files that a model's own files give: each is the plain name of a regular file beside them.

transformers joins such names to the model's folder, or takes them as they are, and opens what it finds. So they are
looked at before it does: at registration, and again by whoever loads the model, who may have another copy at hand.

What transformers only carries along (`_name_or_path`, `base_model_name_or_path` beside a config.json,
`special_tokens_map_file`) is not looked at: models have the paths of the machines there that they were made on.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.file_names import ALLOWED, name_fault
from tunesmith.visible_text import visible

INDEX = ".index.json"
"""How files end that tell which file each weight lies in."""
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""What transformers hands to a tokenizer's class, names of files among it."""
MAX_BYTES = 64 << 20
"""Of each of these files; the largest index that is known, of 90,000 weights, has 9 MB."""

_CARRIED_ALONG = ("special_tokens_map_file",)
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<suffix>\.[a-z]+)")

Given = tuple[str, object]
"""Where in a file a name is given, and the name."""


def check_references(folder: Path, *, present: Collection[str] | None = None) -> None:
    """Raise ModelError where a file of the model in `folder` names one that is not a plain file beside it.

    `present`: the names of all files that the folder will have, where it has not all of them yet.
    """
    for path in sorted(folder.glob(f"*{INDEX}")):
        shards = _shards(_read(path), path.name)
        if shards is None:
            continue
        for where, name in shards:
            _check(folder, path.name, where, name=name, present=present)
        _check_unlisted(folder, path.name, {str(name) for _, name in shards}, present)
    for name, given_in in _CONFIGS.items():
        path = folder / name
        if path.exists() or path.is_symlink():
            for where, named in given_in(_read(path)):
                _check(folder, name, where, name=named, present=present)


def is_reference_file(path: str) -> bool:
    """Whether `check_references` reads the file of that path."""
    return "/" not in path and (path.endswith(INDEX) or path in _CONFIGS)


def _shards(index: Mapping[str, Any], file: str) -> list[Given] | None:
    """The files that an index names; None where it is the index of something else than weights."""
    found = index.get("weight_map")
    if found is None and not file.endswith(f".safetensors{INDEX}"):
        return None
    if not isinstance(found, Mapping) or not found:
        raise _wrong(f"{file} has no weight_map, an object that names the file of each weight")
    once = {name if isinstance(name, str) else id(name): (weight, name) for weight, name in found.items()}
    return [(f"weight_map of {visible(weight, limit=200)!s}", name) for weight, name in once.values()]


def _check_unlisted(folder: Path, index: str, listed: Collection[str], present: Collection[str] | None) -> None:
    """Raise ModelError for a shard of this index that it does not list: some of the weights would be left out."""
    names = present if present is not None else [path.name for path in folder.iterdir()]
    for name in sorted(names):
        shard = _SHARD.fullmatch(name)
        if shard and name not in listed and index == f"{shard['stem']}{shard['suffix']}{INDEX}":
            raise _wrong(
                f"{visible(name)} is a part of the weights that {index} does not list",
                hint="leave out files of another version, or write the index again",
            )


def _in_config(config: Mapping[str, Any]) -> Iterator[Given]:
    yield "transformers_weights", config.get("transformers_weights")
    yield from _each("configuration_files", config.get("configuration_files"))
    yield from _auto_map(config)


def _in_tokenizer(config: Mapping[str, Any]) -> Iterator[Given]:
    yield from _each("fast_tokenizer_files", config.get("fast_tokenizer_files"))
    for key, value in config.items():
        if key.endswith("_file") and key not in _CARRIED_ALONG:
            yield key, value
    yield from _auto_map(config)


def _auto_map(config: Mapping[str, Any]) -> Iterator[Given]:
    """Modules of the model's own code, which is never run, by the names of their files."""
    found = config.get("auto_map")
    values = list(found.values()) if isinstance(found, Mapping) else [found]
    for value in values:
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str):
                # REPOSITORY--MODULE.CLASS or MODULE.CLASS; the file need not be there.
                yield "auto_map", _Module(reference.rpartition("--")[2].rpartition(".")[0])


class _Module(str):
    """The name of a module, which is that of a file but for its ending."""


def _each(key: str, value: object) -> Iterator[Given]:
    if value is not None and not isinstance(value, list):
        raise _wrong(f"{key} must be a list of names of files, got a {type(value).__name__}")
    yield from ((key, each) for each in value or ())


_CONFIGS = {"config.json": _in_config, **dict.fromkeys(TOKENIZER_FILES, _in_tokenizer)}


def _check(folder: Path, file: str, where: str, *, name: object, present: Collection[str] | None) -> None:
    """ModelError where `name`, given at `where` in `file`, is not the plain name of a regular file in the folder."""
    if name is None:
        return
    # Of lists in lists nothing is spelled out.
    given = visible(repr(name), limit=200) if isinstance(name, str) else f"a {type(name).__name__}"
    said = f"{file}: {where} names {given}"
    why = name_fault(name) if isinstance(name, str) else "is no text"
    if why is not None:
        raise _wrong(f"{said}, which {why}", hint=f"only files beside {file} may be named; {ALLOWED}")
    if isinstance(name, _Module):
        return
    if present is not None:
        there = name in present
    else:
        try:
            there = stat.S_ISREG((folder / str(name)).lstat().st_mode)
        except OSError:
            there = False
    if not there:
        raise _wrong(f"{said}, which is no file of the model", hint="add the file, or take its name away")


def _read(path: Path) -> Mapping[str, Any]:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise _wrong(f"{visible(path.name)} is no regular file")
    if status.st_size > MAX_BYTES:
        raise _wrong(f"{visible(path.name)} has {status.st_size:,} bytes; allowed are {MAX_BYTES:,}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else visible(str(error), limit=200)
        raise _wrong(f"{visible(path.name)} is not JSON that can be read: {why}") from None
    if not isinstance(value, dict):
        raise _wrong(f"{visible(path.name)} must hold a JSON object, got a {type(value).__name__}")
    return value


def _wrong(message: str, *, hint: str | None = None) -> ModelError:
    return ModelError(message, fields=["source"], hint=hint, code="invalid_file_name" if hint else None)
