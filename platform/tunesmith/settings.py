"""One frozen `Settings`, made at an entry point from the environment and passed in."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from tunesmith.errors import SpecError

PREFIX = "TUNESMITH_"


@dataclass(frozen=True)
class Settings:
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
    """Endpoint of `s3://` and `obs://` URLs; none means the provider's default."""
    s3_region: str | None = None
    """Region name sent to the S3 service."""
    s3_addressing_style: str = "auto"
    """`auto`, `path` or `virtual`."""
    s3_checksums: str = "when_required"
    """`when_required` or `when_supported`: boto3's request checksum calculation."""
    account: str = "operator"
    """Account that jobs without one of their own belong to."""
    host: str = "127.0.0.1"
    """Address the front door listens on."""
    port: int = 8700
    """Port of the front door."""
    ray_dashboard_port: int = 8265
    """Port of Ray's dashboard and Jobs API, on loopback."""
    ray_port: int = 6379
    """Port of the Ray that `tunesmith up` starts (its GCS), on loopback."""
    ray_temp_dir: str = "/tmp"
    """Folder in which `tunesmith up` makes Ray's own; at most 30 characters, for Ray's sockets lie deep below it."""
    python: str = sys.executable
    """Interpreter that runs `python -m trainers` on the cluster: a full path, for Ray would take the PATH's."""
    import_roots: str = "/"
    """Folders, separated by `:`, that a registration may read local files from."""
    segment_s: float = 5.0
    """Age in seconds at which a segment of a growing record is closed."""
    reconcile_interval_s: float = 0.5
    """Pause between two rounds of the reconciler, seconds."""
    lease_s: float = 10.0
    """How long a reconciler's lease lasts without being renewed, seconds."""
    stop_grace_s: float = 60.0
    """Time a stopping job has to save its checkpoint before Ray's own stop follows, seconds."""
    storage_patience_s: float = 600.0
    """How long a job's processes wait for a storage that does not answer; then the attempt is lost, seconds."""
    hang_timeout_s: float = 1800.0
    """A worker that makes no progress for so long says where it stands and is started again, seconds."""
    isolation: str = "bubblewrap"
    """How users' programs are kept apart: `bubblewrap`, or `none`, by which they run unprotected as the node's user."""
    program_disk_gib: int = 100
    """What a user's program may write to the disk of its node in all, GiB."""
    program_processes: int = 4096
    """How many processes and threads a user's program may have at once."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from `env` (default: the process's environment).

        Raises SpecError for an unknown `TUNESMITH_` variable or a value of the wrong type.
        """
        env = os.environ if env is None else env
        home = Path(env.get(PREFIX + "HOME") or Path.home() / ".tunesmith").expanduser().resolve()
        values: dict[str, object] = {
            "home": home,
            "storage_url": str(home / "storage"),
            "database_url": f"sqlite:///{home / 'records.db'}",
        }
        known = {PREFIX + f.name.upper(): f.name for f in fields(cls)}
        for variable, text in env.items():
            if not variable.startswith(PREFIX) or variable in _OTHERS or variable == PREFIX + "HOME":
                continue
            if variable not in known:
                raise SpecError(f"unknown setting {variable}", hint=f"the settings are {', '.join(sorted(known))}")
            values[known[variable]] = _parse(variable, text, cls.__annotations__[known[variable]])
        if values.get("isolation", "bubblewrap") not in ("bubblewrap", "none"):
            raise SpecError(f"{PREFIX}ISOLATION must be bubblewrap or none, got {values['isolation']!r}")
        return cls(**values)  # type: ignore[arg-type]

    def to_env(self) -> dict[str, str]:
        """The variables from which `from_env` makes these settings again, for processes that are started."""
        pairs = {PREFIX + f.name.upper(): getattr(self, f.name) for f in fields(self)}
        return {variable: str(value) for variable, value in pairs.items() if value is not None}

    @property
    def api_token_path(self) -> Path:
        """File with the door's bearer token; without the file the door asks for none."""
        return self.home / "api_token"

    @property
    def ray_token_path(self) -> Path:
        """File with the token of Ray's own ports."""
        return self.home / "ray_token"

    @property
    def door_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def ray_jobs_url(self) -> str:
        return f"http://127.0.0.1:{self.ray_dashboard_port}"


_OTHERS = {PREFIX + name for name in ("ATTEMPT", "URL", "TOKEN", "PLATFORM", "PROGRAM")}
"""Variables that belong to one process: the driver's attempt; the CLI's door and token; marks of what was started."""


def _parse(variable: str, text: str, annotation: str) -> object:
    try:
        if annotation == "int":
            return int(text)
        if annotation == "float":
            return float(text)
    except ValueError:
        raise SpecError(f"{variable} must be a number, got {text!r}") from None
    return text
