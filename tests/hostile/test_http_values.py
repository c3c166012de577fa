"""Every number and every text that comes in over HTTP has bounds; what is out of them is refused in the one shape."""

import json
import math
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from serve_app.door import Door
from tests.support.door_fixture import error_of
from tests.support.stage import SPEC, make_manifest
from tunesmith.assets.catalog import publish
from tunesmith.assets.gallery import Gallery
from tunesmith.assets.train_params import Method, Parameter
from tunesmith.bounds import MAX_DEPTH, MAX_WHOLE
from tunesmith.jobs.spec import TrainSpec
from tunesmith.records.record import Record

KEYWORDS = ("anyOf", "oneOf", "allOf")


def inputs(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schema of every parameter and every body, by where it is."""
    found: dict[str, dict[str, Any]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            where = f"{method.upper()} {path}"
            for parameter in operation.get("parameters", ()):
                found[f"{where} {parameter['in']} {parameter['name']}"] = parameter["schema"]
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                found[f"{where} {kind}"] = content["schema"]
    return found


def unbounded(schema: dict[str, Any], where: str, document: dict[str, Any]) -> list[str]:
    """What in a schema has no bounds: a number, a text, a list, or an object whose names are not listed."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return unbounded(document["components"]["schemas"][name], f"{where}.{name}", document)
    if "enum" in schema or "const" in schema:
        return []
    found = [each for key in KEYWORDS for part in schema.get(key, ()) for each in unbounded(part, where, document)]
    kind = schema.get("type")
    if kind in ("integer", "number") and not {"minimum", "maximum"} <= schema.keys():
        found.append(f"{where}: a number")
    if kind == "string" and "maxLength" not in schema:
        found.append(f"{where}: a text")
    if kind == "array":
        found += [] if "maxItems" in schema else [f"{where}: a list"]
        found += unbounded(schema["items"], f"{where}[]", document)
    if kind is None and not any(key in schema for key in KEYWORDS):
        found.append(f"{where}: anything")
    if kind == "object":
        for name, part in schema.get("properties", {}).items():
            found += unbounded(part, f"{where}.{name}", document)
        others = schema.get("additionalProperties", True)
        if others is not False:
            found += [] if "maxProperties" in schema else [f"{where}: an object of any names"]
            found += [f"{where}: any values"] if others is True else unbounded(others, f"{where}.*", document)
    return found


def test_every_number_and_every_text_that_comes_in_has_bounds(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas = inputs(document)
    assert len(schemas) > 25
    assert [each for where, schema in schemas.items() for each in unbounded(schema, where, document)] == []


def test_the_walk_finds_what_has_no_bounds() -> None:
    planted = {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0},
            "b": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "c": {"type": "array", "items": {"$ref": "#/components/schemas/D"}},
        },
    }
    document = {"components": {"schemas": {"D": {"type": "number"}}}}
    assert unbounded(planted, "x", document) == [
        "x.a: a number", "x.b: a text", "x.c: a list", "x.c[].D: a number",
        "x: an object of any names", "x: any values",
    ]  # fmt: skip


