"""What strangers have written is shown by the command line, never sent to the terminal; JSON says it unchanged."""

import json
import logging
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.text import Text

from tests.support.live_door import LiveDoor, Run, figure
from tests.support.stage import SPEC, make_manifest
from tunesmith.api.client import Client
from tunesmith.assets.catalog import Table, publish
from tunesmith.assets.gallery import Gallery
from tunesmith.assets.stored_files import describe_file
from tunesmith.assets.train_params import Method, Parameter
from tunesmith.cli import rendering
from tunesmith.cli.progress import show_progress
from tunesmith.cli.terminal import Terminal
from tunesmith.clock import utc_text
from tunesmith.jobs.drafting import draft, new_job_id
from tunesmith.jobs.evaluation_record import Answer, Evaluation
from tunesmith.jobs.spec import TrainSpec
from tunesmith.jobs.states import Change
from tunesmith.log_lines import LineFormatter
from tunesmith.storage import layout
from tunesmith.visible_text import is_visible, visible

HOSTILE = {
    "clears the screen": "\x1b[2J\x1b[H",
    "names the window": "\x1b]0;owned\x07",
    "writes the clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "makes a link": "\x1b]8;;http://x\x1b\\click\x1b]8;;\x1b\\",
    "asks the terminal": "\x1b[6n\x1b[c\x05",
    "a sequence in one character": "\x9b2J\x9d0;x\x9c",
    "a device string": "\x90q\x9c",
    "goes back to the start": "fine\rerror: forged",
    "goes back": "abc\x08\x08\x08xyz",
    "rings": "\x07",
    "feeds": "\x0b\x0c\x85",
    "shifts": "\x0e\x0f\x1bc",
    "nothing and deletion": "\x00\x7f",
    "turned around": "\u202egpj.exe\u202c",
    "isolated": "\u2066\u2067x\u2069",
    "marks": "\u200e\u200f\u061c",
    "no width": "a\u200bb\ufeffc\u2060d",
    "other ends of lines": "a\u2028b\u2029c",
    "tags": "x\U000e0041\U000e007f",
}
"""By what each does to a terminal, or to a reader."""


def plant(live_door: LiveDoor, bad: str) -> str:
    """A job and a model whose every text is hostile; the job's id. The door takes no such order, but may meet one."""
    store, storage = live_door.store, live_door.storage
    job = draft(
        TrainSpec.model_validate(SPEC),
        storage=storage,
        account="operator",
        job_id=new_job_id(),
        created_at=utc_text(),
    )
    job = job.model_copy(update={"name": f"name{bad}"})
    store.insert(job, respond=lambda record: {})
    live_door.run(job.id)
    data = {f"key{bad}": f"value{bad}"}
    store.change(job.id, Change(message=f"message{bad}"))
    store.change(job.id, Change(phase="train"), data=data)
    live_door.measure(job.id, 1, figure(1), figure(1, f"metric{bad}", 2.5), figure(2))
    live_door.log(job.id, 1, f"log{bad}\nnext\n")
    answers = [Answer(prompt=f"p{bad}", expected=f"e{bad}", answer=f"a{bad}")]
    said = Evaluation(step=0, rows=1, loss=1.0, perplexity=2.0, scores={f"s{bad}": 1.0}, answers=answers)
    storage.put(layout.evaluation(job.id, 1, 0), said.model_dump_json().encode())
    live_door.end(job.id, "failed", reason="user_error", message=f"end{bad}")
    _plant_model(live_door, bad)
    return job.id


def _plant_model(live_door: LiveDoor, bad: str) -> None:
    storage, readme = live_door.storage, "gallery_train/dataset_readme.md"
    local = live_door.settings.home / "readme.md"
    local.write_text(f"# data{bad}\n", newline="")
    parameter = Parameter(name="n", type="str", default=f"d{bad}", help=f"help{bad}")
    gallery = Gallery(methods=[Method(name="full", hyperparameters=[parameter])])
    options: dict[str, Any] = {"task_type": f"task{bad}", "license": f"l{bad}", "details": {f"k{bad}": f"v{bad}"}}
    manifest = make_manifest("model", "bad", files=[describe_file(local, readme)], gallery=gallery, **options)
    storage.upload_file(local, f"{manifest.stored.prefix}/{readme}")
    publish(storage, manifest)
    table = Table(format="csv", columns=[f"column{bad}"], rows=1)
    publish(storage, make_manifest("dataset", "bad", tables={f"file{bad}.csv": table}))


def is_harmless(text: str) -> bool:
    return all(is_visible(line) for line in text.split("\n"))


