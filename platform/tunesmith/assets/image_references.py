"""Images that models are trained in: what may name one, and what a cluster needs to run it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from tunesmith.errors import SpecError

RESOURCE = "podman"
"""Ray's resource of nodes on which podman works; a node has 1 of it."""
SHARE = 0.001
"""How much of it one worker takes: so little that it says where the worker may run, and never keeps one waiting."""

_ALLOWED = "HOST/NAME:TAG, HOST/NAME@sha256:DIGEST, docker-archive:PATH or oci-archive:PATH"

# The grammar of https://pkg.go.dev/github.com/distribution/reference.
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*(?::[0-9]{1,5})?"
_PART = r"[a-z0-9]+(?:(?:[.]|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(
    rf"(?:(?P<host>{_HOST})/)?(?P<path>{_PART}(?:/{_PART})*)"
    r"(?P<version>:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}|@sha256:[0-9a-f]{64})?",
    re.ASCII,
)


@dataclass(frozen=True)
class ImageReference:
    """Where an image is taken from."""

    transport: Literal["docker", "docker-archive", "oci-archive"]
    """`docker`: a registry."""
    name: str
    """Its name in full, with the host; for an archive the path, absolute or relative to the model's files."""

    @property
    def is_archive(self) -> bool:
        return self.transport != "docker"

    @property
    def is_in_model(self) -> bool:
        """Whether it is a file of the model."""
        return self.is_archive and not self.name.startswith("/")


def parse_image(text: str) -> ImageReference:
    """What a card's `Train_image_url` names. SpecError says why it may not."""
    transport, colon, rest = text.partition(":")
    if colon and transport == "docker-archive":
        return ImageReference("docker-archive", _archive(text, rest))
    if colon and transport == "oci-archive":
        return ImageReference("oci-archive", _archive(text, rest))
    name = text.removeprefix("docker://")
    found = _NAME.fullmatch(name) if len(name) <= 512 else None
    if found is None:
        raise SpecError(f"must be {_ALLOWED}, got {text[:200]!r}")
    host, path = found["host"], found["path"]
    if host is not None and not (re.search(r"[.:]", host) or host == "localhost"):
        # As docker has it: a first part that cannot be a host belongs to the name.
        host, path = None, f"{host}/{path}"
        if re.fullmatch(rf"{_PART}(?:/{_PART})*", path) is None:
            raise SpecError(f"must be {_ALLOWED}, names in small letters; got {text[:200]!r}")
    if host is None:
        host, path = "docker.io", path if "/" in path else f"library/{path}"
    return ImageReference("docker", f"{host}/{path}{found['version'] or ''}")


def check_cluster(capacity: Mapping[str, float], *, model: str) -> None:
    """SpecError where no node of a cluster with these resources can run an image."""
    if capacity.get(RESOURCE, 0) > 0:
        return
    raise SpecError(
        f"{model} is trained in an image, and no node of the cluster has podman",
        fields=["model"],
        hint="the operator installs podman on a node and starts Ray there again, as docs/custom-models.md says; "
        "a model without Train_image_url in its card is trained by its gallery_train/train.py",
        code="no_podman",
    )


def _archive(text: str, path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or not path.isprintable() or ":" in path:
        raise SpecError(f"must be {_ALLOWED}, the path without '..' and ':'; got {text[:200]!r}")
    return str(PurePosixPath(path))
