"""One frozen `Settings`, made at an entry point from the environment and passed in.

`python -m tunesmith.settings` writes docs/settings.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from tunesmith.errors import SpecError, nearest
from tunesmith.frozen import Frozen

PREFIX = "TUNESMITH_"

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(Frozen):
    """Every setting, each read from the variable `TUNESMITH_` + its name in capitals.

    No secret is among them: S3 keys come from boto3's own chain (environment or files of the node), the door's and
    Ray's tokens from files that only the operator reads.
    """

    home: Path
    """Folder of this installation: database, default storage, tokens, caches, logs of `tunesmith up`."""
    storage_url: str
    """Root of the storage: a folder, `s3://bucket/prefix` or `obs://bucket/prefix`."""
    database_url: str
    """SQLAlchemy URL of the record store."""
    s3_endpoint: str | None = None
    """Endpoint of `s3://` and `obs://` URLs. Without one, the provider's default is used."""
    s3_region: str | None = None
    """Name of the region that the S3 service is told."""
    s3_addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Where the bucket's name stands in an S3 URL: in the path, or in the name of the host."""
    s3_checksums: Literal["when_required", "when_supported"] = "when_required"
    """When boto3 sends a checksum with a request. Some S3 services refuse it where it is not required."""
    account: str = "operator"
    """Account that jobs without one of their own belong to."""
    host: str = "127.0.0.1"
    """Address that the front door listens on."""
    port: Port = 8700
    """Port of the front door."""
    ray_dashboard_port: Port = 8265
    """Port of Ray's dashboard and Jobs API, on loopback."""
    ray_port: Port = 6379
    """Port of the Ray that `tunesmith up` starts (its GCS), on loopback."""
    ray_temp_dir: str = "/tmp"
    """Folder in which `tunesmith up` makes Ray's own; at most 28 characters, because paths of sockets are short."""
    python: str = Field(default_factory=lambda: sys.executable)
    """Interpreter that runs the drivers of jobs on the cluster, as a full path."""
    import_roots: str = "/"
    """Folders, separated by `:`, that a registration may read local files from. By default any folder that the
    platform's user may read, which suits a platform of one person; where others hold tokens, name the folders. The
    platform's home, its storage, Ray's folders and `/proc`, `/sys`, `/dev` and `/run` are never among them."""
    segment_s: Seconds = 5.0
    """Age in seconds at which a segment of a growing record is closed."""
    reconcile_interval_s: Seconds = 0.5
    """Pause between two rounds of the reconciler, in seconds."""
    lease_s: Seconds = 10.0
    """How long a reconciler's lease lasts without being renewed, in seconds."""
    stop_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0
    """Time in seconds that a stopping job has to save its checkpoint before Ray stops it."""
    storage_patience_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600.0
    """How long a job's processes wait for a storage that does not answer, in seconds; then the attempt is lost."""
    heartbeat_s: Seconds = 10.0
    """How often a job's driver says that it lives, in seconds; one that is silent three times as long is replaced."""
    hang_timeout_s: Seconds = 1800.0
    """A worker that makes no progress for so many seconds says where it stands and is started again."""
    isolation: Literal["bubblewrap", "none"] = "bubblewrap"
    """How what users bring is kept apart: their programs, and the processes that read their models and data. With
    `none` these run unprotected as the node's user."""
    program_disk_gib: Annotated[int, Field(ge=1)] = 100
    """What a user's program may write to the disk of its node in all, in GiB."""
    program_processes: Annotated[int, Field(ge=1)] = 4096
    """How many processes and threads a user's program may have at once."""
    cache_gib: Annotated[int, Field(ge=1)] = 50
    """What a node keeps of fetched models, tokens, environments and images, in GiB. What was used least recently goes;
    what is in use stays."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from `env` (default: the process's environment). An empty variable counts as not set.

        Raises SpecError that names every unknown `TUNESMITH_` variable, or every value that is not allowed.
        """
        env = os.environ if env is None else env
        given = {name: text for name, text in env.items() if name.startswith(PREFIX) and name not in _OTHERS}
        known = {variable(name): name for name in cls.model_fields}
        unknown = sorted(given.keys() - known.keys())
        if unknown:
            raise SpecError(
                f"unknown setting{'s' * (len(unknown) > 1)} {', '.join(unknown)}",
                fields=unknown,
                hint=nearest(unknown[0], known) or f"the settings are {', '.join(sorted(known))}",
                code="unknown_setting",
            )
        values = {known[name]: text for name, text in given.items() if text}
        home = Path(values.get("home") or _IN_HOME["home"]).expanduser().resolve()
        defaults = {name: text.format(home=home) for name, text in _IN_HOME.items()}
        try:
            return cls.model_validate({**defaults, **values, "home": home})
        except ValidationError as error:
            raise _refusal(error) from None

    def to_env(self) -> dict[str, str]:
        """The variables from which `from_env` makes these settings again, for processes that are started."""
        return {variable(name): str(value) for name, value in self if value is not None}

    @property
    def api_token_path(self) -> Path:
        """File with the door's bearer token; without the file the door asks for none."""
        return self.home / "api_token"

    @property
    def ray_token_path(self) -> Path:
        """File with the token of Ray's own ports."""
        return self.home / "ray_token"

    @property
    def heartbeat_stale_s(self) -> float:
        """How long a heartbeat may stay the same, while storage answers, before its driver counts as gone."""
        return 3 * self.heartbeat_s

    @property
    def heartbeat_lasts_s(self) -> float:
        """How long a driver goes on at most without being able to renew its heartbeat."""
        return self.storage_patience_s + self.heartbeat_stale_s

    @property
    def ray_folder(self) -> Path:
        """Folder of this installation's Ray, which nobody else may read or write."""
        return Path(self.ray_temp_dir) / f"ts-{sha256(str(self.home).encode()).hexdigest()[:8]}"

    @property
    def door_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def ray_jobs_url(self) -> str:
        return f"http://127.0.0.1:{self.ray_dashboard_port}"


