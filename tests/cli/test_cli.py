"""The command line: tables for people, JSON and exit codes for programs, errors that say what to do."""

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from ruamel.yaml import YAML

from tests.support.live_door import LiveDoor, Run, figure
from tests.support.stage import SPEC, make_manifest
from tunesmith import __version__
from tunesmith.api.client import Client
from tunesmith.api.views import EventView
from tunesmith.assets.catalog import publish
from tunesmith.cli.progress import Course, show_progress
from tunesmith.hyperparameters.definitions import SECTIONS
from tunesmith.hyperparameters.field import definitions
from tunesmith.jobs.spec import TrainSpec, parse_job
from tunesmith.jobs.states import Change

ORDER = TrainSpec.model_validate(SPEC)
FLAGS = ["--model", "tiny", "--dataset", "sums", "--flavor", "cpu-small", "--output-model", "tuned"]


@pytest.fixture
def client(live_door: LiveDoor) -> Client:
    return Client(live_door.url, live_door.token)


@pytest.fixture
def order(tmp_path: Path) -> Path:
    path = tmp_path / "order.yaml"
    YAML(typ="safe").dump(SPEC, path)
    return path


def finished(client: Client, live_door: LiveDoor, state: str = "completed", **options: str) -> str:
    """A job with events, metrics and a log that ended in `state`."""
    job_id = client.submit(ORDER).id
    live_door.run(job_id)
    live_door.measure(job_id, 1, *(figure(step, value=3 - step / 2) for step in (1, 2, 3, 4)), figure(4, "rss", rank=0))
    live_door.log(job_id, 1, "[bold]loading[/bold]\n")
    live_door.log(job_id, 2, "training\n")
    live_door.end(job_id, state, **options)
    return job_id