BIG = "9" * 401
LONG = "x" * 500_000
TEXTS = ("name", "model", "dataset", "training_type", "method", "flavor", "output_model")
RAW: dict[str, str] = {
    **{f"{field} of a megabyte": json.dumps({**SPEC, field: LONG}) for field in TEXTS},
    **{f"{field} with escapes": json.dumps({**SPEC, field: "a\x1b]0;x\x07"}) for field in TEXTS},
    "name with a new line": json.dumps({**SPEC, "name": "a\nERROR forged"}),
    "name turned around": json.dumps({**SPEC, "name": "a\u202egpj"}),
    **{f"{field} of 401 digits": json.dumps({**SPEC, field: 1}).replace(f'"{field}": 1', f'"{field}": {BIG}')
       for field in ("max_run_time_s", "cards", "priority")},
    "a time of 1e308": json.dumps({**SPEC, "max_run_time_s": 1e308}),
    "a time of 1e999": json.dumps({**SPEC, "max_run_time_s": 1}).replace('_s": 1', '_s": 1e999'),
    "a time of ten years": json.dumps({**SPEC, "max_run_time_s": 10 * 366 * 24 * 3600}),
    "a time that is no number": json.dumps({**SPEC, "max_run_time_s": float("nan")}),
    "cards without end": json.dumps({**SPEC, "cards": float("inf")}),
    "a number of 100,000 digits": f'{{"model": {"9" * 100_000}}}',
    "900 levels": json.dumps({**SPEC, "hyperparameters": 1}).replace(": 1", ": " + "[" * 900 + "]" * 900),
    "900 levels of objects": '{"a":' * 900 + "1" + "}" * 900,
    "33 levels": json.dumps({**SPEC, "hyperparameters": 1}).replace(": 1", ": " + "[" * 33 + "]" * 33),
    "100,000 levels": "[" * 100_000,
    "100,000 levels that end": "[" * 100_000 + "]" * 100_000,
    "100,000 names": json.dumps({**SPEC, **{f"n{n}": 1 for n in range(50_000)}}),
    "a name of a megabyte": json.dumps({**SPEC, LONG: 1}),
    "a name with escapes": json.dumps({**SPEC, "\x1b[2J": 1}),
    **{f"{section}: {what}": json.dumps({**SPEC, section: values})
       for section in ("hyperparameters", "advanced")
       for what, values in {
           "10,000 names": {f"n{n}": 1 for n in range(10_000)},
           "a long name": {LONG: 1},
           "a name with escapes": {"\x1b[2J": 1},
           "a long text": {"lr_scheduler_type": LONG},
           "a list": [1],
       }.items()},
    "a long prefix": json.dumps({**SPEC, "hyperparameters": {"prefix": "x" * 20_001}}),
    "a long column": json.dumps({**SPEC, "hyperparameters": {"prompt_field": "x" * 1001}}),
    "many modules": json.dumps({**SPEC, "advanced": {"target_modules": "x," * 3000}}),
    "a seed of 2^63": json.dumps({**SPEC, "advanced": {"seed": 2**63}}),
    "a rate of 1e308": json.dumps({**SPEC, "hyperparameters": {"learning_rate": 1e308}}),
}  # fmt: skip


@pytest.mark.parametrize("body", RAW.values(), ids=RAW)
def test_an_order_out_of_all_bounds_is_refused_and_leaves_nothing(client: TestClient, door: Door, body: str) -> None:
    for path in ("/v1/jobs", "/v1/plans"):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        error = error_of(answer, answer.status_code, answer.json()["error"]["code"])
        assert 400 <= answer.status_code < 500, answer.text
        assert len(answer.content) < 20_000
        assert not any(ord(character) < 32 for character in error["message"])
    assert records(door) == []


def records(door: Door) -> list[Record]:
    return list(door.store.page(kind=None, states=(), limit=10, after=None))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/datasets"])
@pytest.mark.parametrize(
    "given",
    [
        {"source": LONG}, {"source": "/x\n/y"}, {"source": "s3://b/../x"}, {"source": "s3://b/a//b"},
        {"source": "s3://b/\x1b[2J"}, {"source": "obs://b/./x"}, {"name": LONG}, {"name": "a\x00"}, {"source": 10**300},
        {"source": "s3://b/" + "x" * 2000}, {"source": "s3://b/a\\b"},
    ],
)  # fmt: skip
def test_a_registration_out_of_all_bounds_is_refused(
    client: TestClient, door: Door, path: str, given: dict[str, Any]
) -> None:
    answer = client.post(path, json={"name": "d", "source": "s3://b/x", **given})
    assert answer.status_code in (400, 422) and len(answer.content) < 20_000
    assert records(door) == []


PARAMETERS = [
    "/v1/jobs?limit=" + "9" * 400, "/v1/jobs?limit=1e3", "/v1/jobs?limit=-1", "/v1/jobs?after=" + "x" * 5000,
    "/v1/jobs?" + "&".join(["state=failed"] * 500), "/v1/jobs/" + "x" * 5000, "/v1/models/" + "x" * 5000,
    "/v1/datasets?name=" + "x" * 5000, "/v1/jobs/a/events?after=" + "9" * 400, "/v1/jobs/a/events?after=-1",
    "/v1/jobs/a/events?limit=1e308", "/v1/jobs/a/logs?after=" + "1" * 5000, "/v1/jobs/a/logs?rank=" + "1" * 5000,
    "/v1/jobs/a/metrics?" + "&".join(["name=x"] * 500), "/v1/jobs/a/metrics?name=" + "x" * 5000,
    "/v1/jobs/a/evaluations?after=" + "9" * 30, "/v1/jobs/a/evaluations?limit=nan",
]  # fmt: skip


