"""Growing records lose no line, cut none, and go on where they ended."""

import threading
from pathlib import Path

import pytest

from tests.support.waiting import until
from tunesmith.errors import StorageError
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import MAX_BYTES, SegmentWriter, read_segments

PREFIX = "jobs/a/attempts/1/metrics"


class UnsteadyStorage(FolderStorage):
    """A folder that refuses writes while `away` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.away = threading.Event()
        self.refused = threading.Event()

    def put(self, key: str, data: bytes) -> None:
        if self.away.is_set():
            self.refused.set()
            raise StorageError("away")
        super().put(key, data)


@pytest.fixture
def storage(tmp_path: Path) -> UnsteadyStorage:
    return UnsteadyStorage(tmp_path)


def lines(storage: FolderStorage, after: int = 0) -> bytes:
    return b"".join(segment.data for segment in read_segments(storage, PREFIX, after=after))


def test_a_writer_goes_on_after_the_highest_segment(storage: UnsteadyStorage) -> None:
    for text in (b"one\n", b"two\n"):
        with SegmentWriter(storage, PREFIX, max_age_s=1000) as writer:
            writer.write(text)
    assert [(s.number, s.data) for s in read_segments(storage, PREFIX)] == [(1, b"one\n"), (2, b"two\n")]
    assert lines(storage, after=1) == b"two\n"
    assert [entry.key for entry in storage.entries()] == [f"{PREFIX}/00000001", f"{PREFIX}/00000002"]


def test_a_segment_is_closed_at_its_age(storage: UnsteadyStorage) -> None:
    with SegmentWriter(storage, PREFIX, max_age_s=0.05) as writer:
        writer.write(b"one\n")
        until(lambda: lines(storage) == b"one\n")


def test_a_segment_is_closed_at_its_size_and_between_lines(storage: UnsteadyStorage) -> None:
    line = b"x" * 300_000 + b"\n"
    with SegmentWriter(storage, PREFIX, max_age_s=1000) as writer:
        for _ in range(8):
            writer.write(line)
        until(lambda: len(lines(storage)) >= MAX_BYTES // 2)
    segments = list(read_segments(storage, PREFIX))
    assert all(len(s.data) <= MAX_BYTES and s.data.endswith(b"\n") for s in segments)
    assert b"".join(s.data for s in segments) == line * 8


def test_a_storage_that_is_away_for_a_while_costs_no_line(storage: UnsteadyStorage) -> None:
    storage.away.set()
    with SegmentWriter(storage, PREFIX, max_age_s=0.01) as writer:
        writer.write(b"one\n")
        assert storage.refused.wait(20)
        writer.write(b"two\n")
        storage.away.clear()
        until(lambda: lines(storage) == b"one\ntwo\n")


def test_lines_that_could_not_be_stored_are_said_at_the_end(storage: UnsteadyStorage) -> None:
    writer = SegmentWriter(storage, PREFIX, max_age_s=1000)
    storage.away.set()
    writer.write(b"one\n")
    with pytest.raises(StorageError):
        writer.close()
    storage.away.clear()
    writer.close()
    assert lines(storage) == b"one\n"


def test_many_threads_write_whole_lines(storage: UnsteadyStorage) -> None:
    with SegmentWriter(storage, PREFIX, max_age_s=0.01) as writer:
        threads = [
            threading.Thread(target=lambda n=n: [writer.write(b"%d %d\n" % (n, i)) for i in range(200)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(lines(storage).split(b"\n")[:-1]) == sorted(b"%d %d" % (n, i) for n in range(4) for i in range(200))


def test_half_a_line_is_refused(storage: UnsteadyStorage) -> None:
    with SegmentWriter(storage, PREFIX) as writer, pytest.raises(ValueError, match="newline"):
        writer.write(b"half")
