"""The promises of the layout: source root, import layers' ground, names."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

from tunesmith.errors import SpecError
from tunesmith.storage import layout

ROOT = Path(__file__).parents[1]
SOURCES = ("platform", "trainers", "serve_app", "cluster_configs", "benchmarks", "demo", "examples")


def test_platform_is_a_source_root_and_hides_nothing() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform; print(platform.system())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def loaded_by(code: str) -> set[str]:
    """The top packages that a fresh interpreter has loaded after `code`."""
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    ask = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", ask], env=path, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_whole_core_loads_neither_torch_nor_a_web_framework() -> None:
    names = [
        ".".join(path.relative_to(ROOT / "platform").with_suffix("").parts)
        for path in sorted((ROOT / "platform" / "tunesmith").rglob("*.py"))
        # Programs of models, and what runs inside of alembic.
        if not {"skeletons", "env.py"} & {*path.parts}
    ]
    assert len(names) > 50
    loaded = loaded_by(f"import importlib\nfor name in {names}: importlib.import_module(name)")
    assert "tunesmith" in loaded and "sqlalchemy" in loaded
    assert loaded & {"torch", "transformers", "peft", "deepspeed", "fastapi", "starlette"} == set()


def test_the_client_loads_neither_database_nor_ray_nor_torch() -> None:
    loaded = loaded_by("import tunesmith.api.client")
    assert {"tunesmith", "httpx"} <= loaded
    assert loaded & {"sqlalchemy", "alembic", "ray", "torch", "boto3", "numpy", "pyarrow"} == set()


def modules() -> dict[Path, ast.Module]:
    """Every module of the sources."""
    return {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for folder in SOURCES
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def test_no_folder_has_more_than_twenty_modules_beside_each_other() -> None:
    beside = Counter(path.parent for path in modules() if path.name != "__init__.py")
    assert len(beside) > 20
    assert {folder: number for folder, number in beside.items() if number > 20} == {}


def test_no_function_is_longer_than_sixty_lines() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 1000
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph("tunesmith", "trainers", "serve_app", "cluster_configs", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    # Raises CycleError, which names the circle.
    TopologicalSorter(imports).prepare()


def test_the_core_names_nothing_above_it() -> None:
    core = ROOT / "platform" / "tunesmith"
    named = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in core.rglob("*.py")
        if path.relative_to(core).parts[0] not in ("local", "cli")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.search(r"\b(trainers|serve_app)\b", node.value)
    }
    assert named == set()


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
    shipped = {path: imported_by(path) for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    assert len(tests) > 50 and len(shipped) > 100
    assert [(path, name) for path, names in tests.items() for name in names if re.search(r"\.test_\w+", name)] == []
    assert [(path, name) for path, names in shipped.items() for name in names if re.match(r"tests\b", name)] == []


def test_two_processes_that_test_at_once_take_whole_files(request: pytest.FixtureRequest) -> None:
    """Without groups each of them would start the platform that files share, and order all its jobs."""
    (group,) = [mark.args[0] for mark in request.node.iter_markers("xdist_group")]
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith(f"@{group}")


def test_what_tests_share_fits_one_folder() -> None:
    assert len(list((ROOT / "tests" / "support").glob("*.py"))) <= 20


def test_functions_take_at_most_four_arguments_by_position() -> None:
    """Further arguments are given by name, so that two of them cannot be swapped unnoticed."""
    # Operators of torch, which the recipe has, take their arguments by position.
    rooms = [ROOT / room for room in ("platform", "serve_app", "demo", "trainers/attempt", "trainers/text")]
    taken = {
        f"{path.relative_to(ROOT)} {node.name}": len([*node.args.posonlyargs, *node.args.args])
        - (node.args.args[:1] != [] and node.args.args[0].arg in ("self", "cls"))
        for path, tree in modules().items()
        if any(path.is_relative_to(room) for room in rooms)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    # What pickle calls.
    del taken["platform/tunesmith/errors.py _rebuild"]
    assert len(taken) > 500
    assert {name: count for name, count in taken.items() if count > 4} == {}
