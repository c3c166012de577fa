"""`gallery_train/` is read without being run, and what is wrong with it is named by file, line and key."""

# ruff: noqa: E501
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import galleries
from tunesmith.assets.cards import read_card
from tunesmith.assets.gallery import MAX_PROBLEMS, Gallery, advanced, fill_in, read_gallery
from tunesmith.assets.model_folder import read_model_folder
from tunesmith.assets.train_params import Method
from tunesmith.errors import DataError, ModelError, SpecError

PARAMS = "gallery_train/train_params.json"


def read(folder: Path) -> Gallery:
    gallery = read_gallery(folder, read_card(folder))
    assert gallery is not None
    return gallery


def problems(folder: Path, text: str | None = None) -> list[str]:
    """With this text as train_params.json."""
    made = galleries.make(folder / "model")
    if text is not None:
        (made / PARAMS).write_text(text)
    return read(made).problems


def test_a_whole_folder_is_read_with_what_is_more_kept(tmp_path: Path) -> None:
    parameters = json.loads(json.dumps(galleries.PARAMETERS))
    parameters["training_methods"][0]["hyperparameters"][0]["unit"] = "per step"
    parameters["training_methods"][0]["title"] = "全参"
    gallery = read(galleries.make(tmp_path / "model", parameters=parameters))
    assert gallery.problems == []
    again = Gallery.model_validate_json(gallery.model_dump_json())
    assert [method.name for method in again.methods] == ["full", "head"]
    shown = again.model_dump()["methods"][0]
    assert (shown["title"], shown["hyperparameters"][0]["unit"]) == ("全参", "per step")
    first, second = again.methods[0].hyperparameters[:2]
    assert (first.default, first.required, second.type, second.default) == (0.001, True, "int", 10)


