"""Data that never changes, with one answer to fields that it does not know."""

import pkgutil
from importlib import import_module
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import tunesmith
from tunesmith.api.views import LogView
from tunesmith.frozen import Frozen, Tolerant
from tunesmith.jobs.spec import RegisterSpec


def models(kind: type[Any]) -> set[type[Any]]:
    return {kind} | {each for sub in kind.__subclasses__() for each in models(sub)}


def test_all_data_that_pydantic_checks_is_frozen() -> None:
    for module in pkgutil.walk_packages(tunesmith.__path__, "tunesmith."):
        if ".skeletons" not in module.name and ".migrations" not in module.name:
            import_module(module.name)
    ours = {kind for kind in models(BaseModel) if kind.__module__.startswith(("tunesmith.", "trainers.", "serve_app."))}
    assert len(ours) > 25
    assert {kind for kind in ours if not issubclass(kind, Frozen)} == set()
    assert {kind for kind in ours if not kind.model_config["frozen"]} == set()


def test_an_order_with_an_unknown_field_is_refused_and_an_answer_of_a_newer_door_is_read() -> None:
    with pytest.raises(ValidationError):
        RegisterSpec.model_validate({"asset": "model", "name": "m", "source": "/m", "sourc": "/n"})
    view = LogView.model_validate({"attempt": 1, "rank": "0", "text": "", "new": 1})
    assert issubclass(LogView, Tolerant)
    assert not hasattr(view, "new")
