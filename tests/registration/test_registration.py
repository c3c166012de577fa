"""A registration takes in what a job can rely on, refuses the rest with its reason, and publishes once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import galleries, tiny
from trainers.driver import drive
from tunesmith.assets import catalog
from tunesmith.assets.training_types import TEXT_TYPES
from tunesmith.clock import utc_text
from tunesmith.errors import SpecError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Claim, Result
from tunesmith.jobs.drafting import draft, new_job_id
from tunesmith.jobs.spec import parse_spec
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.folder import FolderStorage

CARD = "---\ntask_type: text-question-answering\nlicense: apache-2.0\n---\n# tiny\n"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return FolderStorage(Path(settings.storage_url))


@pytest.fixture(scope="module")
def model_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.make_model(tmp_path_factory.mktemp("source") / "model")
    (folder / "README.md").write_text(CARD)
    return folder


def order(storage: Storage, settings: Settings, asset: str, source: Path | str, **given: Any) -> str:
    """Render a registration's job.json; its id."""
    spec = parse_spec({"kind": "register", "asset": asset, "name": "tiny", "source": str(source), **given})
    job_id = new_job_id()
    job = draft(spec, storage=storage, account="operator", job_id=job_id, created_at=utc_text())
    storage.put(layout.job_json(job_id), job.model_dump_json().encode())
    return job_id


def register(storage: Storage, settings: Settings, asset: str, source: Path | str, **given: Any) -> Result:
    job_id = order(storage, settings, asset, source, **given)
    code = drive(layout.join(storage.url, layout.job_json(job_id)), 1, settings)
    result = attempts.read_result(storage, job_id, 1)
    assert result is not None
    assert code == (0 if result.outcome == "completed" else 1)
    return result


def test_a_dataset_is_described_file_by_file(storage: Storage, settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"q": "1", "r": "2"}\n{"q": "3", "r": "4"}\n')
    (folder / "b.csv").write_text("q,r\n1,2\n")
    (folder / "notes.txt").write_text("kept, not trained on")
    assert register(storage, settings, "dataset", folder).outcome == "completed"
    manifest = catalog.get_manifest(storage, "dataset", "tiny")
    assert {path: (table.columns, table.rows) for path, table in manifest.tables.items()} == {
        "a.jsonl": (["q", "r"], 2),
        "b.csv": (["q", "r"], 1),
    }
    assert [file.path for file in manifest.files] == ["a.jsonl", "b.csv", "notes.txt"]
    assert storage.get(f"{manifest.stored.prefix}/b.csv") == b"q,r\n1,2\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"q": 1}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"q": "\xff"}\n', "not UTF-8"),
        ("a.json", b'{"q": 1}', "holds an array"),
        ("a.parquet", b"PAR0", "not parquet"),
        ("a.csv", b"q,r\n1\n", "not as many cells"),
        ("a.jsonl", b"", "has no row"),
        ("a.txt", b"x", "no data file"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(
    storage: Storage, settings: Settings, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    result = register(storage, settings, "dataset", tmp_path / name)
    assert (result.outcome, result.reason) == ("failed", "data_error")
    assert says in (result.message or "")
    assert catalog.list_manifests(storage, "dataset") == []


def test_a_link_in_a_source_is_refused(storage: Storage, settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to("/etc/passwd")
    assert "is a link" in (register(storage, settings, "dataset", folder).message or "")


def test_a_model_is_loaded_and_described(storage: Storage, settings: Settings, model_source: Path) -> None:
    assert register(storage, settings, "model", model_source).outcome == "completed"
    manifest = catalog.get_manifest(storage, "model", "tiny")
    assert (manifest.task_type, manifest.license) == ("text-question-answering", "apache-2.0")
    assert manifest.details["architecture"] == "LlamaForCausalLM"
    assert manifest.details["chat_template"] is True


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _half_the_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without("config.json"), "no config.json"),
        (_without("tokenizer.json"), "no tokenizer.json"),
        (_without("model.safetensors"), "does not load"),
        (_half_the_weights, "does not load"),
        (_another_shape, "do not fit config.json"),
        (_pickled, "does not load"),
        (_without("README.md"), "task type is not given"),
    ],
)
def test_a_model_that_does_not_load_is_refused(
    storage: Storage, settings: Settings, model_source: Path, tmp_path: Path, spoil: Any, says: str
) -> None:
    folder = shutil.copytree(model_source, tmp_path / "model")
    spoil(folder)
    result = register(storage, settings, "model", folder)
    assert (result.outcome, result.reason) == ("failed", "user_error")
    assert says in (result.message or "")
    assert catalog.list_manifests(storage, "model") == []


