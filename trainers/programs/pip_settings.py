"""Where pip takes packages from on this node, as pip's own settings say, for an installation in a program's room.

pip is asked for its settings outside, where their files lie. What a program's packages run could read every secret in
them, so only the settings below go inside, and without the names and passwords in their addresses.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from trainers.isolation import node_files

_INDEXES = ("index-url", "extra-index-url")
_PLACES = (*_INDEXES, "find-links", "proxy")
"""Settings with addresses or folders."""
_FILES = ("cert",)
_OTHERS = (
    "default-timeout",
    "no-binary",
    "no-index",
    "only-binary",
    "pre",
    "prefer-binary",
    "retries",
    "timeout",
    "trusted-host",
)
_SECTIONS = ("global", "install", ":env:")
"""Where pip has a setting from, what counts more later."""


@dataclass(frozen=True)
class PipSettings:
    """pip's settings for a room."""

    variables: Mapping[str, str]
    """Variables that pip reads them from."""
    readable: tuple[Path, ...]
    """Folders and files of the node that they name."""
    logins_dropped: tuple[str, ...]
    """Hosts whose addresses had a name or a password."""


def pip_settings() -> PipSettings:
    """The settings of the platform's pip on this node."""
    return settings_for_rooms(_own_settings())


def settings_for_rooms(given: Mapping[str, str]) -> PipSettings:
    """What of these settings goes inside. An address that is itself a secret cannot be told from others."""
    variables: dict[str, str] = {}
    readable: dict[Path, None] = {}
    hosts: dict[str, None] = {}
    for name in (*_PLACES, *_FILES, *_OTHERS):
        if name not in given:
            continue
        words = given[name].split()
        if name in _PLACES:
            hosts |= dict.fromkeys(host for word in words if (host := _login_host(word)) is not None)
            words = [_without_login(word) for word in words]
        if name in (*_PLACES, *_FILES):
            # The files of an index in a folder mostly lie beside it.
            paths = (path.parent if name in _INDEXES else path for word in words for path in _local(word))
            readable |= dict.fromkeys(path for path in paths if path != Path("/"))
        variables[f"PIP_{name.upper().replace('-', '_')}"] = " ".join(words)
    return PipSettings(variables, tuple(readable), tuple(hosts))


def _own_settings() -> dict[str, str]:
    """By name, as `pip config list` tells them: of files and of variables."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in found and value:
            found[section][name.strip()] = str(ast.literal_eval(value))
    return {name: value for section in _SECTIONS for name, value in found[section].items()}


def _login_host(word: str) -> str | None:
    parts = _parts(word)
    return parts.netloc.rpartition("@")[2] if parts is not None and "@" in parts.netloc else None


def _without_login(word: str) -> str:
    parts = _parts(word)
    if parts is None or "@" not in parts.netloc:
        return word
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _parts(word: str) -> SplitResult | None:
    try:
        return urlsplit(word)
    except ValueError:
        return None


def _local(word: str) -> Iterator[Path]:
    """The path that a word names on the node, where a room does not show it anyway."""
    parts = _parts(word)
    if parts is None or parts.scheme not in ("", "file"):
        return
    path = Path(unquote(parts.path) if parts.scheme == "file" else word)
    if path.is_absolute() and path.exists() and not node_files.is_shown(path):
        yield path
