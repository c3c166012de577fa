"""The documents are true to the code that they speak of, and lead to what is there."""

import re
from pathlib import Path

from tunesmith.jobs.states import MOVES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
CONTRACTS = (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")


def section(number: int) -> str:
    """The text of one section of the contracts."""
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", CONTRACTS, re.MULTILINE | re.DOTALL)
    assert found is not None, number
    return found[0]


def test_links_between_documents_lead_to_files() -> None:
    links = {
        (path.name, target)
        for path in DOCUMENTS
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
        if "://" not in target and not (path.parent / target).exists()
    }
    assert len(DOCUMENTS) > 8
    assert links == set()


def test_code_refers_to_sections_of_the_contracts_that_are_there() -> None:
    named = [
        int(number)
        for folder in ("platform", "trainers", "serve_app", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for number in re.findall(r"contracts\.md, section (\d+)", path.read_text(encoding="utf-8"))
    ]
    assert len(named) > 8
    assert all(section(number) for number in named)


def test_the_moves_of_a_job_are_those_of_the_contracts() -> None:
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*) \|$", section(6), re.MULTILINE)
    told = {state: frozenset(re.findall(r"`(\w+)`", to)) for state, to in rows}
    assert told == {state: to for state, to in MOVES.items() if to}


def test_the_architecture_names_every_package_and_no_module_that_is_not_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = ("platform/tunesmith", "trainers", "serve_app")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.*")]
    named = set(re.findall(r"`(\w+\.(?:py|c))`", text))
    assert len(named) > 60
    assert {name for name in named if all(path.name != name for path in files)} == set()
    packages = {path.parent.name for path in files if path.name == "__init__.py"} - {"tunesmith", "versions"}
    assert {package for package in packages if f"{package}/" not in text} == set()
