"""An earlier result that a job goes on from: which adapter it is, and whether it fits (`finetuned_model`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunesmith import layout
from tunesmith.catalog import Manifest, get_manifest
from tunesmith.errors import SpecError
from tunesmith.hyperparameters import Hyperparameter
from tunesmith.storage import Storage

FIELD = "hyperparameters.finetuned_model"
FOLDER = "adapter"
"""Where a model's files hold its adapter."""


@dataclass(frozen=True)
class Adapter:
    """The adapter of a published model."""

    ref: str
    """`NAME@VERSION` of the model that holds it."""
    rank: int
    alpha: int

    def as_defaults(self, known: Iterable[Hyperparameter]) -> tuple[Hyperparameter, ...]:
        """`known` with this adapter's rank and scale for defaults."""
        own = {"lora_rank": self.rank, "lora_alpha": self.alpha}
        return tuple(replace(h, default=own.get(h.name, h.default)) for h in known)

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        """Raises SpecError where a job asks for another rank or scale: the adapter cannot take it on."""
        for name, own in (("lora_rank", self.rank), ("lora_alpha", self.alpha)):
            if hyperparameters[name] != own:
                raise SpecError(
                    f"{self.ref} was tuned with {name} {own}, so {name} must be {own}, got {hyperparameters[name]}",
                    fields=[f"hyperparameters.{name}", FIELD],
                    hint=f"leave {name} out",
                    code="adapter_does_not_fit",
                )


def find_adapter(storage: Storage, given: str, model: Manifest) -> Adapter:
    """The adapter of the earlier result `given`, `NAME`, `NAME@VERSION` or its path in `storage`, for the base `model`.

    Raises SpecError where there is no such model, where it holds no adapter, or one of another base.
    """
    manifest = get_manifest(storage, "model", _ref(storage, given), field=FIELD)
    if not manifest.details.get("adapter"):
        raise SpecError(
            f"{manifest.ref} holds no adapter to go on from",
            fields=[FIELD],
            hint=f"to tune it as it is, give it as the model: model={manifest.ref}",
            code="adapter_does_not_fit",
        )
    if manifest.base != model.ref:
        raise SpecError(
            f"{manifest.ref} is an adapter for {manifest.base}, not for {model.ref}",
            fields=["model", FIELD],
            hint=f"give its base as the model, model={manifest.base}, or leave finetuned_model out",
            code="adapter_does_not_fit",
        )
    config = json.loads(storage.get(f"{key(manifest.ref)}/adapter_config.json"))
    return Adapter(manifest.ref, config["r"], config["lora_alpha"])


def key(ref: str) -> str:
    """Where the adapter of the model `NAME@VERSION` lies in storage."""
    name, _, version = ref.partition("@")
    return f"{layout.asset_files('model', name, int(version))}/{FOLDER}"


def _ref(storage: Storage, given: str) -> str:
    """`NAME@VERSION` for a path `ROOT/models/NAME/VERSION…`; anything else as it is."""
    inside = given.removeprefix(f"{storage.url}/").split("/")
    if given.startswith(f"{storage.url}/") and len(inside) >= 3 and inside[0] == layout.ASSET_FOLDERS["model"]:
        return f"{inside[1]}@{inside[2]}"
    if "/" in given:
        raise SpecError(
            f"finetuned_model must be NAME@VERSION of a model, or its path below {storage.url}/models, got {given!r}",
            fields=[FIELD],
            hint="`tunesmith models list` shows those there are",
        )
    return given