def test_a_model_that_says_nothing_of_its_own_training_has_no_gallery(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntask_type: x\n---\n")
    assert read_gallery(tmp_path, read_card(tmp_path)) is None


def empty(name: str) -> Callable[[Path], None]:
    return lambda gallery: (gallery / name).write_text(" \n")  # type: ignore[func-returns-value]


def missing(name: str) -> Callable[[Path], None]:
    return lambda gallery: (gallery / name).unlink()


def folder_named(name: str) -> Callable[[Path], None]:
    def change(gallery: Path) -> None:
        (gallery / name).unlink()
        (gallery / name).mkdir()

    return change


def link(name: str) -> Callable[[Path], None]:
    def change(gallery: Path) -> None:
        (gallery / name).unlink()
        (gallery / name).symlink_to("/etc/passwd")

    return change


@pytest.mark.parametrize("name", ["train.py", "train_params.json", "dataset_readme.md"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [(missing, "is missing"), (empty, "is empty"), (folder_named, "is not a file"), (link, "is a link")],
)
def test_a_needed_file_that_is_missing_or_empty_or_none_is_named(
    tmp_path: Path, name: str, spoil: Callable[[str], Callable[[Path], None]], says: str
) -> None:
    folder = galleries.make(tmp_path / "model")
    spoil(name)(folder / "gallery_train")
    (problem,) = read(folder).problems
    assert problem.startswith(f"gallery_train/{name} {says}")


def test_requirements_may_be_missing_or_empty_and_are_checked_where_they_are(tmp_path: Path) -> None:
    assert read(galleries.make(tmp_path / "a", requirements_txt="")).problems == []
    folder = galleries.make(tmp_path / "b")
    (folder / "gallery_train" / "requirements.txt").write_bytes(b"numpy\nscipy \xff\n")
    assert read(folder).problems == ["gallery_train/requirements.txt:2: not UTF-8 (byte 0xff at offset 12)"]


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    folder = galleries.make(tmp_path / "model")
    os.truncate(folder / PARAMS, (1 << 20) + 1)
    assert read(folder).problems == [f"{PARAMS} has 1048577 bytes; allowed are 1048576"]


def test_what_is_no_python_is_found_before_it_runs(tmp_path: Path) -> None:
    (problem,) = read(galleries.make(tmp_path / "model", "x = 1\ny = (\n")).problems
    assert problem == "gallery_train/train.py:2: not Python: '(' was never closed"
    assert "not Python" in read(galleries.make(tmp_path / "nul", "x = 1\0\n")).problems[0]


M = '{"training_methods": [\n  {"name": "full",\n   "hyperparameters": [\n     '
E = "\n   ]}]}"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('{"training_methods": [\n  {"name": "full",,', 2, "not JSON: Expecting property name enclosed in double quotes at column 19"),
        ("[" * 100_000, 1, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", 1, "not JSON that can be read: Exceeds the limit"),
        ("[]", 1, "training_methods: must be a list of methods"),
        ('{"training_methods": {}}', 1, "training_methods: must be a list of methods"),
        ('{"training_methods": [\n]}', 1, "training_methods: is empty"),
        ('{"training_methods": [\n 3]}', 2, "training_methods[0]: must be an object, got 3"),
        ('{"training_methods": [\n {"hyperparameters": []}]}', 2, "training_methods[0].name: is missing"),
        ('{"training_methods": [\n {"name": "a"}]}', 2, "training_methods[0].hyperparameters: is missing; it may be []"),
        ('{"training_methods": [{"name": "a", "hyperparameters": []},\n{"name": "a", "hyperparameters": []}]}', 2,
         "training_methods[1].name: 'a' is the name of another method already"),
        ('{"training_methods": [{"name": "a b",\n "hyperparameters": {}}]}', 2,
         "training_methods[0].hyperparameters: must be a list, got {}"),
        (f'{M}{{"name": "l-r", "type": "int"}}{E}', 4, "hyperparameters[0].name: must be 1 to 64 letters, digits and '_', got 'l-r'"),
        (f'{M}{{"name": "学习率", "type": "int"}}{E}', 4, "must be 1 to 64 letters, digits and '_', got '学习率'"),
        (f'{M}{{"name": "lr"}}{E}', 4, "hyperparameters[0].type: is missing"),
        (f'{M}{{"name": "lr", "type": "double"}}{E}', 4, "hyperparameters[0].type: must be int, float, str, bool, got 'double'"),
        (f'{M}{{"name": "lr", "type": ["int"]}}{E}', 4, "must be int, float, str, bool, got ['int']"),
        (f'{M}{{"name": "lr", "type": "int"}},\n{{"name": "lr", "type": "int"}}{E}', 5, "'lr' is the name of another hyperparameter already"),
        (f'{M}{{"name": "lr", "type": "int",\n "type": "float"}}{E}', 5, "hyperparameters[0].type: is given twice"),
        (f'{M}{{"name": "lr", "type": "int", "required": 1}}{E}', 4, "hyperparameters[0].required: must be true or false, got 1"),
        (f'{M}{{"name": "lr", "type": "int", "help": 1}}{E}', 4, "hyperparameters[0].help: must be text, got 1"),
        (f'{M}{{"name": "lr", "type": "int", "default": true}}{E}', 4, "hyperparameters[0].default: must be of type int, got True"),
        (f'{M}{{"name": "lr", "type": "int", "default": 1.0}}{E}', 4, "hyperparameters[0].default: must be of type int, got 1.0"),
        (f'{M}{{"name": "lr", "type": "float", "default": "1"}}{E}', 4, "must be of type float, got '1'"),
        (f'{M}{{"name": "lr", "type": "float", "default": 1e999}}{E}', 4, "must be of type float, got inf"),
        (f'{M}{{"name": "lr", "type": "bool", "default": 1}}{E}', 4, "must be of type bool, got 1"),
        (f'{M}{{"name": "lr", "type": "str", "default": 1}}{E}', 4, "must be of type str, got 1"),
        (f'{M}{{"name": "lr", "type": "float",\n "default": NaN}}{E}', 5, "hyperparameters[0].default: must be a number, got NaN"),
        (f'{M}{{"name": "lr", "type": "int", "unit": -Infinity}}{E}', 4, "hyperparameters[0].unit: must be a number, got -Infinity"),
        (f'{M}{{"name": "lr", "type": "int", "help": "\\ud800"}}{E}', 4, "holds text that has no UTF-8 form"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named_with_line_and_key(tmp_path: Path, text: str, line: int, says: str) -> None:
    found = problems(tmp_path, text)
    assert any(each.startswith(f"{PARAMS}:{line}: ") and says in each for each in found), found


def test_all_problems_are_told_at_once_up_to_a_limit(tmp_path: Path) -> None:
    methods = [{"name": f"m{number}"} for number in range(MAX_PROBLEMS + 5)]
    found = problems(tmp_path, json.dumps({"training_methods": methods}))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1] == "and 5 more"


def test_lines_are_right_in_any_form_of_json(tmp_path: Path) -> None:
    text = '{"x": ["a\\"{[", {"training_methods": 1}],\r\n\t"training_methods"\n:\n[{"name"\n:\t"\\u0061","hyperparameters"\n: 7}]}'
    assert problems(tmp_path, text) == [f"{PARAMS}:5: training_methods[0].hyperparameters: must be a list, got 7"]


IMAGE = "Train_image_url: registry/train:1\n"


@pytest.mark.parametrize(
    ("card", "says"),
    [
        (f"{IMAGE}Train_command_path: /opt/train.sh\n", None),
        (f"{IMAGE}Train_command_path: weights.py\n", "README.md:5: Train_command_path names no file of the model: 'weights.py'"),
        (f"{IMAGE}Train_command_path: ../train.py\n", "README.md:5: Train_command_path is '../train.py', which has the part '..'"),
        (f"{IMAGE}Train_command_path: /opt/train\n", "README.md:5: Train_command_path must end in .py or .sh"),
        (IMAGE, "README.md: Train_command_path is missing"),
        ("Train_image_url: 3\nTrain_command_path: /a.py\n", "README.md:4: Train_image_url must be text, got 3"),
        ("Train_command_path: /a.py\n", "README.md:4: Train_command_path is for a Train_image_url"),
        ("Train_command_path:\nTrain_image_url: ''\n", None),
    ],
)  # fmt: skip
def test_the_cards_image_and_command_go_together(tmp_path: Path, card: str, says: str | None) -> None:
    found = read(galleries.make(tmp_path / "model", card=card)).problems
    assert found == [] if says is None else found[0].startswith(says), found


def test_train_py_is_not_needed_with_an_image(tmp_path: Path) -> None:
    folder = galleries.make(tmp_path / "model", card=f"{IMAGE}Train_command_path: /opt/train.sh\n")
    (folder / "gallery_train" / "train.py").unlink()
    assert read(folder).problems == []
    (folder / "gallery_train" / "dataset_readme.md").unlink()
    assert read(folder).problems == ["gallery_train/dataset_readme.md is missing"]


def test_a_card_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntask_type: x\na: [1\n---\n")
    with pytest.raises(ModelError, match=r"README.md:[34]: the front matter is not YAML"):
        read_card(tmp_path)


def test_a_link_anywhere_in_a_model_is_refused(tmp_path: Path) -> None:
    folder = galleries.make(tmp_path / "model")
    (folder / "data").symlink_to("/etc")
    with pytest.raises(DataError, match="data is a link"):
        read_model_folder(folder)


def method(*parameters: Any) -> Method:
    return Method.model_validate({"name": "full", "hyperparameters": list(parameters)})


FULL = Method.model_validate(galleries.PARAMETERS["training_methods"][0])


def test_defaults_are_filled_in_and_what_is_optional_may_stay_away() -> None:
    assert fill_in(FULL, {"labels": "y"}) == {"lr": 0.001, "max_epochs": 10, "labels": "y"}
    assert fill_in(FULL, {"labels": "y", "max_epochs": None, "lr": 1, "note": "n"}) == {
        "lr": 1.0,
        "note": "n",
        "labels": "y",
    }
    whole = fill_in(method({"name": "lr", "type": "float", "default": 1}), {})
    assert (whole, type(whole["lr"])) == ({"lr": 1.0}, float)


@pytest.mark.parametrize(
    ("given", "code", "field", "says"),
    [
        ({}, "missing_hyperparameter", "labels", "method 'full' needs labels"),
        ({"labels": "y", "lr": None}, "invalid_hyperparameter", "lr", "lr must be of type float, got None"),
        ({"labels": "y", "max_epochs": True}, "invalid_hyperparameter", "max_epochs", "must be of type int, got True"),
        ({"labels": "y", "max_epochs": 2.0}, "invalid_hyperparameter", "max_epochs", "must be of type int, got 2.0"),
        ({"labels": 3}, "invalid_hyperparameter", "labels", "must be of type str, got 3"),
        ({"labels": "y", "lr": float("nan")}, "invalid_hyperparameter", "lr", "must be of type float, got nan"),
        ({"labels": "y", "seed": 1}, "unknown_hyperparameter", "seed", "method 'full' has no hyperparameter 'seed'"),
    ],
)
def test_a_hyperparameter_that_is_not_the_methods_is_refused(
    given: dict[str, Any], code: str, field: str, says: str
) -> None:
    with pytest.raises(SpecError) as caught:
        fill_in(FULL, given)
    assert (caught.value.code, caught.value.fields) == (code, [f"hyperparameters.{field}"])
    assert says in caught.value.message


def test_values_that_no_variable_can_hold_are_refused() -> None:
    assert fill_in(FULL, {"labels": "y" * 99_000})
    with pytest.raises(SpecError, match="allowed are 100000"):
        fill_in(FULL, {"labels": "\0" * 20_000})


def test_an_unknown_hyperparameter_names_the_nearest() -> None:
    with pytest.raises(SpecError) as caught:
        fill_in(FULL, {"label": "y"})
    assert caught.value.hint == "did you mean labels?"


def test_only_what_makes_sense_without_the_recipe_is_taken_under_advanced() -> None:
    assert advanced({}).max_retries == 3
    assert advanced({"max_retries": 0}).max_retries == 0
    with pytest.raises(SpecError, match=r"advanced\.seed belongs to the built-in recipe"):
        advanced({"seed": 1})
    with pytest.raises(SpecError, match="there is no hyperparameter 'max_retry'"):
        advanced({"max_retry": 1})
