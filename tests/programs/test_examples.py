"""The examples of custom models pass the check, and train to something on a platform that runs."""

import json
from pathlib import Path

import pytest

from examples.topics.__main__ import make as make_topics
from tests.support import jobs
from tests.support.publishing import files_key, publish
from tests.support.ray_fixture import Running
from tunesmith.assets.model_folder import read_model_folder
from tunesmith.jobs.spec import TrainSpec

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("folder", sorted(path.parent for path in EXAMPLES.glob("*/model")), ids=lambda path: path.name)
def test_an_example_is_a_valid_model(folder: Path) -> None:
    gallery = read_model_folder(folder / "model").gallery
    assert gallery is not None
    assert gallery.problems == []
    assert gallery.methods


@pytest.mark.ray
def test_spirals_are_told_apart_by_two_workers_as_by_one(platform: Running) -> None:
    client, folder = platform.client, EXAMPLES / "spirals"
    publish(platform, "model", "spirals", folder / "model")
    publish(platform, "dataset", "spirals", folder / "data")
    order = {"model": "spirals", "dataset": "spirals", "flavor": "cpu-small", "output_model": "told-apart"}
    curves = []
    for cards in (1, 2):
        ended = client.wait(client.submit(TrainSpec.model_validate({**order, "cards": cards})).id)
        assert ended.state == "completed", (ended, jobs.log(platform, ended.id, "0"))
        key = f"{files_key(platform.storage, ended.output)}/accuracy.json"
        assert json.loads(platform.storage.get(key))["accuracy"] > 0.95
        curves.append({line.step: line.value for line in jobs.metrics(platform, ended.id, "loss")})
    assert len(curves[0]) == 200
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)


@pytest.mark.ray
def test_a_pretrained_encoder_becomes_a_classifier(platform: Running, tmp_path: Path) -> None:
    client = platform.client
    publish(platform, "model", "topics", make_topics(tmp_path / "model"))
    publish(platform, "dataset", "topics", EXAMPLES / "topics" / "data")
    view = client.model("topics")
    assert (view.training and view.training.allowed) == ["custom"], "an encoder is no causal language model"
    order = {"model": "topics", "dataset": "topics", "flavor": "cpu-small", "output_model": "sorted", "method": "full"}
    ended = client.wait(client.submit(TrainSpec.model_validate({**order, "hyperparameters": {"epochs": 2}})).id)
    assert ended.state == "completed", (ended, jobs.log(platform, ended.id, "0"))
    report = json.loads(platform.storage.get(f"{files_key(platform.storage, 'sorted')}/accuracy.json"))
    assert report["accuracy"] > 0.9 > report["accuracy_before"]
    files = {file.path: file.sha256 for file in client.model("sorted").files}
    base = {file.path: file.sha256 for file in view.files}
    assert files["model.safetensors"] != base["model.safetensors"]
    assert files["gallery_train/train.py"] == base["gallery_train/train.py"]
