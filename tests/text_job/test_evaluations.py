"""What a job trains and how its model did, from the job's folder to the API and the command line."""

import math
from pathlib import Path

import pytest

from tests.support.live_door import LiveDoor
from tests.support.stage import SPEC
from tunesmith.api.client import Client
from tunesmith.cli import main
from tunesmith.errors import NotFoundError
from tunesmith.jobs.audit_report import AuditCounts, AuditReport
from tunesmith.jobs.evaluation_record import Answer, Evaluation
from tunesmith.jobs.spec import TrainSpec
from tunesmith.jobs.stored_reports import read_evaluations
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.folder import FolderStorage


def put(storage: Storage, job_id: str, attempt: int, step: int, *, answer: str = "no", loss: float = 2.0) -> Evaluation:
    answers = [Answer(prompt=f"[red]ask {row}", expected=f"yes {row}", answer=f"{answer} {row}") for row in range(9)]
    made = Evaluation(
        step=step, rows=50, loss=loss, perplexity=math.exp(loss), scores={"bleu": 12.5, "rouge1": 50.0}, answers=answers
    )
    storage.put(layout.evaluation(job_id, attempt, step), made.model_dump_json().encode())
    return made


def test_evaluations_are_read_by_step_and_of_those_made_again_the_newest(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    assert read_evaluations(storage, "job-1") == []
    first = [put(storage, "job-1", 2, step, answer="second") for step in (9, 100)]
    put(storage, "job-1", 2, 1000)
    newest = put(storage, "job-1", 10, 1000, answer="tenth")
    before = put(storage, "job-1", 1, 0, loss=float("nan"))
    made = read_evaluations(storage, "job-1")
    assert made[1:] == [*first, newest]
    assert (made[0].step, math.isnan(made[0].loss), made[0].answers) == (0, True, before.answers)
    assert read_evaluations(storage, "job-1", after=0, limit=2) == first


@pytest.fixture
def client(live_door: LiveDoor, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("TUNESMITH_HOME", str(live_door.settings.home))
    monkeypatch.setenv("TUNESMITH_PORT", str(live_door.settings.port))
    return Client(live_door.url, live_door.token)


def test_the_api_pages_evaluations(live_door: LiveDoor, client: Client) -> None:
    job_id = client.submit(TrainSpec.model_validate(SPEC)).id
    assert client.evaluations(job_id).items == []
    made = [put(live_door.storage, job_id, 1, step) for step in range(30)]
    page = client.evaluations(job_id)
    assert (page.items, page.next) == (made[:20], "19")
    rest = client.evaluations(job_id, after=page.next)
    assert (rest.items, rest.next) == (made[20:], "29")
    assert client.evaluations(job_id, after="29").model_dump() == {"items": [], "next": "29"}
    with pytest.raises(NotFoundError, match="job-none"):
        client.evaluations("job-none")


def test_the_command_line_shows_scores_and_answers_side_by_side(
    live_door: LiveDoor, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = client.submit(TrainSpec.model_validate(SPEC)).id
    put(live_door.storage, job_id, 1, 0, loss=3.0)
    put(live_door.storage, job_id, 1, 20, answer="yes", loss=1.0)
    with pytest.raises(SystemExit) as ended:
        main(["jobs", "evaluations", job_id, "--rows", "2"])
    shown = capsys.readouterr().out
    assert not ended.value.code
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["STEP", "LOSS", "PERPLEXITY", "BLEU", "ROUGE1"]
    assert lines[1:3] == [["0", "3.0000", "20.09", "12.5", "50.0"], ["20", "1.0000", "2.718", "12.5", "50.0"]]
    row = next(line for line in shown.splitlines() if "ask 1" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["[red]ask 1", "yes 1", "no 1", "yes 1"]
    assert "ask 2" not in shown


def test_the_audit_of_a_job_is_that_of_its_newest_attempt(
    live_door: LiveDoor, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = client.submit(TrainSpec.model_validate(SPEC)).id
    with pytest.raises(NotFoundError) as caught:
        client.audit(job_id)
    assert caught.value.code == "no_audit"
    for attempt, rows in ((2, 5), (10, 1234)):
        counts = AuditCounts(read=rows, rows=rows, lengths={64: rows})
        report = AuditReport(
            model="tiny@1", dataset="sums@1", counts=counts, checked=5, off=0, merged=0, ends=[], findings=[], rows=[]
        )
        live_door.storage.put(layout.audit(job_id, attempt), report.model_dump_json().encode())
    assert client.audit(job_id) == report
    with pytest.raises(SystemExit):
        main(["jobs", "audit", job_id])
    shown = capsys.readouterr().out
    assert "1,234 of 1,234 read" in shown and "sums@1 can be trained on with tiny@1" in shown