def test_help_says_the_exit_codes_and_needs_nothing_heavy() -> None:
    light = """
import atexit, sys
atexit.register(lambda: print("HEAVY", {"ray", "sqlalchemy", "boto3", "httpx", "pydantic"} & set(sys.modules)))
from tunesmith.cli import main
main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, timeout=60, check=True)
    assert "HEAVY set()" in done.stdout
    words = " ".join(done.stdout.split())
    assert "0 done; 1 the job ended failed" in words
    assert "4 the followed job was stopped; 130 interrupted" in words


def test_every_command_explains_itself(run: Run) -> None:
    commands = ["up", "down", "status", "version", "hyperparameters", "flavors list"]
    commands += [f"{kind} {what}" for kind in ("models", "datasets") for what in ("list", "show", "register")]
    jobs = "submit render list show watch events logs metrics audit evaluations stop delete"
    for command in [*commands, *(f"jobs {what}" for what in jobs.split())]:
        done = run(*command.split(), "--help")
        assert done.code == 0
        assert "Usage" in done.out


def test_the_version_is_printed(run: Run) -> None:
    assert run("version").out == f"{__version__}\n"


def test_reading_commands_print_the_apis_json_and_nothing_else(run: Run, live_door: LiveDoor, client: Client) -> None:
    job_id = finished(client, live_door)
    routes = {
        "models list": "/v1/models",
        "models show tiny": "/v1/models/tiny",
        "datasets list": "/v1/datasets",
        "datasets show sums@1": "/v1/datasets/sums@1",
        "flavors list": "/v1/flavors",
        "jobs list": "/v1/jobs",
        "jobs list --state completed --kind train --limit 1": "/v1/jobs?state=completed&kind=train&limit=1",
        f"jobs show {job_id}": f"/v1/jobs/{job_id}",
        f"jobs events {job_id}": f"/v1/jobs/{job_id}/events",
        f"jobs logs {job_id}": f"/v1/jobs/{job_id}/logs",
        f"jobs metrics {job_id}": f"/v1/jobs/{job_id}/metrics",
        f"jobs metrics {job_id} --name loss": f"/v1/jobs/{job_id}/metrics?name=loss",
        f"jobs evaluations {job_id}": f"/v1/jobs/{job_id}/evaluations",
        f"jobs stop {job_id}": f"/v1/jobs/{job_id}",
        f"jobs watch {job_id}": f"/v1/jobs/{job_id}",
    }
    headers = {"Authorization": f"Bearer {live_door.token}"}
    for command, route in routes.items():
        done = run(*command.split(), "--json")
        assert done.code == 0, done.err
        assert done.json == httpx.get(live_door.url + route, headers=headers).json(), command


def test_following_prints_a_json_line_each(run: Run, live_door: LiveDoor, client: Client) -> None:
    job_id = finished(client, live_door)
    for what, count in (("events", 5), ("metrics", 5), ("logs", 2)):
        lines = run("jobs", what, job_id, "--follow", "--json").out.splitlines()
        assert len([json.loads(line) for line in lines]) == count


def test_tables_show_what_there_is(run: Run, live_door: LiveDoor, client: Client) -> None:
    job_id = finished(client, live_door)
    assert "tiny@1" in run("models", "list").out
    assert "train.jsonl" in run("datasets", "show", "sums").out
    assert "cpu-small" in run("flavors", "list").out
    assert job_id in run("jobs", "list").out
    shown = " ".join(run("jobs", "show", job_id).out.split())
    assert "state completed" in shown and "max_steps 3 (default absent)" in shown
    events = run("jobs", "events", job_id).out
    assert len(events.splitlines()) == 5 and "running [train]" in events
    metrics = run("jobs", "metrics", job_id).out.splitlines()
    assert metrics[0].split() == ["STEP", "loss", "rss[0]"]
    assert [line.split()[:2] for line in metrics[1:]] == [["1", "2.5"], ["2", "2"], ["3", "1.5"], ["4", "1"]]


def test_the_models_own_defaults_are_not_shown_as_changed(run: Run, live_door: LiveDoor, client: Client) -> None:
    details = {"parameters": 135e6, "max_seq_length": 128}
    task_type = "text-question-answering"
    publish(live_door.storage, make_manifest("model", "small", task_type=task_type, details=details))
    job = client.submit(ORDER.model_copy(update={"model": "small"}))
    assert (job.job["hyperparameters"]["learning_rate"], job.job["hyperparameters"]["max_seq_length"]) == (5e-4, 128)
    shown = run("jobs", "show", job.id).out
    assert "learning_rate" not in shown and "max_seq_length" not in shown and "max_steps" in shown


def test_logs_are_printed_as_they_are(run: Run, live_door: LiveDoor, client: Client) -> None:
    job_id = finished(client, live_door)
    assert run("jobs", "logs", job_id).out == "[bold]loading[/bold]\ntraining\n"
    assert run("jobs", "logs", job_id, "-f").out == "[bold]loading[/bold]\ntraining\n"
    assert run("jobs", "logs", job_id, "--rank", "0").out == ""


def test_the_next_page_of_jobs_is_named_beside_the_table(run: Run, client: Client) -> None:
    ids = [client.submit(ORDER).id for _ in range(3)]
    done = run("jobs", "list", "--limit", "2")
    assert f"--after {ids[1]}" in done.err
    assert ids[0] in run("jobs", "list", "--after", ids[1]).out


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("failed", 1), ("stopped", 4)])
def test_the_exit_code_says_how_a_watched_job_ended(
    run: Run, live_door: LiveDoor, client: Client, state: str, code: int
) -> None:
    done = run("jobs", "watch", finished(client, live_door, state, message="because"))
    assert done.code == code
    assert "step 4/4  loss 1.0000" in done.out
    assert state in done.out.splitlines()[-1]


def test_what_a_failed_job_needs_is_said(run: Run, live_door: LiveDoor, client: Client) -> None:
    job_id = client.submit(ORDER).id
    error = {"error": {"hint": "use a smaller batch"}}
    live_door.store.change(job_id, Change(state="failed", reason="user_error", message="too big"), data=error)
    done = run("jobs", "watch", job_id)
    assert done.out.splitlines()[-2:] == [f"{job_id} failed: user_error: too big", "  hint: use a smaller batch"]


def test_errors_go_to_stderr_with_fields_and_hint(run: Run) -> None:
    done = run("jobs", "submit", *FLAGS, "--set", "lora_rnak=4", "-y")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        "error: there is no hyperparameter 'lora_rnak' in hyperparameters",
        "  fields: hyperparameters.lora_rnak",
        "  hint: did you mean lora_rank?",
    ]


@pytest.mark.parametrize(
    "command",
    [
        "jobs show job-none",
        "models show tinny",
        "jobs list --limit 0",
        "jobs nonsense",
        "jobs submit /no/such/file",
        "jobs submit --set rank",
        "models register new /no/such/folder",
        "hyperparameters lora_rnak",
    ],
)
def test_refused_input_is_exit_code_2(run: Run, command: str) -> None:
    done = run(*command.split())
    assert (done.code, done.out) == (2, "")
    assert done.err


def test_a_door_that_is_not_there_is_exit_code_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_URL", "http://127.0.0.1:1")
    done = run("jobs", "list")
    assert (done.code, done.out) == (3, "")
    assert "http://127.0.0.1:1" in done.err and "tunesmith up" in done.err
    status = run("status", "--json")
    assert (status.code, status.json["door"]["status"]) == (3, "does not answer")


def test_an_interrupt_is_exit_code_130_and_leaves_the_job(live_door: LiveDoor, client: Client) -> None:
    job_id = client.submit(ORDER).id
    command = [sys.executable, "-c", "from tunesmith.cli import main; main()", "jobs", "watch", job_id]
    watch = subprocess.Popen(
        command,
        env={**os.environ, **live_door.settings.to_env()},
        stdout=subprocess.PIPE,
        text=True,
        # What runs in the background of a shell ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert watch.stdout is not None and "pending" in watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    assert watch.wait(timeout=60) == 130
    assert client.job(job_id).state == "pending"


def test_another_doors_url_does_not_get_this_machines_token(run: Run, live_door: LiveDoor, monkeypatch: Any) -> None:
    monkeypatch.setenv("TUNESMITH_URL", live_door.url.replace("127.0.0.1", "localhost"))
    assert run("models", "list").code == 2
    monkeypatch.setenv("TUNESMITH_TOKEN", live_door.token)
    assert run("models", "list").code == 0


def test_submit_shows_the_plan_and_asks(run: Run, order: Path, client: Client) -> None:
    for answer in ("", "n\n"):
        done = run("jobs", "submit", str(order), stdin=answer)
        assert done.code == 130
        assert client.jobs().items == []
    shown = " ".join(done.out.split())
    for part in (
        "model tiny@1",
        "dataset sums@1",
        "workers 1 × cpu-small (1 CPU)",
        "new model tuned@1",
        "price 0 an hour",
    ):
        assert part in shown
    assert "max_steps 3 (default absent)" in shown
    assert "lora_rank" not in shown
    done = run("jobs", "submit", str(order), stdin="y\n")
    assert done.code == 0
    assert client.jobs().items[0].id in done.out


def test_a_submitted_jobs_json_is_alone_on_stdout(run: Run, order: Path, client: Client) -> None:
    done = run("jobs", "submit", str(order), "-y", "--json")
    assert done.json == client.jobs().items[0].model_dump(mode="json")


def test_the_same_idempotency_key_orders_once(run: Run, order: Path, client: Client) -> None:
    for _ in range(2):
        assert run("jobs", "submit", str(order), "-y", "--idempotency-key", "k").code == 0
    assert len(client.jobs().items) == 1


def test_flags_override_the_file_and_have_their_hyperparameters_type(run: Run, order: Path) -> None:
    values = ["lora_rank=4", "learning_rate=1e-3", "prefix=1", "max_steps="]
    flags = [part for value in values for part in ("--set", value)]
    advanced = ["-a", "merge_adapter=off", "-a", "packing=off", "-a", "seed=7"]
    done = run("jobs", "submit", str(order), "-y", "--json", "--cards", "2", "--name", "named", *flags, *advanced)
    assert done.code == 0, done.err
    job = done.json["job"]
    assert (job["cards"], job["name"]) == (2, "named")
    given = {name: job["hyperparameters"][name] for name in ("lora_rank", "learning_rate", "prefix", "max_steps")}
    assert given == {"lora_rank": 4, "learning_rate": 1e-3, "prefix": "1", "max_steps": None}
    assert [job["advanced"][name] for name in ("merge_adapter", "packing", "seed")] == [False, "off", 7]


def test_a_value_of_the_wrong_type_is_refused_by_its_name(run: Run) -> None:
    done = run("jobs", "submit", *FLAGS, "-y", "--set", "lora_rank=many")
    assert done.code == 2
    assert "lora_rank must be of type int, got 'many'" in done.err


@pytest.mark.parametrize("text", ["learning_rate: 2e-4", "learning_rate: 2.0e-4", '"learning_rate": 0.0002'])
def test_numbers_and_words_in_yaml_mean_what_they_say(run: Run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "order.yml"
    path.write_text(f"hyperparameters:\n  {text}\nadvanced: {{packing: off, merge_adapter: false}}\n")
    done = run("jobs", "submit", str(path), *FLAGS, "-y", "--json")
    assert done.code == 0, done.err
    assert done.json["job"]["hyperparameters"]["learning_rate"] == 2e-4
    assert (done.json["job"]["advanced"]["packing"], done.json["job"]["advanced"]["merge_adapter"]) == ("off", False)


def test_an_order_may_be_json_or_come_from_stdin(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    path.write_text(json.dumps(SPEC, indent="\t"))
    assert run("jobs", "submit", str(path), "-y").code == 0
    assert run("jobs", "submit", "-", "-y", stdin=json.dumps(SPEC)).code == 0


@pytest.mark.parametrize("text", ["[1, 2]", "model: [", "\x00", "kind: register\nasset: model\nname: m\nsource: /x"])
def test_a_file_that_is_no_order_is_refused(run: Run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "order.yaml"
    path.write_text(text)
    assert run("jobs", "submit", str(path), "-y").code == 2


def test_register_takes_paths_from_where_it_is_called(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    done = run("datasets", "register", "rows", "rows", "--no-wait", "--json")
    assert done.json["job"]["source"] == str(tmp_path / "rows")


def test_render_writes_a_job_that_needs_no_door(
    run: Run, order: Path, live_door: LiveDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_URL", "http://127.0.0.1:1")
    done = run("jobs", "render", str(order), "--set", "lora_rank=4", "--json")
    assert done.code == 0, done.err
    rendered = done.json
    job = parse_job(Path(rendered["url"]).read_bytes())
    assert job.kind == "train"
    assert (job.id, job.hyperparameters.lora_rank, job.model) == (rendered["id"], 4, "tiny@1")
    assert rendered["url"] == f"{live_door.storage.url}/jobs/{job.id}/job.json"
    assert rendered["command"].endswith(f"-- {sys.executable} -m trainers {rendered['url']}")
    assert "ray job submit --address http://127.0.0.1:8265" in rendered["command"]
    assert live_door.settings.ray_token_path.read_text() not in rendered["command"]
    lines = run("jobs", "render", str(order)).out.splitlines()
    assert lines[0].endswith("/job.json")
    assert lines[0] in lines[-1]


def test_render_refuses_what_the_door_would_refuse(run: Run, order: Path, live_door: LiveDoor) -> None:
    done = run("jobs", "render", str(order), "--flavor", "cpu-smal")
    assert done.code == 2
    assert "did you mean cpu-small?" in done.err
    assert live_door.storage.children("jobs") == []


def test_hyperparameters_are_all_listed(run: Run) -> None:
    shown = run("hyperparameters").out
    listed = run("hyperparameters", "--json").json
    known = [h for section in SECTIONS for h in definitions(section)]
    for h in known:
        assert h.name in shown
        assert h.help in shown
    assert [row["name"] for row in listed] == [h.name for h in known]
    assert [row["section"] for row in run("hyperparameters", "seed", "--json").json] == ["advanced"]
    assert "LoRA 低秩矩阵的秩" in run("hyperparameters", "lora_rank", "--zh").out


def test_hyperparameters_of_a_model_have_its_defaults_and_bounds(run: Run, live_door: LiveDoor) -> None:
    details = {"parameters": 10**8, "max_seq_length": 512}
    publish(live_door.storage, make_manifest("model", "small", task_type="text-generation", details=details))
    rows = {row["name"]: row for row in run("hyperparameters", "--model", "small", "--json").json}
    assert rows["learning_rate"]["default"] == 5e-4
    assert (rows["max_seq_length"]["default"], rows["max_seq_length"]["maximum"]) == (512, 512)
    assert run("hyperparameters", "--model", "smal").code == 2


def test_a_terminal_gets_a_bar(live_door: LiveDoor, client: Client) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=120)
    job = show_progress(client, finished(client, live_door), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert job.state == "completed"
    assert "4/4" in shown and "loss 1.0000" in shown and "ETA 0:00" in shown


def test_time_left_is_reckoned_from_the_newest_start() -> None:
    course = Course(cards=2)
    start = {"total_steps": 10, "first_step": 1}
    event = {"seq": 1, "time": "", "attempt": None, "state": None, "phase": "train", "reason": None, "message": None}
    course.adopt(EventView.model_validate({**event, "data": start}))
    assert course.left_s is None
    for step in (1, 2, 4):
        course.add(figure(step))
    assert course.left_s == pytest.approx(6)
    course.add(figure(4, "tokens_per_s_per_card", 50.0))
    assert course.tokens_per_s == 100
    for step, second in ((3, 40), (5, 44)):  # done again, after a restart, at half the pace
        course.add(figure(step).model_copy(update={"time": f"2026-01-01T00:00:{second}.000Z"}))
    assert course.left_s == pytest.approx(10)
