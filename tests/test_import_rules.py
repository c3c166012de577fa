"""Each rule of imports catches an import that is planted against it; that all hold is shown by `make lint`."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = [contract["name"] for contract in PYPROJECT["tool"]["importlinter"]["contracts"]]

PLANTED = {
    "Rooms: the door and the trainers share the core and never import each other": (
        "serve_app.log_pages", "trainers.attempt.report"),
    "The core is light": ("tunesmith.clock", "torch"),
    "The core's rooms, upper ones first": ("tunesmith.storage.urls", "tunesmith.jobs.flavors"),
    "The trainers' rooms, upper ones first": ("trainers.text.shards", "trainers.recipe.trace"),
    "The front door's rooms, upper ones first": ("serve_app.routes.jobs", "serve_app.deploy"),
    "The recipe knows neither Ray nor storage nor attempts": ("trainers.recipe.trace", "ray"),
    "Text knows neither torch nor Ray": ("tunesmith.text.control_tokens", "torch"),
    "Users' programs know neither torch nor the recipe": ("trainers.isolation.cgroups", "trainers.recipe.loss"),
    "Whoever uses the API by Python loads neither database nor Ray nor torch": ("tunesmith.api.views", "sqlalchemy"),
    "No circle among the files of a package": ("tunesmith.errors", "tunesmith.settings"),
}  # fmt: skip
"""For each contract of the linter an import against it: the module that imports, and what."""


def lint(root: Path) -> tuple[dict[str, str], str]:
    """What became of each contract in the tree at `root`, and all that the linter says, on one line."""
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'platform'}", "COLUMNS": "1000"}
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    text = " ".join(done.stdout.split())
    return {
        name: match[1] for name in CONTRACTS if (match := re.search(f"{re.escape(name)} (KEPT|BROKEN)", text))
    }, text


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources."""
    skip = shutil.ignore_patterns("__pycache__", "skeletons", "*.so")
    for folder in ("platform", "trainers", "serve_app", "cluster_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_rule_of_imports_has_a_planted_import() -> None:
    assert set(PLANTED) == set(CONTRACTS)
    assert len(CONTRACTS) >= 8


def test_an_import_against_each_rule_is_caught(tree: Path) -> None:
    for importer, imported in PLANTED.values():
        place = tree / ("platform" if importer.startswith("tunesmith") else "") / f"{importer.replace('.', '/')}.py"
        with place.open("a", encoding="utf-8") as file:
            file.write(f"\nimport {imported}\n")
    found, text = lint(tree)
    assert found == dict.fromkeys(CONTRACTS, "BROKEN"), text
    for importer, imported in PLANTED.values():
        # A circle is told by names inside the package, and by the arrow that is the easiest to take away.
        names = [f".{name.split('.')[-1]}" for name in (importer, imported)]
        told = (f"{importer} -> {imported}", " -> ".join(names), " -> ".join(reversed(names)))
        assert any(each in text for each in told), (told, text)


def test_ray_train_is_imported_by_one_package_alone(tree: Path) -> None:
    (tree / "trainers" / "recipe" / "planted.py").write_text("import ray.train\n")
    (tree / "trainers" / "text_job" / "planted.py").write_text("import ray.train\n")
    command = [Path(sys.executable).parent / "ruff", "check", "--select", "TID251", "--output-format", "concise"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120, check=False)
    found = [line for line in done.stdout.splitlines() if "TID251" in line]
    assert [line.partition(":")[0] for line in found] == ["trainers/recipe/planted.py"]
