"""What the workers report reaches the job's folder, each value once, whoever ends first."""

from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from socket import AF_UNIX
from socket import socket as stream_socket

import pytest

from trainers.attempt.report import Report
from trainers.attempt.report_writer import ReportWriter
from trainers.text_job.report_channel import KEY, ReportSocket
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import EventLine, EventWriter, MetricLine
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import read_segments


def metrics(storage: FolderStorage) -> list[MetricLine]:
    return [
        line
        for segment in read_segments(storage, layout.metrics("job-1", 1))
        for line in attempts.metric_lines(segment.data)
    ]


def test_reports_become_metrics_and_events_and_none_is_lost(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    with (
        EventWriter(storage, "job-1", 1) as events,
        ReportWriter(storage, "job-1", 1, events=events, segment_s=5) as writer,
        ReportSocket(writer.write_all) as socket,
    ):
        callback = socket.callback()
        for phase in ("tokenize", "train"):
            callback.after_report(None, [{KEY: Report("t", 0, phase=phase)}] * 2, None)
        for step in range(1, 201):
            each = [Report("t", step, values={"loss": 1.0 / step}, sampled={"rss": rank}) for rank in (10.0, 20.0)]
            callback.after_report(None, [{KEY: report} for report in each], None)
        callback.after_report(None, [{KEY: Report("t", 200, products={"files": []})}] * 2, None)
        assert writer.last_step == 200
        assert writer.products == {"files": []}
        # A second run of the workers, after a lost one, has a connection of its own.
        again = socket.callback()
        again.after_report(None, [{KEY: Report("t", 201, values={"loss": 0.5}, phase="train")}], None)
    lines = metrics(storage)
    assert [(line.step, line.value) for line in lines if line.name == "loss"][:200] == [
        (step, 1.0 / step) for step in range(1, 201)
    ]
    assert {(line.rank, line.value) for line in lines if line.name == "rss"} == {(0, 10.0), (1, 20.0)}
    assert lines[-1].step == 201
    segments = read_segments(storage, layout.events("job-1", 1))
    said = [EventLine.model_validate_json(line) for segment in segments for line in segment.data.splitlines()]
    told = [(event.state, event.phase) for event in said]
    assert told == [(None, "tokenize"), ("running", "train"), (None, "train")]


def test_a_caller_without_the_secret_is_sent_away_and_the_next_run_is_heard(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    with (
        EventWriter(storage, "job-1", 1) as events,
        ReportWriter(storage, "job-1", 1, events=events, segment_s=5) as writer,
        ReportSocket(writer.write_all) as socket,
    ):
        address = socket.callback()._address
        with pytest.raises(AuthenticationError):
            Client(address, "AF_UNIX", authkey=b"wrong")
        for _ in range(2):
            with stream_socket(AF_UNIX) as silent:
                silent.connect(address)
        socket.callback().after_report(None, [{KEY: Report("t", 1, values={"loss": 0.5})}], None)
        assert writer.last_step == 1
