"""The promises of the layout: source root, import layers' ground, names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.errors import SpecError
from tunesmith.storage import layout

ROOT = Path(__file__).parents[1]


def test_platform_is_a_source_root_and_hides_nothing() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform; print(platform.system())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_the_core_imports_no_torch() -> None:
    code = (
        "import sys, tunesmith.jobs.spec, tunesmith.jobs.flavors, tunesmith.hyperparameters, tunesmith.jobs.states; "
        "print(sorted({'torch', 'fastapi', 'transformers'} & set(sys.modules)))"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", "a..b", "-a", "a" * 64, "模型"])
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        layout.check_name(name, field="output_model")
    assert caught.value.fields == ["output_model"]


def test_a_reference_names_a_version_or_the_newest() -> None:
    assert layout.parse_ref("smollm2@3", field="model") == ("smollm2", 3)
    assert layout.parse_ref("smollm2", field="model") == ("smollm2", None)
    for wrong in ("smollm2@", "smollm2@0", "smollm2@x", "@1"):
        with pytest.raises(SpecError):
            layout.parse_ref(wrong, field="model")


@pytest.mark.parametrize("root", ["s3://bucket/prefix", "obs://bucket", "/var/tunesmith", "storage"])
def test_a_jobs_url_gives_its_root_and_id_again(root: str) -> None:
    assert layout.split_job_url(layout.join(root, layout.job_json("job-1"))) == (root, "job-1")


def test_a_url_that_is_no_jobs_is_refused() -> None:
    with pytest.raises(SpecError):
        layout.split_job_url("s3://bucket/models/x/1/manifest.json")


def imported_by(path: Path) -> set[str]:
    """The modules that a file imports, with the code that it holds as text."""
    tree = ast.parse(path.read_text())
    found = {f"{node.module}.{name.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             for name in node.names}  # fmt: skip
    found |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return found | {name for text in texts for name in re.findall(r"^\s*from (tests[\w.]+) import", text, re.MULTILINE)}


def test_no_test_imports_another_and_no_program_that_ships_imports_a_test() -> None:
    tests = {path: imported_by(path) for path in (ROOT / "tests").rglob("*.py")}
    shipped = {
        path: imported_by(path)
        for folder in ("platform", "trainers", "serve_app", "cluster_configs", "benchmarks", "demo", "examples")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(tests) > 50 and len(shipped) > 100
    assert [(path, name) for path, names in tests.items() for name in names if re.search(r"\.test_\w+", name)] == []
    assert [(path, name) for path, names in shipped.items() for name in names if re.match(r"tests\b", name)] == []


def test_what_tests_share_fits_one_folder() -> None:
    assert len(list((ROOT / "tests" / "support").glob("*.py"))) <= 20
