"""`tunesmith datasets audit`: the report for people and for programs, with no front door."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.stage import publish_folder
from tunesmith.assets.catalog import Table
from tunesmith.cli import main
from tunesmith.jobs.audit_report import AuditReport
from tunesmith.settings import Settings
from tunesmith.storage.folder import FolderStorage

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command on an installation with a model `tiny` and a dataset `sums`."""
    for name in [name for name in os.environ if name.startswith("TUNESMITH_")]:
        monkeypatch.delenv(name)
    settings = Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})
    for name, text in {**settings.to_env(), "PYTHONPATH": os.pathsep.join(sys.path)}.items():
        monkeypatch.setenv(name, text)
    storage = FolderStorage(Path(settings.storage_url))
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.sums(40)))
    table = Table(format="jsonl", columns=["prompt", "response"], rows=40)
    publish_folder(storage, "model", "tiny", tmp_path / "model", task_type="text-question-answering")
    publish_folder(storage, "dataset", "sums", tmp_path / "data", tables={"train.jsonl": table})

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        return int(exit_.value.code or 0), *capsys.readouterr()

    return run


def test_people_see_rows_with_their_trained_part_marked_and_the_counts(run: Run) -> None:
    code, out, err = run("datasets", "audit", "sums", "--model", "tiny", "--set", "max_seq_length=64")
    assert (code, err) == (0, "")
    assert "<|user|>say b x<|end|>\n<|assistant|>⟦bb<|end|>⟧" in out
    assert "trained in 40 rows: <|end|>" in out
    assert "sums@1 can be trained on with tiny@1" in out


def test_programs_get_the_report(run: Run) -> None:
    code, out, _ = run("datasets", "audit", "sums", "--model", "tiny", "--rows", "10", "--json")
    report = AuditReport.model_validate_json(out)
    assert code == 0
    assert (report.model, report.dataset) == ("tiny@1", "sums@1")
    assert (report.counts.rows, report.checked, report.off) == (10, 10, 0)


def test_data_that_a_job_would_be_refused_for_ends_with_2(run: Run) -> None:
    code, out, _ = run("datasets", "audit", "sums", "--model", "tiny", "--set", "response_field=answer")
    assert code == 2
    assert out == ""


def test_an_unknown_dataset_is_told_as_the_door_tells_it(run: Run) -> None:
    code, _, err = run("datasets", "audit", "sum", "--model", "tiny")
    assert code == 2
    assert "there is no dataset 'sum'" in err
    assert "did you mean sums?" in err
