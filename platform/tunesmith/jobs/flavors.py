"""Flavors: what one worker gets, and how that maps to Ray's resources."""

from __future__ import annotations

from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import Field

from tunesmith.assets.located_yaml import read_yaml
from tunesmith.errors import SpecError, nearest
from tunesmith.frozen import Frozen


class Flavor(Frozen):
    """One worker's share of a cluster."""

    name: str
    accelerator: Literal["CPU", "GPU", "NPU"]
    cpus: int = Field(ge=1)
    memory_gib: int = Field(ge=1)
    region: str
    price_per_hour: Decimal = Field(ge=0)
    """Price of one card for one hour."""

    def resources(self) -> dict[str, float]:
        """Ray resources of one worker."""
        per_worker: dict[str, float] = {"CPU": self.cpus}
        if self.accelerator != "CPU":
            per_worker[self.accelerator] = 1
        return per_worker


@cache
def load_flavors() -> dict[str, Flavor]:
    """All flavors of the platform, by name, from `cluster_configs/flavors.yaml`."""
    rows = read_yaml(files("cluster_configs").joinpath("flavors.yaml").read_text(encoding="utf-8")).value
    return {flavor.name: flavor for flavor in map(Flavor.model_validate, rows)}


def get_flavor(name: str) -> Flavor:
    """The flavor called `name`; SpecError names those that exist."""
    flavors = load_flavors()
    if name not in flavors:
        raise SpecError(
            f"there is no flavor {name!r}; there are {', '.join(flavors)}",
            fields=["flavor"],
            hint=nearest(name, flavors),
            code="unknown_flavor",
        )
    return flavors[name]
