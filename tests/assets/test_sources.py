"""What a source may be, whatever the settings allow."""

from pathlib import Path

import pytest

from tunesmith.assets.sources import check_path, check_source
from tunesmith.errors import SpecError
from tunesmith.settings import Settings


def settings(tmp_path: Path, **given: str) -> Settings:
    return Settings.from_env(
        {f"TUNESMITH_{name}": text for name, text in {"HOME": f"{tmp_path}/home", **given}.items()}
    )


def refused(source: str, using: Settings) -> None:
    with pytest.raises(SpecError) as caught:
        check_source(source, using)
    assert caught.value.code == "source_not_allowed", source
    with pytest.raises(SpecError):
        check_path(source.removeprefix("file://"), using, what="the image")


def test_the_platforms_own_folders_and_the_systems_are_never_a_source(tmp_path: Path) -> None:
    using = settings(tmp_path, STORAGE_URL=f"{tmp_path}/store", RAY_TEMP_DIR=str(tmp_path)[:1] + "tmp")
    own = [using.home, tmp_path / "store", using.ray_folder]
    made = [path for path in own if not path.exists()]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "link").symlink_to(using.home)
    for path in made:
        path.mkdir()
    try:
        (using.home / "api_token").write_text("secret")
        for path in own:
            for source in (path, path / "below", path.parent):
                refused(str(source), using)
        for source in ("/proc/self/environ", "/proc", "/sys/kernel", "/dev/zero", "/dev/shm", "/run", "/var/run", "/"):
            refused(source, using)
        for source in (f"{tmp_path}/mine/link/api_token", f"file://{using.home}/api_token"):
            refused(source, using)
        assert check_source(f"{tmp_path}/mine", using) == f"{tmp_path}/mine"
    finally:
        using.ray_folder.rmdir()


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("s3://bucket/tunesmith", False),
        ("s3://bucket/tunesmith/models/a/1", False),
        ("obs://bucket/tunesmith/jobs", False),
        ("s3://bucket//tunesmith//jobs", False),
        ("s3://bucket", False),
        ("s3://bucket/", False),
        ("s3://bucket/tunesmith-2", True),
        ("s3://bucket/data", True),
        ("s3://other/tunesmith", True),
    ],
)
def test_the_storages_own_prefix_is_never_a_source(tmp_path: Path, source: str, allowed: bool) -> None:
    using = settings(tmp_path, STORAGE_URL="s3://bucket/tunesmith")
    if allowed:
        assert check_source(source, using) == source
    else:
        with pytest.raises(SpecError, match="the platform's own storage"):
            check_source(source, using)


def test_the_whole_bucket_is_no_source_where_it_is_the_storage(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the platform's own storage"):
        check_source("s3://bucket/data", settings(tmp_path, STORAGE_URL="s3://bucket"))