@pytest.mark.parametrize("path", PARAMETERS, ids=[path[:40] for path in PARAMETERS])
def test_a_parameter_out_of_all_bounds_is_refused(client: TestClient, path: str) -> None:
    answer = client.get(path)
    error_of(answer, 422, "invalid_spec")
    assert len(answer.content) < 5000


@pytest.mark.parametrize("key", ["x" * 256, "a b", "a\tb", "\x7f", ""])
def test_an_idempotency_key_out_of_bounds_is_refused(client: TestClient, door: Door, key: str) -> None:
    answer = client.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": key})
    error_of(answer, 422, "invalid_idempotency_key")
    assert records(door) == []


@pytest.mark.parametrize("path", ["/v1/jobs/%1b%5b2J", "/v1/models/%0aERROR", "/v1/" + "x" * 5000])
def test_what_was_asked_for_is_quoted_as_it_may_be_shown(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert 400 <= answer.status_code < 500 and len(answer.content) < 5000
    assert not any(ord(character) < 32 for character in answer.json()["error"]["message"])


@pytest.mark.parametrize("value", [MAX_WHOLE + 1, -MAX_WHOLE - 1, math.inf, "x" * 100_001])
def test_a_value_is_out_of_bounds_before_anybody_knows_its_name(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"must be a whole number|must be a finite|has 100001 characters"):
        TrainSpec.model_validate({**SPEC, "hyperparameters": {"whatever": value}})


CUSTOM = {
    "n": [MAX_WHOLE + 1, -MAX_WHOLE - 2, 10**39, 1.5], "x": [10**39, "1"], "t": ["x" * 100_001, 1, "\ud800"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CUSTOM.items() for value in values])
def test_a_hyperparameter_of_a_models_own_has_bounds_too(client: TestClient, door: Door, name: str, value: Any) -> None:
    kinds = (("n", "int"), ("x", "float"), ("t", "str"))
    parameters = [Parameter.model_validate({"name": name, "type": kind}) for name, kind in kinds]
    gallery = Gallery(methods=[Method(name="full", hyperparameters=parameters)])
    publish(door.storage, make_manifest("model", "own", task_type="other", gallery=gallery, language_model=False))
    order = {**SPEC, "model": "own", "hyperparameters": {name: value}}
    answer = client.post("/v1/jobs", content=json.dumps(order), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and len(answer.content) < 5000, answer.text
    assert records(door) == []


def test_what_lies_within_the_bounds_is_taken(client: TestClient) -> None:
    """The bounds keep out nothing that somebody needs."""
    nested = {**SPEC, "name": "训练 第一次 " + "x" * 200, "max_run_time_s": 30 * 24 * 3600}
    nested["hyperparameters"] = {**SPEC["hyperparameters"], "prefix": "你好\n\t" * 1000}
    assert client.post("/v1/jobs", json=nested).status_code == 201
    assert MAX_DEPTH > 10


UNREAD = {
    "33 levels": '{"a":' * 16 + "[" * 17 + "]" * 17 + "}" * 16,
    "900 levels": "[" * 900 + "]" * 900,
    "100,000 levels": "[" * 100_000 + "]" * 100_000,
    "NaN": '{"cards": NaN}',
    "Infinity": '{"cards": -Infinity}',
    "1e999": '{"cards": 1e999}',
    "401 digits": f'{{"cards": {BIG}}}',
    "100,000 digits": f'{{"cards": {"9" * 100_000}}}',
    "no UTF-8": b'{"name": "\xff"}',
    "UTF-16": '{"name": "x"}'.encode("utf-16"),
}


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/plans", "/v1/models", "/v1/datasets"])
@pytest.mark.parametrize("body", UNREAD.values(), ids=UNREAD)
def test_a_body_that_is_no_plain_json_is_not_read_any_further(client: TestClient, path: str, body: str | bytes) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    error = error_of(answer, 400, "invalid_json")
    assert len(error["message"]) < 200