COMMANDS = {
    "jobs list": "name", "jobs show JOB": "end", "jobs events JOB": "message", "jobs events JOB -f": "value",
    "jobs logs JOB": "log", "jobs logs JOB -f": "log", "jobs metrics JOB": "metric", "jobs metrics JOB -f": "metric",
    "jobs evaluations JOB": "a", "jobs watch JOB": "end", "jobs stop JOB": "", "models list": "task",
    "models show bad": "task", "models dataset-readme bad": "# data", "datasets list": "file",
    "datasets show bad": "column",
}  # fmt: skip
"""Each with what stands before the hostile text that it shows."""


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_no_command_sends_what_a_stranger_has_written(run: Run, live_door: LiveDoor, bad: str) -> None:
    job_id = plant(live_door, bad)
    for command, before in COMMANDS.items():
        done = run(*command.replace("JOB", job_id).split())
        assert done.code in (0, 1), done.err
        assert is_harmless(done.out) and is_harmless(done.err), (command, done.out)
        if before:
            # Tables break long words; what is spelled out is there all the same.
            there = "".join(done.out.split())
            assert "".join(f"{before}{visible(bad)}".split()) in there, (command, done.out)


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_json_is_harmless_to_a_terminal_too_and_says_the_same(run: Run, live_door: LiveDoor, bad: str) -> None:
    job_id = plant(live_door, bad)
    for command, before in COMMANDS.items():
        if "dataset-readme" in command:
            continue
        done = run(*command.replace("JOB", job_id).split(), "--json")
        assert is_harmless(done.out) and is_harmless(done.err), (command, done.out)
        documents = done.out.splitlines() if command.endswith("-f") else [done.out]
        said = [text for document in documents for text in texts(json.loads(document))]
        assert any(f"{before.removeprefix('# ')}{bad}" in text for text in said) or not before, command


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_the_bar_of_a_terminal_sends_its_own_sequences_alone(live_door: LiveDoor, bad: str) -> None:
    job_id = plant(live_door, bad)
    console = Terminal(file=StringIO(), force_terminal=True, width=200, highlight=False, markup=False)
    show_progress(Client(live_door.url, live_door.token), job_id, console)
    sent = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"end{visible(bad)}" in sent
    # What rich itself sends: colours, the cursor hidden and shown, lines cleared, and back to the line's start.
    own = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]|\x1b\[2K|\r")
    assert is_harmless(own.sub("", sent))
    assert bad not in sent


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_whatever_is_drawn_is_harmless_where_nobody_thought_of_it(bad: str) -> None:
    console = Terminal(file=StringIO(), force_terminal=False, width=100)
    console.print(f"x{bad}", markup=False)
    console.print(Text(f"x{bad}"))
    console.print(rendering.table(("A", f"B{bad}"), [(f"c{bad}", f"d{bad}\ne")]))
    console.print(rendering.pairs([(f"n{bad}", f"v{bad}\nw")]))
    assert is_harmless(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_an_error_is_shown_whatever_it_quotes(run: Run, monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    """By a door that is not ours, and by one that is."""
    error = {"code": "x", "message": f"m{bad}\nerror: forged", "fields": [f"f{bad}"], "hint": f"h{bad}"}
    body = json.dumps({"error": {**error, "request_id": "r"}}).encode()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(422 if "models" in self.path else 418)
            self.end_headers()
            self.wfile.write(body if "models" in self.path else f"no shape{bad}".encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("TUNESMITH_URL", f"http://127.0.0.1:{server.server_port}")
        for command in ("models list", "datasets list"):
            done = run(*command.split())
            assert done.code == 2 and is_harmless(done.out) and is_harmless(done.err), done.err
            assert visible(bad) in done.err
            assert [line for line in done.err.splitlines() if line.startswith("error:")] == [done.err.splitlines()[0]]
        server.shutdown()


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_a_models_folder_is_checked_without_obeying_it(run: Run, tmp_path: Path, bad: str) -> None:
    folder = tmp_path / "model"
    (folder / "gallery_train").mkdir(parents=True)
    card = json.dumps({"task_type": f"task{bad}", "Train_command_path": f"c{bad}.py"})
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    (folder / "gallery_train" / "train_params.json").write_text(json.dumps({f"k{bad}": 1, "training_methods": bad}))
    done = run("models", "check", str(folder))
    assert done.code == 2 and is_harmless(done.out) and is_harmless(done.err)
    assert is_harmless(run("models", "check", str(folder), "--json").out)


@pytest.mark.parametrize("bad", [*HOSTILE.values(), "a\n2026-01-01 00:00:00 ERROR serve_app: forged", "a\r\nb"])
def test_what_the_platforms_log_quotes_begins_no_line_of_it(bad: str) -> None:
    record = logging.LogRecord("serve_app", logging.INFO, "x.py", 1, "job %s ended", (f"name{bad}",), None)
    lines = LineFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert all(is_visible(line) for line in lines)
    assert lines[0].startswith("INFO job name")
    assert all(line.startswith("  | ") for line in lines[1:])


def test_nothing_in_the_command_line_prints_but_by_the_one_way() -> None:
    folder = Path(rendering.__file__).parent
    printing = re.compile(r"\btyper\.echo\(|\bConsole\(|\bprint\(|\bsys\.stdout\.write|click\.echo")
    found = [
        f"{path.name}: {line.strip()}"
        for path in folder.glob("*.py")
        if path.name != "terminal.py"
        for line in path.read_text().splitlines()
        if printing.search(line) and not re.search(r"\b(\w*console|messages\(\)|output\(\))\.print\(|def ", line)
    ]
    assert found == []
