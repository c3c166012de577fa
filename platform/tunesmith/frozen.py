"""The base of all data that is checked by pydantic."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Data that never changes; a field that it does not know is an error."""

    # The docstrings of fields are their descriptions in the OpenAPI document.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
