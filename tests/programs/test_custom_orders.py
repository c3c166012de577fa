"""Orders for training that the model brings: checked at the door by the model's own definitions."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_app.door import Door
from tests.support import galleries
from tests.support.door_fixture import error_of
from tests.support.stage import make_manifest
from tunesmith.assets.cards import read_card
from tunesmith.assets.catalog import publish
from tunesmith.assets.gallery import read_gallery
from tunesmith.assets.stored_files import describe_files
from tunesmith.cli import main
from tunesmith.jobs.spec import CustomJob, RegisterJob, TextJob, parse_job
from tunesmith.storage.base import Storage
from tunesmith.storage.folder import FolderStorage

ORDER = {"model": "table", "dataset": "pictures", "flavor": "cpu-small", "output_model": "tuned", "method": "full"}


@pytest.fixture
def models(storage: Storage, tmp_path: Path) -> None:
    """`table`, a custom model; `chat`, a text model with a gallery; and `pictures`, a dataset without any table."""
    publish_models(storage, tmp_path)


def publish_models(storage: Storage, folder: Path) -> None:
    gallery = read_gallery(galleries.make(folder / "table"), read_card(folder / "table"))
    assert gallery is not None
    files = describe_files(folder / "table")
    storage.upload_folder(folder / "table", "models/table/1/files")
    table = {"task_type": "tabular", "gallery": gallery, "language_model": False}
    publish(storage, make_manifest("model", "table", files=files, **table))
    publish(storage, make_manifest("model", "chat", task_type="text-generation", gallery=gallery, language_model=True))
    in_image = gallery.model_copy(update={"image_url": "registry/train:1"})
    publish(storage, make_manifest("model", "boxed", task_type="tabular", gallery=in_image, language_model=False))
    publish(storage, make_manifest("model", "stone", task_type="tabular", language_model=False))
    publish(storage, make_manifest("dataset", "pictures"))


def plan(client: TestClient, **changes: Any) -> TextJob | CustomJob:
    answer = client.post("/v1/plans", json={**ORDER, **changes})
    assert answer.status_code == 200, answer.text
    job = parse_job(answer.content)
    assert not isinstance(job, RegisterJob)
    return job


@pytest.mark.usefixtures("models")
def test_an_order_carries_the_methods_hyperparameters_filled_in(client: TestClient) -> None:
    job = plan(client, hyperparameters={"labels": "y", "max_epochs": 3}, advanced={"max_retries": 1}, cards=2)
    assert (job.training_type, job.method) == ("custom", "full")
    assert job.hyperparameters == {"lr": 0.001, "max_epochs": 3, "labels": "y"}
    assert job.advanced.model_dump() == {"max_retries": 1}
    assert plan(client, method="head").hyperparameters == {"frozen": True}
    assert parse_job(job.model_dump_json()) == job
    recorded = client.post("/v1/jobs", json={**ORDER, "hyperparameters": {"labels": "y"}}).json()
    assert recorded["job"]["training_type"] == "custom"


@pytest.mark.usefixtures("models")
def test_a_text_model_with_a_gallery_is_trained_either_way(client: TestClient) -> None:
    text = plan(client, model="chat", method=None, dataset="sums", hyperparameters={"max_steps": 3})
    assert isinstance(text, TextJob)
    assert (text.training_type, text.method, text.hyperparameters.lora_rank) == ("text-generation", "LoRA", 8)
    custom = plan(client, model="chat", training_type="custom", hyperparameters={"labels": "y"})
    assert isinstance(custom, CustomJob)
    assert (custom.method, "lora_rank" in custom.hyperparameters) == ("full", False)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("changes", "code", "field", "says"),
    [
        ({"method": None}, "unknown_method", "method", "no method is given"),
        ({"method": "LoRA"}, "unknown_method", "method", "there is no method 'LoRA'"),
        ({}, "missing_hyperparameter", "hyperparameters.labels", "needs labels"),
        ({"hyperparameters": {"label": "y"}}, "unknown_hyperparameter", "hyperparameters.label", "no hyperparameter"),
        ({"hyperparameters": {"labels": 1}}, "invalid_hyperparameter", "hyperparameters.labels", "must be of type str"),
        ({"advanced": {"packing": "on"}, "hyperparameters": {"labels": "y"}}, "not_for_custom", "advanced.packing", ""),
        ({"training_type": "text-generation"}, "training_type_not_allowed", "training_type", "allowed: custom"),
        ({"model": "stone"}, "not_trainable", "model", "the folder gallery_train/ is missing"),
        (
            {"model": "boxed", "hyperparameters": {"labels": "y"}},
            "no_podman",
            "model",
            "no node of the cluster has podman",
        ),
        ({"model": "boxed"}, "missing_hyperparameter", "hyperparameters.labels", "needs labels"),
        (
            {"model": "boxed", "training_type": "text-generation"},
            "training_type_not_allowed",
            "training_type",
            "custom",
        ),
        ({"model": "tiny", "training_type": "custom"}, "training_type_not_allowed", "training_type", "custom"),
        ({"model": "chat", "dataset": "sums"}, "unknown_method", "method", "is LoRA, got 'full'"),
    ],
)
def test_what_a_custom_order_may_not_ask_is_refused_at_the_door(
    client: TestClient, changes: dict[str, Any], code: str, field: str, says: str
) -> None:
    for path in ("/v1/plans", "/v1/jobs"):
        error = error_of(client.post(path, json={**ORDER, **changes}), 422, code)
        assert error["fields"] == [field]
        assert says in error["message"]
    assert client.get("/v1/jobs").json()["items"] == []


@pytest.mark.usefixtures("models")
def test_an_order_for_an_image_asks_for_nodes_with_podman(client: TestClient, door: Door) -> None:
    client.app.state.door = replace(door, capacity=lambda: {"CPU": 2.0, "podman": 1.0})  # type: ignore[attr-defined]
    job = plan(client, model="boxed", hyperparameters={"labels": "y"})
    assert (job.training_type, job.resources) == ("custom", {"CPU": 1.0, "podman": 0.001})
    assert plan(client, hyperparameters={"labels": "y"}).resources == {"CPU": 1.0}


@pytest.mark.usefixtures("models")
def test_a_model_is_shown_with_how_it_is_trained_and_what_its_data_must_be(client: TestClient) -> None:
    shown = client.get("/v1/models/table").json()
    assert (shown["training"]["default"], shown["training"]["others"]) == ("custom", [])
    assert [method["name"] for method in shown["gallery"]["methods"]] == ["full", "head"]
    assert client.get("/v1/models/chat").json()["training"]["others"] == ["text-question-answering", "custom"]
    assert "is missing" in client.get("/v1/models/stone").json()["training"]["reason"]
    assert client.get("/v1/models/tiny").json()["training"]["default"] == "text-question-answering"
    assert client.get("/v1/datasets/sums").json()["training"] is None
    answer = client.get("/v1/models/table@1/dataset-readme")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/markdown; charset=utf-8")
    assert answer.text == "# rows\n\nOne file, `行.csv`.\n"
    error_of(client.get("/v1/models/tiny/dataset-readme"), 404, "no_dataset_readme")
    error_of(client.get("/v1/models/none/dataset-readme"), 404, "unknown_model")


def test_render_writes_the_same_job_without_a_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    storage = FolderStorage(tmp_path / "home" / "storage")
    publish_models(storage, tmp_path)
    flags = ["--model", "table", "--dataset", "pictures", "--flavor", "cpu-small", "--output-model", "new"]
    given = ["--method", "full", "--set", "labels=y", "--set", "lr=2e-3", "--set", "note=", "-a", "max_retries=0"]
    with pytest.raises(SystemExit) as exit_:
        main(["jobs", "render", *flags, *given, "--json"])
    assert exit_.value.code == 0
    job = parse_job(storage.get(f"jobs/{json.loads(capsys.readouterr().out)['id']}/job.json"))
    assert isinstance(job, CustomJob)
    assert job.hyperparameters == {"lr": 0.002, "max_epochs": 10, "labels": "y"}
    assert job.advanced.model_dump() == {"max_retries": 0}
    with pytest.raises(SystemExit) as exit_:
        main(["jobs", "render", *flags, "--method", "full", "--set", "lable=y"])
    assert exit_.value.code == 2
    assert "did you mean labels?" in capsys.readouterr().err


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(exit_.value.code or 0), said.out + said.err


def test_check_says_what_a_registration_would_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = galleries.make(tmp_path / "model")
    code, said = run(capsys, "models", "check", folder)
    assert code == 0
    assert "custom (default)" in said
    assert "labels  str, required: column with the labels" in said
    (folder / "gallery_train" / "train_params.json").write_text('{"training_methods": [\n]}')
    code, said = run(capsys, "models", "check", folder)
    assert code == 2
    assert "gallery_train/train_params.json:1: training_methods: is empty" in said
    (folder / "README.md").unlink()
    code, said = run(capsys, "models", "check", folder)
    assert (code, "task type is not given" in said) == (2, True)
    assert run(capsys, "models", "check", tmp_path / "none")[0] == 2


def test_init_writes_a_folder_that_passes_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data, output = tmp_path / "line", tmp_path / "data", tmp_path / "output"
    assert run(capsys, "models", "init", folder)[0] == 0
    code, said = run(capsys, "models", "check", folder, "--json")
    assert (code, json.loads(said)["training"]["default"]) == (0, "custom")
    assert run(capsys, "models", "init", folder)[0] == 2, "what is there already is left alone"
    data.mkdir()
    output.mkdir()
    (data / "points.csv").write_text("x,y\n" + "".join(f"{x / 10},{3 * x / 10 + 1}\n" for x in range(-10, 11)))
    env = {
        **os.environ,
        "ENV_AG_MODEL_DIR": str(folder),
        "ENV_AG_DATASET_DIR": str(data),
        "ENV_AG_USER_PARAMS": json.dumps({"lr": 0.5, "max_epochs": 50}),
        "ENV_AG_TRAIN_OUTPUT_DIR": str(output),
        "ENV_AG_USER_METRICS_LOG_PATH": str(tmp_path / "metrics"),
        "ENV_AG_OUTPUT_RESTORED": "0",
    }
    subprocess.run([sys.executable, "train.py"], cwd=folder / "gallery_train", env=env, check=True, capture_output=True)
    a, b = json.loads((output / "checkpoint.json").read_text())["line"]
    assert (a, b) == pytest.approx((3, 1), abs=1e-2)
    assert len((tmp_path / "metrics").read_text().splitlines()) == 50
