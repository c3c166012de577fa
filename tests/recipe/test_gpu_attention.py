"""What a GPU would be given, seen without one.

Torch's variable-length attention has its kernels stood in for by plain arithmetic.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import tiny
from trainers.recipe import collate
from trainers.recipe.collate import pack, pad
from trainers.recipe.device import pick_device
from trainers.recipe.kernels import attention
from trainers.recipe.lora import load_model
from trainers.recipe.loss import loss_sum
from trainers.text.shards import TokenizedRows
from trainers.text.tokenized_data import tokenize_rows

HEADS, KV_HEADS, WIDTH = 6, 2, 16
PACKS = ([9, 5], [7, 3, 1], [12, 2, 2, 8], [6])


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    # The kernels of a CPU, which torch does not have; a GPU's stay what they are.
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)
    yield
    torch.compiler.reset()


def test_the_gpus_attention_gives_what_the_cpus_does() -> None:
    for lengths in PACKS:
        _assert_same(_results(attention._attend_on_gpu, lengths), _results(_cpu, lengths))


def test_compiled_once_it_takes_packs_of_all_sizes() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attention._attend_on_gpu, dynamic=True, fullgraph=True, backend=backend)
    for lengths in PACKS:
        _assert_same(_results(compiled, lengths), _results(_cpu, lengths))
    assert len(graphs) == 1


@pytest.fixture(scope="module")
def rows() -> TokenizedRows:
    return tokenize_rows(
        tiny.sums(8),
        tiny.make_tokenizer(),
        hyperparameters=tiny.hyperparameters(),
        advanced=tiny.advanced(),
        training_type="text-question-answering",
    )


class Asked(TorchDispatchMode):
    """Keeps the operations whose result the host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.masks = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"):
            self.operations.append(name)
        kwargs = kwargs or {}
        self.masks += kwargs.get("attn_mask") is not None
        return function(*args, **kwargs)


@pytest.mark.parametrize("make_pass, reads", [(pack, 0), (pad, 1)])
def test_a_pass_makes_no_mask_and_packed_rows_never_make_the_host_wait(
    rows: TokenizedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pass: Callable[..., Any], reads: int
) -> None:
    monkeypatch.setattr(collate, "shares_beginnings", lambda device: False)  # as an accelerator does not
    device = pick_device()
    model = load_model(tiny.make_model(tmp_path), tiny.hyperparameters(), tiny.advanced(), device)
    model.to(device.torch_device)
    share = make_pass(rows, list(range(8)), device.torch_device)
    with Asked() as asked:
        loss_sum(model, share).backward()  # type: ignore[no-untyped-call]
    assert len(asked.operations) == reads  # transformers looks at the positions of rows that are not packed
    assert asked.masks == 0


def _results(attend: Callable[..., torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """Output, and gradients of query, key and value."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    states = [
        torch.randn(1, tokens, heads, WIDTH).transpose(1, 2).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    offsets = torch.tensor([sum(lengths[:number]) for number in range(len(lengths) + 1)], dtype=torch.int32)
    out = attend(*states, offsets, max(lengths), WIDTH**-0.5)
    return [out.detach(), *torch.autograd.grad(out, states, torch.randn(out.shape))]


def _cpu(query: Any, key: Any, value: Any, offsets: Any, longest: int, scale: float) -> torch.Tensor:
    made, _ = attention.attend(
        torch.nn.Module(), query, key, value, None, offsets=offsets, longest=longest, scaling=scale
    )
    return made


def _assert_same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def _shares(q: torch.Tensor, k: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token of a row takes from which, [heads, tokens, tokens], and the logsumexp of its scores."""
    scores = scale * torch.einsum("qhd,khd->hqk", q, _repeated(k, q))
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


def _repeated(states: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return states.repeat_interleave(like.shape[1] // states.shape[1], 1)


def _check(offsets: torch.Tensor, longest: int, is_causal: bool, window: list[int] | None) -> list[tuple[int, int]]:
    assert offsets.dtype == torch.int32
    borders = list(pairwise(offsets.tolist()))
    assert longest >= max(end - start for start, end in borders)
    assert is_causal and window == [-1, 0]
    return borders


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert scale is not None
    out, logsumexp = torch.empty_like(query), torch.empty(query.shape[1], query.shape[0])
    for start, end in _check(cu_seq_q, max_q, is_causal, window_size):
        shares, logsumexp[:, start:end] = _shares(query[start:end], key[start:end], scale)
        out[start:end] = torch.einsum("hqk,khd->qhd", shares, _repeated(value[start:end], query))
    return out, logsumexp, torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: torch.Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[torch.Tensor, ...]:
    assert scale is not None
    made = [torch.empty_like(states) for states in (query, key, value)]
    for start, end in _check(cu_seq_q, max_q, is_causal, window_size):
        q, k, v, grad = query[start:end], key[start:end], value[start:end], grad_out[start:end]
        shares, _ = _shares(q, k, scale)
        of_shares = torch.einsum("qhd,khd->hqk", grad, _repeated(v, q))
        of_scores = scale * shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True))
        made[0][start:end] = torch.einsum("hqk,khd->qhd", of_scores, _repeated(k, q))
        for whole, part in (
            (made[1], torch.einsum("hqk,qhd->khd", of_scores, q)),
            (made[2], torch.einsum("hqk,qhd->khd", shares, grad)),
        ):
            whole[start:end] = part.unflatten(1, (key.shape[1], -1)).sum(2)
    return tuple(made)