def test_a_second_start_of_an_attempt_does_nothing(storage: Storage, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n')
    job_id = order(storage, settings, "dataset", tmp_path / "a.jsonl")
    assert attempts.claim(storage, job_id, 1, Claim(submission_id=None, time=utc_text()))
    before = [entry.key for entry in storage.entries()]
    assert drive(layout.join(storage.url, layout.job_json(job_id)), 1, settings) == 0
    assert [entry.key for entry in storage.entries()] == before


def test_an_attempt_after_the_publication_ends_well_and_publishes_nothing(
    storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n')
    job_id = order(storage, settings, "dataset", tmp_path / "a.jsonl")
    url = layout.join(storage.url, layout.job_json(job_id))
    assert drive(url, 1, settings) == 0
    manifest = storage.get("datasets/tiny/1/manifest.json")
    (tmp_path / "a.jsonl").write_text('{"q": 2}\n')
    assert drive(url, 2, settings) == 0
    assert storage.get("datasets/tiny/1/manifest.json") == manifest


def test_a_job_whose_version_another_has_published_ends_before_it_works(
    storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n')
    first, second = (order(storage, settings, "dataset", tmp_path / "a.jsonl") for _ in range(2))
    assert drive(layout.join(storage.url, layout.job_json(first)), 1, settings) == 0
    assert drive(layout.join(storage.url, layout.job_json(second)), 1, settings) == 1
    result = attempts.read_result(storage, second, 1)
    assert result is not None
    assert (result.reason, result.message) == (
        "user_error",
        f"dataset tiny@1 was published already, by job {first}; "
        "order or render the job again: it gets a version of its own",
    )


def test_a_copied_job_json_is_refused(storage: Storage, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n')
    job_id = order(storage, settings, "dataset", tmp_path / "a.jsonl")
    storage.put("jobs/other/job.json", storage.get(layout.job_json(job_id)))
    with pytest.raises(SpecError, match="not of other"):
        drive(layout.join(storage.url, layout.job_json("other")), 1, settings)


def test_a_custom_model_is_taken_with_what_it_allows(storage: Storage, settings: Settings, tmp_path: Path) -> None:
    assert register(storage, settings, "model", galleries.make(tmp_path / "model")).outcome == "completed"
    manifest = catalog.get_manifest(storage, "model", "tiny")
    assert (manifest.task_type, manifest.license, manifest.language_model) == ("tabular", "mit", False)
    assert manifest.training.allowed == ["custom"]
    assert manifest.gallery is not None
    assert [method.name for method in manifest.gallery.methods] == ["full", "head"]
    assert storage.exists(f"{manifest.stored.prefix}/gallery_train/train.py")


def test_a_custom_model_has_the_text_types_only_where_its_files_are_a_language_model(
    storage: Storage, settings: Settings, model_source: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_source, tmp_path / "model")
    (folder / "README.md").unlink()
    galleries.make(folder)
    register(storage, settings, "model", folder)
    assert catalog.get_manifest(storage, "model", "tiny").training.allowed == ["custom", *TEXT_TYPES]
    _half_the_weights(folder)
    assert register(storage, settings, "model", folder).outcome == "completed"
    assert catalog.get_manifest(storage, "model", "tiny").training.allowed == ["custom"]


def test_a_model_that_nothing_can_train_is_taken_and_says_why(
    storage: Storage, settings: Settings, tmp_path: Path
) -> None:
    folder = galleries.make(tmp_path / "model")
    (folder / "gallery_train" / "train.py").unlink()
    result = register(storage, settings, "model", folder)
    assert result.outcome == "completed"
    assert "gallery_train/train.py is missing" in (result.message or "")
    manifest = catalog.get_manifest(storage, "model", "tiny")
    assert (manifest.training.default, manifest.training.reason is None) == (None, False)


def test_a_text_model_with_a_broken_gallery_keeps_its_text_types(
    storage: Storage, settings: Settings, model_source: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_source, tmp_path / "model")
    (folder / "gallery_train").mkdir()
    assert register(storage, settings, "model", folder).outcome == "completed"
    types = catalog.get_manifest(storage, "model", "tiny").training
    assert types.allowed == list(TEXT_TYPES)
    assert "gallery_train/train_params.json is missing" in (types.reason or "")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(_without("tokenizer.json"), "no tokenizer.json"), (_without("README.md"), "task type is not given")],
)
def test_a_model_is_refused_by_its_names_before_its_weights_are_copied(
    storage: Storage,
    settings: Settings,
    model_source: Path,
    tmp_path: Path,
    spoil: Any,
    says: str,
) -> None:
    folder = shutil.copytree(model_source, tmp_path / "model")
    spoil(folder)
    os.truncate(folder / "model.safetensors", 1 << 38)
    result = register(storage, settings, "model", folder)
    assert (result.outcome, says in (result.message or "")) == ("failed", True), result


def test_a_registration_that_is_to_stop_does(storage: Storage, settings: Settings, model_source: Path) -> None:
    job_id = order(storage, settings, "model", model_source)
    attempts.request_stop(storage, job_id)
    assert drive(layout.join(storage.url, layout.job_json(job_id)), 1, settings) == 0
    result = attempts.read_result(storage, job_id, 1)
    assert result is not None
    assert (result.outcome, result.reason) == ("stopped", "stopped_by_user")
    assert catalog.list_manifests(storage, "model") == []


def test_whoever_checks_a_model_loads_no_torch_for_it(model_source: Path, tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
import trainers.programs.gang, trainers.registration.registration
from trainers.registration.model_check import check_language_model
from tunesmith.settings import Settings
settings = Settings.from_env({{"TUNESMITH_HOME": {str(tmp_path / "home")!r}}})
print(check_language_model(pathlib.Path({str(model_source)!r}), settings=settings)["architecture"])
print({{"torch", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LlamaForCausalLM", "set()"]


def test_a_model_whose_index_names_files_outside_is_refused_and_publishes_nothing(
    storage: Storage, settings: Settings, model_source: Path, tmp_path: Path
) -> None:
    """The weights would be those of another folder of the node."""
    folder = Path(shutil.copytree(model_source, tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "other.safetensors").write_bytes(b"")
    result = register(storage, settings, "model", folder)
    assert (result.outcome, result.reason) == ("failed", "user_error")
    assert result.message is not None
    assert "model.safetensors.index.json: weight_map of lm_head.weight names '../model-00001" in result.message
    assert list(storage.entries("models")) == []