_OTHERS = {PREFIX + name for name in ("ATTEMPT", "ATTEMPT_NAME", "URL", "TOKEN", "PLATFORM", "PROGRAM")}
"""Variables that belong to one process: the driver's attempt; the CLI's door and token; marks of what was started."""

_IN_HOME = {"home": "~/.tunesmith", "storage_url": "{home}/storage", "database_url": "sqlite:///{home}/records.db"}
"""Defaults that depend on the home."""


def variable(name: str) -> str:
    """The environment variable of the setting `name`."""
    return PREFIX + name.upper()


def _refusal(error: ValidationError) -> SpecError:
    names = {str(item["loc"][0]): item["input"] for item in error.errors(include_url=False)}
    sentences = [
        f"{variable(name)} must be {_allowed(Settings.model_fields[name])}, got {value!r}"
        for name, value in names.items()
    ]
    return SpecError(
        "; ".join(sentences),
        fields=[variable(name) for name in names],
        hint="docs/settings.md says what each setting means",
        code="invalid_setting",
    )


def _allowed(field: FieldInfo) -> str:
    """What a setting may be, in words: `an integer from 1 to 65535`."""
    if get_origin(field.annotation) is Literal:
        return " or ".join(map(str, get_args(field.annotation)))
    words = {int: "an integer", float: "a number", bool: "true or false", Path: "a path"}
    kinds = get_args(field.annotation) or (field.annotation,)
    text = next((words[kind] for kind in kinds if kind in words), "text")
    limits = {key: getattr(item, key) for item in field.metadata for key in ("ge", "gt", "le", "lt")
              if getattr(item, key, None) is not None}  # fmt: skip
    if {"ge", "le"} <= limits.keys():
        return f"{text} from {limits['ge']} to {limits['le']}"
    said = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return " ".join([text, *(f"{said[key]} {limit:g}" for key, limit in limits.items())])


def document() -> str:
    """The text of docs/settings.md."""
    lines = [
        "<!-- Written by `python -m tunesmith.settings`: change the definition there, not this file. -->",
        "# Settings",
        "",
        "Each setting is an environment variable, read once when a process starts. An empty one counts as not set.",
        "An unknown `TUNESMITH_` variable, or a value that is not allowed, is refused when the process starts.",
        "",
        "No secret is a setting. S3 keys come from boto3's own variables and files; the tokens of the front door and",
        "of Ray lie in the files `api_token` and `ray_token` of the home, which only their owner may read.",
        "",
        "| variable | what | allowed | default |",
        "|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(name, field))} |" for name, field in Settings.model_fields.items()]
    return "\n".join([*lines, ""])


def _cells(name: str, field: FieldInfo) -> tuple[str, ...]:
    what = " ".join((field.description or "").split())
    return f"`{variable(name)}`", what, _allowed(field), _default(name, field)


def _default(name: str, field: FieldInfo) -> str:
    if name in _IN_HOME:
        return f"`{_IN_HOME[name]}`"
    if field.default_factory is not None:
        return "the Python that runs the command"
    value: Any = field.default
    return "not set" if value in (None, "") else f"`{value}`"


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else Path("docs/settings.md")).write_text(document(), encoding="utf-8")
