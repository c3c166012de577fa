"""Settings: what the environment gives comes back checked, or is refused with its name; the docs say what there is."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.errors import SpecError
from tunesmith.settings import Settings, document, variable

ROOT = Path(__file__).parents[1]


def test_settings_survive_the_environment(tmp_path: Path) -> None:
    given = {"TUNESMITH_HOME": str(tmp_path), "TUNESMITH_PORT": "8123", "TUNESMITH_SEGMENT_S": "0.25", "PATH": "/bin"}
    settings = Settings.from_env(given)
    assert (settings.port, settings.segment_s, settings.home) == (8123, 0.25, tmp_path)
    assert settings.storage_url == str(tmp_path / "storage")
    assert Settings.from_env(settings.to_env()) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_an_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    empty = {variable(name): "" for name in Settings.model_fields}
    assert Settings.from_env({**empty, "TUNESMITH_HOME": str(tmp_path)}) == Settings.from_env(
        {"TUNESMITH_HOME": str(tmp_path)}
    )


def test_an_unknown_setting_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(SpecError) as caught:
        Settings.from_env({"TUNESMITH_PROT": "1"})
    assert caught.value.fields == ["TUNESMITH_PROT"]
    assert caught.value.hint == "did you mean TUNESMITH_PORT?"
    with pytest.raises(SpecError, match="unknown settings TUNESMITH_A, TUNESMITH_B"):
        Settings.from_env({"TUNESMITH_B": "1", "TUNESMITH_A": ""})


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("PORT", "http", "an integer from 1 to 65535"),
        ("PORT", "0", "an integer from 1 to 65535"),
        ("RAY_DASHBOARD_PORT", "65536", "an integer from 1 to 65535"),
        ("ISOLATION", "bubblewarp", "bubblewrap or none"),
        ("S3_ADDRESSING_STYLE", "paths", "auto or path or virtual"),
        ("S3_CHECKSUMS", "never", "when_required or when_supported"),
        ("LEASE_S", "0", "a number above 0"),
        ("LEASE_S", "nan", "a number above 0"),
        ("STORAGE_PATIENCE_S", "-1", "a number of at least 0"),
        ("HANG_TIMEOUT_S", "inf", "a number above 0"),
        ("PROGRAM_PROCESSES", "1.5", "an integer of at least 1"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(name: str, text: str, allowed: str) -> None:
    with pytest.raises(SpecError) as caught:
        Settings.from_env({f"TUNESMITH_{name}": text})
    assert caught.value.message == f"TUNESMITH_{name} must be {allowed}, got {text!r}"
    assert caught.value.fields == [f"TUNESMITH_{name}"]


def test_every_value_at_fault_is_named() -> None:
    with pytest.raises(SpecError) as caught:
        Settings.from_env({"TUNESMITH_PORT": "0", "TUNESMITH_ISOLATION": "x"})
    assert sorted(caught.value.fields) == ["TUNESMITH_ISOLATION", "TUNESMITH_PORT"]


def test_settings_are_read_where_they_are_asked_for_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_PORT", "9")
    assert Settings(home=tmp_path, storage_url="s", database_url="d").port == 8700


def test_every_setting_is_documented_from_its_definition() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == document()
    assert all(field.description for field in Settings.model_fields.values())


def test_the_document_is_the_same_on_every_machine(tmp_path: Path) -> None:
    path = tmp_path / "settings.md"
    environment = {**os.environ, "HOME": str(tmp_path), "TUNESMITH_PORT": "9"}
    subprocess.run([sys.executable, "-m", "tunesmith.settings", path], env=environment, check=True)
    assert path.read_text(encoding="utf-8") == document()
