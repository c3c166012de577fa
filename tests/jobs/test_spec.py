"""Specs and flavors: what is given comes back checked, or refused with its name."""

import json

import pytest

from tests.support import tiny
from tunesmith.errors import ConflictError, SpecError
from tunesmith.jobs.flavors import get_flavor, load_flavors
from tunesmith.jobs.spec import RegisterSpec, TrainSpec, parse_job, parse_spec
from tunesmith.jobs.states import FINAL, MOVES, Change, Status, apply, replay

ORDER = {"model": "m@1", "dataset": "d@1", "flavor": "cpu-small", "output_model": "new"}


def test_a_spec_without_a_kind_is_an_order() -> None:
    spec = parse_spec(ORDER)
    assert isinstance(spec, TrainSpec)
    assert (spec.cards, spec.method) == (1, None)


def test_a_registration_is_a_spec_too() -> None:
    assert isinstance(parse_spec({"kind": "register", "asset": "model", "name": "m", "source": "/x"}), RegisterSpec)


def test_every_field_at_fault_is_named() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({**ORDER, "cards": 0, "flavour": "x"} | {"model": 3})
    assert sorted(caught.value.fields) == ["cards", "flavour", "model"]
    assert caught.value.hint == "did you mean flavor?"


@pytest.mark.parametrize("data", [None, [], "x", {"kind": "search"}])
def test_what_is_no_spec_is_refused(data: object) -> None:
    with pytest.raises(SpecError):
        parse_spec(data)


def test_an_unknown_flavor_names_those_there_are() -> None:
    with pytest.raises(SpecError) as caught:
        get_flavor("cpu-smal")
    assert caught.value.hint == "did you mean cpu-small?"
    assert "gpu-1" in caught.value.message


def test_a_flavor_asks_for_its_accelerator_by_rays_name() -> None:
    assert get_flavor("cpu-small").resources() == {"CPU": 1}
    assert get_flavor("gpu-1").resources() == {"CPU": 4, "GPU": 1}
    assert {flavor.accelerator for flavor in load_flavors().values()} == {"CPU", "GPU", "NPU"}


def test_only_the_legal_moves_are_made() -> None:
    for state, allowed in MOVES.items():
        for to in MOVES:
            if to in allowed:
                assert apply(Status(state=state), Change(state=to)).state == to
            elif to != state:
                with pytest.raises(ConflictError):
                    apply(Status(state=state), Change(state=to))
    assert frozenset({"completed", "failed", "stopped"}) == FINAL


def test_replaying_changes_gives_the_status() -> None:
    changes = [
        Change(state="queued"),
        Change(state="preparing", attempt=1),
        Change(phase="fetch"),
        Change(state="running"),
        Change(phase="train", message="step 1"),
        Change(state="failed", reason="data_error", message="no rows"),
    ]
    assert replay(changes) == Status("failed", None, "data_error", "no rows", 1)


def test_a_job_whose_hyperparameters_are_not_what_they_must_be_is_named_by_field() -> None:
    text = tiny.train_job(tiny.hyperparameters(), tiny.advanced()).model_dump_json()
    job = json.loads(text)
    assert (job["hyperparameters"]["lora_rank"], job["advanced"]["seed"]) == (4, 0)
    assert parse_job(text).model_dump_json() == text
    job["hyperparameters"]["lora_rank"], job["advanced"]["sed"] = "four", 1
    with pytest.raises(SpecError) as caught:
        parse_job(json.dumps(job))
    assert caught.value.fields == ["hyperparameters.lora_rank", "advanced.sed"]
