"""Where everything lies in storage, as keys under its root (docs/contracts.md, section 8)."""

from __future__ import annotations

import re
import secrets

from tunesmith.errors import SpecError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""Names of models, datasets and jobs: lower case letters, digits, `.`, `_` and `-`."""

ASSET_FOLDERS = {"model": "models", "dataset": "datasets"}


def check_name(name: str, *, field: str) -> str:
    """Return `name`, or raise SpecError when it may not name a model, dataset or job."""
    if NAME.fullmatch(name) is None or ".." in name:
        raise SpecError(
            f"{field} must be 1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit, got {name!r}",
            fields=[field],
        )
    return name


def parse_ref(ref: str, *, field: str) -> tuple[str, int | None]:
    """Split `NAME@VERSION` into its parts; a bare NAME has version None, the newest."""
    name, _, version = ref.partition("@")
    check_name(name, field=field)
    if not version and "@" not in ref:
        return name, None
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise SpecError(f"{field} must be NAME or NAME@VERSION with a version from 1, got {ref!r}", fields=[field])
    return name, int(version)


def asset(kind: str, name: str, version: int) -> str:
    """Prefix of a model or dataset."""
    return f"{ASSET_FOLDERS[kind]}/{name}/{version}"


def asset_files(kind: str, name: str, version: int, folder: str) -> str:
    """Prefix of a version's files; its manifest names the folder."""
    return f"{asset(kind, name, version)}/{folder}"


def new_files_folder(job_id: str, attempt: int) -> str:
    """A folder for the files of a version that nobody else writes to: not even a lost worker of the same attempt."""
    return f"{_files_of(job_id)}{attempt}-{secrets.token_hex(4)}"


def is_files_folder(folder: str, job_id: str) -> bool:
    """Whether an attempt of the job stores, or has stored, a version's files there."""
    return folder.startswith(_files_of(job_id))


def asset_manifest(kind: str, name: str, version: int) -> str:
    return f"{asset(kind, name, version)}/manifest.json"


def job(job_id: str) -> str:
    """Prefix of a job."""
    return f"jobs/{job_id}"


def job_json(job_id: str) -> str:
    return f"{job(job_id)}/job.json"


def stop(job_id: str) -> str:
    return f"{job(job_id)}/stop"


def attempts(job_id: str) -> str:
    """Prefix of all attempts of a job."""
    return f"{job(job_id)}/attempts"


def attempt(job_id: str, number: int) -> str:
    """Prefix of one attempt: the only place it writes to before it publishes."""
    return f"{attempts(job_id)}/{number}"


def claim(job_id: str, number: int) -> str:
    return f"{attempt(job_id, number)}/claim"


def heartbeat(job_id: str, number: int) -> str:
    return f"{attempt(job_id, number)}/heartbeat"


def result(job_id: str, number: int) -> str:
    return f"{attempt(job_id, number)}/result.json"


def logs(job_id: str, number: int, rank: str) -> str:
    """Prefix of one log's segments; `rank` is a worker's number or `driver`."""
    return f"{attempt(job_id, number)}/logs/{rank}"


def metrics(job_id: str, number: int) -> str:
    return f"{attempt(job_id, number)}/metrics"


def events(job_id: str, number: int) -> str:
    return f"{attempt(job_id, number)}/events"


def audit(job_id: str, number: int) -> str:
    """The report on what the attempt trains."""
    return f"{attempt(job_id, number)}/audit.json"


def evaluations(job_id: str, number: int) -> str:
    return f"{attempt(job_id, number)}/evaluations"


def evaluation(job_id: str, number: int, step: int) -> str:
    """The evaluation of the model as it was after `step`."""
    return f"{evaluations(job_id, number)}/{step}.json"


def program_output(job_id: str, number: int) -> str:
    """What a custom job's own program has written so far, and what it left where no model was made of it."""
    return f"{attempt(job_id, number)}/output"


def requirements_lock(job_id: str, number: int) -> str:
    """The packages that were installed for a custom job."""
    return f"{attempt(job_id, number)}/requirements.lock"


def image_lock(job_id: str, number: int) -> str:
    """Which image a custom job ran in."""
    return f"{attempt(job_id, number)}/image.json"


def checkpoints(job_id: str, number: int) -> str:
    return f"{attempt(job_id, number)}/checkpoints"


def checkpoint(job_id: str, number: int, step: int) -> str:
    return f"{checkpoints(job_id, number)}/{step}"


def checkpoint_manifest(key: str) -> str:
    """The manifest of the checkpoint whose prefix is `key`."""
    return f"{key}/manifest.json"


def checkpoint_list(key: str) -> str:
    """What a worker has stored of a checkpoint, listed as in the manifest that the driver makes of it."""
    return f"{key}/stored.json"


def tokenized(key: str) -> str:
    """Prefix of tokenised data, shared by all jobs that need the same."""
    return f"cache/tokenized/{key}"


def split_job_url(url: str) -> tuple[str, str]:
    """Root and job id of the URL or path of a `job.json` that lies at its place in storage.

    Raises SpecError when the URL does not end in `jobs/ID/job.json`.
    """
    match = re.fullmatch(r"(?:(.*)/)?jobs/([^/]+)/job\.json", url)
    if match is None:
        raise SpecError(
            f"a job is given by the URL or path of its job.json, ROOT/jobs/ID/job.json, got {url!r}",
            hint="`tunesmith jobs render` writes one to its place",
        )
    return match[1] if match[1] is not None else ".", match[2]


def _files_of(job_id: str) -> str:
    return f"files-{job_id}-a"


def join(root: str, key: str) -> str:
    """URL of `key` under the storage root `root`."""
    return f"{root.rstrip('/')}/{key}"
