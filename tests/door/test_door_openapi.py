"""The OpenAPI document makes a good client: names, examples, errors and descriptions."""

from typing import Any

from fastapi.testclient import TestClient

from tunesmith.jobs.spec import RegisterSpec, TrainSpec

OPERATIONS = {
    "create_job": "POST /v1/jobs",
    "list_jobs": "GET /v1/jobs",
    "get_job": "GET /v1/jobs/{job_id}",
    "stop_job": "POST /v1/jobs/{job_id}/stop",
    "delete_job": "DELETE /v1/jobs/{job_id}",
    "list_job_events": "GET /v1/jobs/{job_id}/events",
    "list_job_logs": "GET /v1/jobs/{job_id}/logs",
    "list_job_metrics": "GET /v1/jobs/{job_id}/metrics",
    "get_job_audit": "GET /v1/jobs/{job_id}/audit",
    "list_job_evaluations": "GET /v1/jobs/{job_id}/evaluations",
    "plan_job": "POST /v1/plans",
    "list_models": "GET /v1/models",
    "get_model": "GET /v1/models/{ref}",
    "get_dataset_readme": "GET /v1/models/{ref}/dataset-readme",
    "register_model": "POST /v1/models",
    "list_datasets": "GET /v1/datasets",
    "get_dataset": "GET /v1/datasets/{ref}",
    "register_dataset": "POST /v1/datasets",
    "list_flavors": "GET /v1/flavors",
    "get_health": "GET /healthz",
}


def operations(client: TestClient) -> dict[str, tuple[str, dict[str, Any]]]:
    paths = client.get("/openapi.json").json()["paths"]
    return {
        operation["operationId"]: (f"{method.upper()} {path}", operation)
        for path, methods in paths.items()
        for method, operation in methods.items()
    }


def test_the_openapi_document_names_every_operation(client: TestClient) -> None:
    assert {name: where for name, (where, _) in operations(client).items()} == OPERATIONS


def test_the_openapi_document_gives_errors_answers_and_security(client: TestClient) -> None:
    for name, (_, operation) in operations(client).items():
        assert len(operation["tags"]) == 1
        success = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
        assert "content" in success or name == "delete_job"
        if name == "get_health":
            continue
        assert operation["security"] == [{"HTTPBearer": []}]
        errors = {s: a for s, a in operation["responses"].items() if not s.startswith("2")}
        assert {"401", "500", "503"} <= set(errors)
        for answer in errors.values():
            assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


def test_every_post_body_has_examples_that_the_door_would_take(client: TestClient) -> None:
    kinds: dict[str, Any] = {"register_model": "model", "register_dataset": "dataset"}
    for name in ("create_job", "plan_job", *kinds):
        content = operations(client)[name][1]["requestBody"]["content"]["application/json"]
        assert content["examples"]
        for example in content["examples"].values():
            if name in kinds:
                RegisterSpec(asset=kinds[name], **example["value"])
            else:
                TrainSpec.model_validate(example["value"])


def test_fields_are_described_in_the_openapi_document(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["JobView"]["properties"]["output"]["description"].startswith("`NAME@VERSION`")
    assert "HTTPValidationError" not in schemas
