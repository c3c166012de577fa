"""Models, datasets and flavors at the door, and where files may be taken in from."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.support.door_fixture import error_of
from tests.support.stage import make_manifest
from tunesmith.api.views import JobView
from tunesmith.assets.catalog import publish
from tunesmith.storage.base import Storage


def test_models_and_datasets_are_shown_as_they_lie_in_storage(client: TestClient, storage: Storage) -> None:
    publish(storage, make_manifest("model", "tiny", 2, task_type="text-generation"))
    assert [item["ref"] for item in client.get("/v1/models").json()["items"]] == ["tiny@1", "tiny@2"]
    assert client.get("/v1/models/tiny").json()["version"] == 2
    assert client.get("/v1/models/tiny@1").json()["task_type"] == "text-question-answering"
    assert client.get("/v1/models?name=other").json() == {"items": [], "next": None}
    dataset = client.get("/v1/datasets/sums").json()
    assert dataset["tables"]["train.jsonl"]["columns"] == ["prompt", "response"]
    assert dataset["size_bytes"] == 3
    assert dataset["files_url"] == f"{storage.url}/datasets/sums/1/files"
    assert [item["ref"] for item in client.get("/v1/datasets?name=sums").json()["items"]] == ["sums@1"]


def test_flavors_and_health_are_told(client: TestClient) -> None:
    assert "cpu-small" in [flavor["name"] for flavor in client.get("/v1/flavors").json()["items"]]
    assert client.get("/healthz").json()["status"] == "ok"


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_a_registration_is_a_job_of_the_real_path(client: TestClient, tmp_path: Path, kind: str) -> None:
    (tmp_path / "data" / "real").mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "data" / "real")
    body = {"name": "thing", "source": f"{tmp_path}/data/link"}
    headers = {"Idempotency-Key": "k-1"}
    answer = client.post(f"/v1/{kind}", json=body, headers=headers)
    assert answer.status_code == 202
    job = JobView.model_validate(answer.json())
    assert (job.kind, job.output_kind, job.output) == ("register", kind.removesuffix("s"), "thing@1")
    assert job.job["source"] == str(tmp_path / "data" / "real")
    again = client.post(f"/v1/{kind}", json=body, headers=headers)
    assert (again.status_code, again.content) == (200, answer.content)


def test_a_source_must_be_there_and_below_an_import_root(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "data" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "data-2").mkdir()
    refusals = {
        f"{tmp_path}/data/none": "unknown_source",
        f"{tmp_path}/data/{'x' * 5000}": "invalid_spec",
        f"{tmp_path}/secret": "source_not_allowed",
        f"{tmp_path}/none": "source_not_allowed",
        f"{tmp_path}/data/../secret": "source_not_allowed",
        f"{tmp_path}/data/out": "source_not_allowed",
        f"{tmp_path}/data-2": "source_not_allowed",
        "data": "invalid_source",
        "": "invalid_source",
        "/\0": "invalid_spec",
        "http://example.com/x": "invalid_source",
        "s3://": "invalid_source",
    }
    for source, code in refusals.items():
        error = error_of(client.post("/v1/datasets", json={"name": "d", "source": source}), 422, code)
        assert error["fields"] == ["source"]
    for source in ("s3://bucket/some/prefix", "obs://bucket", f"file://{tmp_path}/data"):
        assert client.post("/v1/datasets", json={"name": "d", "source": source}).status_code == 202
