"""The bases of all data that is checked by pydantic."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Data that never changes; a field that it does not know is an error."""

    # The docstrings of fields are their descriptions in the OpenAPI document.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Tolerant(Frozen):
    """Frozen data that a process of another version may have written: a field that it does not know is left out."""

    model_config = ConfigDict(extra="ignore")
