"""A model's own files name files beside them and nothing else, whoever is about to load it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny
from trainers.recipe.device import pick_device
from trainers.recipe.lora import load_model
from trainers.recipe.quantization import load_quantized
from trainers.registration.model_check import check_language_model
from tunesmith.assets.model_folder import read_model_folder
from tunesmith.assets.model_references import check_references
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.settings import Settings

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights lie in two files and an index."""
    from transformers import AutoModelForCausalLM

    folder = tiny.make_model(tmp_path_factory.mktemp("made") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / FIRST).is_file() and (folder / INDEX).is_file()
    (folder / "README.md").write_text("---\ntask_type: text-generation\n---\n")
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of it beside a folder `secret` with a model of other weights, as another account may have one."""
    shutil.copytree(made, tmp_path / "secret")
    return Path(shutil.copytree(made, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**there, **changes}))


def in_index(name: Any) -> Callable[[Path], None]:
    """One weight is said to lie in the file `name`."""

    def plant(folder: Path) -> None:
        weights = json.loads((folder / INDEX).read_text())["weight_map"]
        edit(folder / INDEX, weight_map={**weights, next(iter(weights)): name})

    return plant


def in_file(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, **changes)


def link(name: str, to: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return plant


def fifo(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def as_folder(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


OUTSIDE = [f"../secret/{FIRST}", "/etc/passwd", "/proc/self/environ", f"./{FIRST}", f"x/../{FIRST}", f"sub/{FIRST}"]
OUTSIDE += [
    f"..\\secret\\{FIRST}",
    f"{FIRST}\0.safetensors",
    "..",
    ".",
    "",
    f"{FIRST}/",
    "a\nb",
    "\x1b[2J",
    "~/x\u202e",
]
OUTSIDE += ["x" * 256, "file:///etc/passwd", "\\\\host\\share", "\ud800", 7, ["a"], {"a": 1}, True, "gone.safetensors"]
DEEP = "[" * 900 + "]" * 900
OPENED: dict[str, Callable[[Path], None]] = {
    **{f"index {str(name)[:30]!a}": in_index(name) for name in OUTSIDE},
    "another index": write("pytorch_model.bin.index.json", '{"weight_map": {"a": "../secret/pytorch_model.bin"}}'),
    "an index without weights": in_file(INDEX, weight_map={}),
    "an index that is a list": in_file(INDEX, weight_map=[FIRST]),
    "an index that is no JSON": write(INDEX, "{"),
    "an index of depths": write(INDEX, "[" * 5000),
    "a name of 900 levels": write(INDEX, f'{{"weight_map": {{"a": {DEEP}}}}}'),
    "a file of 900 levels": write("tokenizer_config.json", f'{{"a_file": {DEEP}}}'),
    "config files of 900 levels": write("config.json", f'{{"configuration_files": {{"a": {DEEP}}}}}'),
    "an index that is a link": link(INDEX, f"../secret/{INDEX}"),
    "a part that is a link": link(FIRST, f"../secret/{FIRST}"),
    "a part that is a pipe": fifo,
    "a part that is a folder": as_folder,
    "a part that is gone": lambda folder: (folder / FIRST).unlink(),
    "a part that is not listed": write("model-00003-of-00003.safetensors", "x"),
    "config.4 outside": in_file("config.json", configuration_files=["../secret/config.4.0.0.json"]),
    "config.4 anywhere": in_file("config.json", configuration_files=["/etc/config.4.0.0.json"]),
    "config files as text": in_file("config.json", configuration_files="../secret/config.4.0.0.json"),
    "weights by the config": in_file("config.json", transformers_weights="../secret/model.safetensors"),
    "weights by the config, below": in_file("config.json", transformers_weights="a/model.safetensors"),
    "tokenizer.4 outside": in_file("tokenizer_config.json", fast_tokenizer_files=["../secret/tokenizer.4.0.json"]),
    "tokenizer_file": in_file("tokenizer_config.json", tokenizer_file="../secret/tokenizer.json"),
    "vocab_file": in_file("tokenizer_config.json", vocab_file="/etc/passwd"),
    "merges_file": in_file("tokenizer_config.json", merges_file="/proc/self/environ"),
    "a file of special tokens": in_file("special_tokens_map.json", vocab_file="/etc/passwd"),
    "code outside": in_file("config.json", auto_map={"AutoConfig": "../secret/code.Config"}),
    "code in a repository": in_file("config.json", auto_map={"AutoConfig": "someone/x--../../code.Config"}),
    "code of a tokenizer": in_file("tokenizer_config.json", auto_map={"AutoTokenizer": ["/x.T", None]}),
}


def same(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("plant", OPENED.values(), ids=OPENED)
def test_a_name_that_leads_elsewhere_is_refused_by_whoever_loads(plant: Callable[[Path], None], model: Path) -> None:
    plant(model)
    before = same(model.parent / "secret")
    h, advanced = tiny.hyperparameters(), tiny.advanced()
    with pytest.raises(ModelError) as caught:
        check_references(model)
    assert "\x1b" not in caught.value.message and caught.value.fields == ["source"]
    with pytest.raises(ModelError):
        load_model(model, h, advanced, pick_device())
    with pytest.raises(ModelError):
        load_quantized(model, 4, torch.float32, pick_device())
    with pytest.raises(TunesmithError):
        read_model_folder(model)
    assert same(model.parent / "secret") == before


def test_the_refusal_names_the_file_and_the_name(model: Path) -> None:
    in_index(f"../secret/{FIRST}")(model)
    with pytest.raises(ModelError, match=rf"{INDEX}: weight_map of \S+ names '../secret/{FIRST}', which is a path"):
        check_references(model)


@pytest.mark.slow
def test_the_process_that_loads_at_registration_refuses_it_too(model: Path) -> None:
    in_index(f"../secret/{FIRST}")(model)
    settings = Settings.from_env({"TUNESMITH_HOME": str(model.parent / "home")})
    with pytest.raises(ModelError, match="which is a path"):
        check_language_model(model, settings=settings)


CARRIED = {
    "config.json": {"_name_or_path": "/data/checkpoints/mine"},
    "tokenizer_config.json": {
        "name_or_path": "/home/me/x",
        "special_tokens_map_file": "../secret/special_tokens_map.json",
    },
}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_where_a_model_comes_from_may_be_told_and_is_not_opened(model: Path, file: str) -> None:
    """Models in use say on which machine they were made; nothing is taken from there."""
    from transformers import AutoTokenizer

    secret = model.parent / "secret"
    edit(secret / "special_tokens_map.json", eos_token="<|user|>")
    edit(model / file, **CARRIED[file])
    check_references(model)
    loaded = load_model(model, tiny.hyperparameters(), tiny.advanced(), pick_device())
    assert loaded.num_parameters() > 0
    assert AutoTokenizer.from_pretrained(model).eos_token == "<|end|>"
