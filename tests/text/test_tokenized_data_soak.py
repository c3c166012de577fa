"""Data of any size takes the same memory, and builders that are killed take nothing from those that are not."""

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.tokenizing import ROOT
from tests.support.waiting import until
from tunesmith.storage.folder import FolderStorage

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]

GB = 1 << 30
NOISE_BYTES = 64 << 20
"""What the peak of the same work differs by from run to run."""


def write_rows(path: Path, size_bytes: int) -> int:
    """Rows of about a thousand bytes, no two of them alike; how many."""
    chance = random.Random(0)
    words = [f"w{n}" for n in range(1000)]
    rest = [" ".join(chance.choices(words, k=20)) + " " + "x" * 850 for _ in range(997)]
    number = 0
    with path.open("w") as file:
        while file.tell() < size_bytes:
            file.writelines(
                json.dumps({"prompt": f"w{n % 1000} {n} {rest[n % 997]}", "response": f"w{n % 1000}"}) + "\n"
                for n in range(number, number + 1000)
            )
            number += 1000
    return number


# Reading, tokenising, the audit, the first steps; what it prints last is the digest of all rows.
WHOLE_WAY = """
import hashlib, sys, tempfile
from pathlib import Path
from tests.support import tiny
from trainers.text.audit import CHECKED_ROWS, audit
from trainers.recipe.training_loop import Hooks, train
from trainers.text.tokenized_data import DataFile, encoded, first_examples, tokenized
from tunesmith.settings import Settings
from tunesmith.storage.folder import FolderStorage

path, root, home, processes = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
tokenizer, file = tiny.make_word_tokenizer(), DataFile.at(path)
options = {"hyperparameters": tiny.hyperparameters(), "advanced": tiny.advanced()}
text = {**options, "training_type": "text-question-answering"}
rows = tokenized(
    [file], lambda: encoded([file], tokenizer, **text, processes=processes), tokenizer="words", **text,
    storage=FolderStorage(root), settings=Settings.from_env({"TUNESMITH_HOME": home}),
)
assert len(rows) == file.rows
examples = first_examples([file], options["hyperparameters"], "text-question-answering", CHECKED_ROWS)
assert audit(rows, examples, tokenizer, **options).refusal is None
hooks = Hooks(report=lambda step, values: None, save=lambda step, at: None, should_stop=lambda: False)
steps = {"hyperparameters": tiny.hyperparameters(max_steps=20), "advanced": tiny.advanced(), "hooks": hooks}
with tempfile.TemporaryDirectory() as model:
    assert train(tiny.make_model(Path(model), tokenizer), rows, None, **steps).steps == 20
digest = hashlib.sha256()
for row in range(len(rows)):
    digest.update(rows.ids(row).tobytes() + rows.trained(row).tobytes())
print(len(rows), digest.hexdigest())
"""


def start(path: Path, root: Path, home: Path, processes: int = 2) -> subprocess.Popen[str]:
    arguments = [str(path), str(root), str(home), str(processes)]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WHOLE_WAY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def ended(run: subprocess.Popen[str]) -> str:
    """The last line that a run that went well has printed."""
    said, error = run.communicate()
    assert run.returncode == 0, error
    return said.splitlines()[-1]


@dataclass(frozen=True)
class Measured:
    rows: int
    peak_bytes: int
    """The most that the process and all below it held at once."""
    seconds: float


def measure(folder: Path, size_bytes: int) -> Measured:
    rows = write_rows(folder / "rows.jsonl", size_bytes)
    started, peak = time.monotonic(), 0
    run = start(folder / "rows.jsonl", folder / "storage", folder / "home")
    while run.poll() is None:
        peak = max(peak, _tree_bytes(run.pid))
        time.sleep(0.05)
    assert ended(run).startswith(f"{rows} ")
    return Measured(rows, peak, time.monotonic() - started)


def _tree_bytes(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
    return total


def test_five_gigabytes_take_the_memory_of_half_a_one(tmp_path: Path) -> None:
    measured = []
    for size_bytes in (GB // 2, 5 * GB):
        folder = tmp_path / str(size_bytes)
        folder.mkdir()
        measured.append(measure(folder, size_bytes))
        sys.stderr.write(f"{size_bytes} bytes: {measured[-1]}\n")
    small, large = measured
    assert large.peak_bytes - small.peak_bytes <= 16 * (large.rows - small.rows) + NOISE_BYTES


@pytest.mark.parametrize("same_node", [True, False])
def test_of_two_builders_one_is_killed_and_all_end_with_the_same_rows(tmp_path: Path, same_node: bool) -> None:
    path = tmp_path / "rows.jsonl"
    count = write_rows(path, 24 << 20)
    whole = start(path, tmp_path / "whole", tmp_path / "alone")
    expected = ended(whole)
    assert expected.startswith(f"{count} ")
    chance = random.Random(same_node)
    for round_number in range(3):
        root = tmp_path / f"storage-{round_number}"
        homes = [tmp_path / f"home-{round_number}{'' if same_node else f'-{n}'}" for n in range(2)]
        builders = [start(path, root, home) for home in homes]
        until(lambda root=root: any(True for _ in root.rglob("*.arrow")))
        time.sleep(chance.uniform(0, 3))
        killed, other = chance.sample(builders, 2)
        killed.kill()
        killed.communicate()
        again = start(path, root, homes[builders.index(killed)])
        for builder in (other, again):
            assert ended(builder) == expected
        folders = {entry.key.split("/")[3] for entry in FolderStorage(root).entries("cache")}
        assert len(folders) == 2 and "manifest.json" in folders
