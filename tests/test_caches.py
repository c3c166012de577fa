"""What a node keeps on its disk has a bound: the oldest goes, what is in use stays, and leftovers do not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith import caches
from tunesmith.settings import Settings

MIB = 1 << 20
DAY_S = 24 * 3600


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home"), "TUNESMITH_CACHE_GIB": "1"})


def make(place: Path, *, age_s: float = 0, mib: int = 0) -> Path:
    """A folder with a file of so many MiB, last used so long ago."""
    place.mkdir(parents=True)
    with (place / "data").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, mib * MIB) if mib else None
    for path in (place / "data", place):
        os.utime(path, (time.time() - age_s,) * 2)
    return place


def test_what_was_used_least_recently_goes_over_all_caches_together(settings: Settings) -> None:
    cache = settings.home / "cache"
    oldest = make(cache / "fetched" / "a", age_s=500, mib=400)
    environment = make(cache / "environments" / "operator" / "b", age_s=400, mib=400)
    tokens = make(Path(settings.storage_url) / "cache" / "tokenized" / "c", age_s=300, mib=400)
    images = make(cache / "images", age_s=200, mib=200)
    new = make(cache / "fetched" / "d", mib=10)
    caches.keep_bounds(settings)
    assert [place.exists() for place in (oldest, environment, tokens, images, new)] == [False, True, True, True, True]
    # What is used again is not the oldest any more.
    caches.hold(environment)
    caches.release(environment)
    make(cache / "fetched" / "e", mib=400)
    assert caches.trim(settings) == [tokens]


def test_what_is_in_use_by_another_process_stays_until_that_ends(settings: Settings) -> None:
    used = make(settings.home / "cache" / "fetched" / "used", age_s=900, mib=800)
    other = make(settings.home / "cache" / "fetched" / "other", mib=800)
    code = (
        "import pathlib, sys; from tunesmith import caches; caches.hold(pathlib.Path(sys.argv[1])); "
        "print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(used)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None and user.stdout.readline() == b"1\n"
        os.utime(caches._lock_file(used), (1, 1))  # the oldest by far, and still in use
        assert caches.trim(settings) == [other]
        assert (used / "data").exists()
        user.kill()
    make(settings.home / "cache" / "fetched" / "new", mib=800)
    os.utime(used, (1, 1))
    assert caches.trim(settings) == [used]


def test_leftovers_of_killed_processes_go_after_a_day_unless_they_are_in_use(settings: Settings) -> None:
    home, storage = settings.home, Path(settings.storage_url)
    old = [home / name for name in ("tmp/x", "runs/job-1-a1-0", "cache/fetched/.half", "cache/tokenized/k-b.partial")]
    for place in old:
        make(place, age_s=2 * DAY_S)
    young, busy = make(home / "runs" / "job-2-a1-0"), make(home / "tmp" / "busy", age_s=2 * DAY_S)
    (storage / "models").mkdir(parents=True)
    (storage / "models" / "kept").write_text("1")
    partials = [storage / "models" / f".partial-{name}" for name in ("old", "young")]
    for path in partials:
        path.write_text("half")
    for path in (partials[0], storage / "models" / "kept"):
        os.utime(path, (1, 1))
    with caches.held(busy):
        caches.keep_bounds(settings)
        assert busy.exists()
    assert [place.exists() for place in old] == [False] * 4
    assert young.exists()
    assert [path.exists() for path in partials] == [False, True]
    assert (storage / "models" / "kept").exists()
    assert caches.sweep(settings) == [busy]
    assert not list((home / "tmp").iterdir())


def test_a_run_that_writes_is_not_left_over(settings: Settings) -> None:
    run = make(settings.home / "runs" / "job-1-a1-0" / "metrics", age_s=2 * DAY_S).parent
    os.utime(run, (1, 1))
    os.utime(run / "metrics" / "data")
    assert caches.sweep(settings) == []


def test_an_entry_that_goes_while_it_is_asked_for_is_made_anew(settings: Settings) -> None:
    place = make(settings.home / "cache" / "fetched" / "a", mib=1)
    assert caches._remove_unused(place)
    caches.hold(place)
    make(place)
    assert not caches._remove_unused(place)
    caches.release(place)
    assert caches._remove_unused(place)


def test_what_is_deleted_may_be_deep_and_shut(tmp_path: Path) -> None:
    deep = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')"
    subprocess.run([sys.executable, "-c", deep], cwd=tmp_path, check=True)
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut" / "file").touch()
    (tmp_path / "shut").chmod(0)
    caches.delete(tmp_path)
    assert not tmp_path.exists()
    caches.delete(tmp_path)


def test_of_a_link_only_itself_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    caches.delete(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
