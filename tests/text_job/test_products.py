"""What a run leaves is whole and true: merged weights answer as the adapter does, half a checkpoint is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny
from trainers.recipe.device import pick_device
from trainers.recipe.lora import load_model
from trainers.recipe.strategy import trained_parameters
from trainers.text_job.products import merge, write_products
from tunesmith.errors import ModelError
from tunesmith.jobs.spec import TextJob

IDS = torch.arange(40).view(2, 20)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tiny.make_model(tmp_path / "base")
    (folder / "README.md").write_text("# the base's card\n")
    return folder


def make_job(**advanced: Any) -> TextJob:
    return tiny.train_job(tiny.hyperparameters(), tiny.advanced(**advanced))


def tuned(base: Path) -> Any:
    """The base with an adapter that changes its answers."""
    model = load_model(base, tiny.hyperparameters(), tiny.advanced(), pick_device()).eval()
    return tiny.at_work(model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


def test_adapter_and_merged_weights_load_in_stock_libraries_and_answer_alike(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tuned(base)
    ours = logits(model)
    write_products(model, trained_parameters(model), base, tmp_path / "new", make_job(), "/s")
    stock = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(stock), ours, atol=1e-2)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "new" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    torch.testing.assert_close(logits(adapted), ours, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merged), ours, atol=1e-4, rtol=0)
    assert merged.config.use_cache
    names = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert {"README.md", "config.json", "tokenizer.json", "training_logs/user_params.json"} <= names
    assert (tmp_path / "new" / "README.md").read_text() == "# the base's card\n"


def test_without_merge_adapter_the_new_model_holds_the_adapter_alone(base: Path, tmp_path: Path) -> None:
    model = tuned(base)
    write_products(model, trained_parameters(model), base, tmp_path / "new", make_job(merge_adapter=False), "/s")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.md", "adapter", "training_logs"]


def test_a_merge_that_leaves_out_the_scale_is_caught(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    plain = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: plain(self, name) / self.scaling[name])
    with pytest.raises(ModelError) as caught:
        merge(tuned(base))
    assert caught.value.code == "merge_failed"
