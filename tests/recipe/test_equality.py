"""One global batch gives one loss and one gradient, however it is split, laid out and shared out."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from tests.support import tiny, workers
from trainers.recipe import lora, training_loop
from trainers.recipe.ddp import Flat
from trainers.recipe.device import pick_device
from trainers.recipe.kernels import attention, native
from trainers.recipe.kernels.attention import ROWS, attend, why_not_packed
from trainers.recipe.strategy import Worker
from trainers.recipe.training_loop import Hooks, Outcome, train
from tunesmith.errors import ModelError

BATCH = 16
TOLERANCE = 2e-5
"""Largest difference of a tensor's gradient, as a share of its largest entry; of the loss, as a share of it."""

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"), head_width=16)


def moved_model(folder: Path, *options: Any) -> Any:
    """A model whose adapter is at work: with B all zero, as it begins, A has no gradient."""
    model = lora.load_model(folder, *options)
    return tiny.at_work(model)


@pytest.fixture(autouse=True)
def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "load_model", moved_model)


@pytest.fixture(scope="module")
def by_hand(model_folder: Path) -> tuple[float, Gradients]:
    """Loss and gradients by transformers and peft alone, row by row."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ours = moved_model(model_folder, tiny.hyperparameters(), tiny.advanced(), pick_device())
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).train()
    stock.load_state_dict(ours.state_dict())
    rows, total = tiny.tokens(BATCH), 0.0
    count = sum(int(rows.trained(row)[1:].sum()) for row in range(BATCH))
    for row in range(BATCH):
        ids = torch.from_numpy(rows.ids(row).copy()).long()
        labels = torch.where(torch.from_numpy(rows.trained(row)), ids, -100)
        share = stock(input_ids=ids[None], labels=labels[None]).loss * int((labels[1:] != -100).sum()) / count
        share.backward()
        total += float(share.detach())
    return total, gradients(stock)


def gradients(model: Any) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(folder: Path, *, rows: int, passes: int, packing: str, worker: Worker = Worker(), **options: Any) -> Outcome:
    """One step of the recipe; its gradients are left in the model, and its loss in `losses`."""
    losses: list[float] = options.pop("losses")
    return train(
        folder,
        tiny.tokens(BATCH),
        None,
        hyperparameters=tiny.hyperparameters(
            per_device_train_batch_size=rows, gradient_accumulation_steps=passes, max_grad_norm=1e6, lora_rank=4
        ),
        advanced=tiny.advanced(packing=packing),
        hooks=Hooks(
            report=lambda step, values: losses.append(values["loss"]),
            save=lambda step, folder: None,
            should_stop=lambda: False,
        ),
        worker=worker,
        **options,
    )


def difference(made: tuple[float, Gradients], right: tuple[float, Gradients]) -> float:
    """The largest there is, of the loss and of any tensor, each in its own measure."""
    assert made[1].keys() == right[1].keys()
    assert all(float(tensor.abs().max()) > 0 for tensor in right[1].values())
    shares = [abs(made[0] - right[0]) / right[0]]
    shares += [float((made[1][name] - there).abs().max() / there.abs().max()) for name, there in right[1].items()]
    return max(shares)


def of_one_worker(folder: Path, **options: Any) -> tuple[float, Gradients]:
    losses: list[float] = []
    outcome = step(folder, losses=losses, **options)
    return losses[0], gradients(outcome.model)


def _on_worker(rank: int, world_size: int, folder: Path, meet: Path, packing: str, queue: Any) -> None:
    training_loop.load_model = moved_model
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=world_size)
    made = of_one_worker(
        folder, rows=BATCH // world_size // 2, passes=2, packing=packing, worker=Worker(rank, world_size, 0)
    )
    torch.distributed.barrier()
    if rank == 0:
        # As numbers: a tensor in a queue lives no longer than its process.
        queue.put((made[0], {name: tensor.tolist() for name, tensor in made[1].items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize(("rows", "passes"), [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)])
def test_every_split_of_a_batch(
    model_folder: Path, by_hand: tuple[float, Gradients], rows: int, passes: int, packing: str
) -> None:
    assert difference(of_one_worker(model_folder, rows=rows, passes=passes, packing=packing), by_hand) < TOLERANCE


@pytest.mark.parametrize("pass_tokens", [40, 150])
def test_passes_of_few_tokens(
    model_folder: Path, by_hand: tuple[float, Gradients], monkeypatch: pytest.MonkeyPatch, pass_tokens: int
) -> None:
    monkeypatch.setattr(training_loop, "PASS_TOKENS", {"cpu": pass_tokens})
    assert difference(of_one_worker(model_folder, rows=16, passes=1, packing="auto"), by_hand) < TOLERANCE


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_without_a_c_compiler(
    model_folder: Path, by_hand: tuple[float, Gradients], monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr(native, "why_missing", lambda: "there is no C compiler")
    assert difference(of_one_worker(model_folder, rows=4, passes=4, packing=packing), by_hand) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_number_of_workers(
    model_folder: Path, by_hand: tuple[float, Gradients], tmp_path: Path, world_size: int, packing: str
) -> None:
    queue = workers.CONTEXT.SimpleQueue()
    workers.run_on(world_size, _on_worker, world_size, model_folder, tmp_path / "meet", packing, queue)
    loss, named = queue.get()
    assert difference((loss, {name: torch.tensor(there) for name, there in named.items()}), by_hand) < TOLERANCE


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.slow
def test_compiled_layers(model_folder: Path, by_hand: tuple[float, Gradients]) -> None:
    made = of_one_worker(model_folder, rows=4, passes=4, packing="auto", compiled=True)
    assert difference(made, by_hand) < TOLERANCE


def test_a_mean_of_means_is_seen(
    model_folder: Path, by_hand: tuple[float, Gradients], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Flat.backward
    monkeypatch.setattr(
        Flat, "backward", lambda self, rows, weight, last: right(self, rows, 1 / (4 * len(rows.targets)), last=last)
    )
    for packing in ("auto", "off"):
        made = of_one_worker(model_folder, rows=4, passes=4, packing=packing)
        assert difference(made, by_hand) > 100 * TOLERANCE


@pytest.fixture
def leak() -> Iterator[None]:
    """Attention over packed rows that sees the rows before."""

    def leaky(*states: Any, offsets: torch.Tensor, **options: Any) -> Any:
        return attend(*states, offsets=offsets[[0, -1]], **options)

    AttentionInterface.register(ROWS, leaky)
    yield
    AttentionInterface.register(ROWS, attend)


@pytest.mark.usefixtures("leak")
def test_a_leak_between_packed_rows_is_seen(
    model_folder: Path, by_hand: tuple[float, Gradients], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "why_not_packed", lambda model, longest: None)
    made = of_one_worker(model_folder, rows=4, passes=4, packing="auto")
    assert difference(made, by_hand) > 100 * TOLERANCE


@pytest.mark.usefixtures("leak")
def test_a_model_that_would_leak_is_not_packed(model_folder: Path, by_hand: tuple[float, Gradients]) -> None:
    model = moved_model(model_folder, tiny.hyperparameters(), tiny.advanced(), pick_device())
    assert "one row would see another" in (why_not_packed(model, 64) or "")
    assert difference(of_one_worker(model_folder, rows=4, passes=4, packing="auto"), by_hand) < TOLERANCE
    with pytest.raises(ModelError, match="one row would see another") as caught:
        of_one_worker(model_folder, rows=4, passes=4, packing="on")
    assert caught.value.fields == ["advanced.packing"]


@pytest.mark.parametrize("unusual", [{"sliding_window": 40}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_attention_of_another_kind_is_not_packed(
    model_folder: Path, unusual: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moved_model(model_folder, tiny.hyperparameters(), tiny.advanced(), pick_device())
    unlike: Callable[..., Any] = lambda *states, **options: attend(*states, **{**options, **unusual})  # noqa: E731
    AttentionInterface.register(ROWS, unlike)
    try:
        assert "cannot do it" in (why_not_packed(model, 64) or "")
        if "sliding_window" in unusual:
            assert why_not_packed(model, 40) is None
    finally:
        AttentionInterface.register(ROWS, attend)
    assert attention.why_not_packed(model, 64) is None
