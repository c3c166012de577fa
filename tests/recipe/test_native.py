"""What is our own on a CPU gives what torch gives, in double precision, for every shape."""

import logging
import resource
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tests.support import workers
from trainers.recipe.kernels import attention, matmul, native
from trainers.recipe.memory import is_out_of_memory

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
TOLERANCE = 2e-6
"""Norm of the difference, as a share of the norm."""


def far(made: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(made.double() - right.detach()) / torch.linalg.vector_norm(right.detach()))


def by_torch(states: list[torch.Tensor], offsets: list[int], scale: float) -> torch.Tensor:
    """Each row whole, with the beginning that all share in front of it; of the beginning, what the first row has."""
    shared = offsets[0]
    rows = []
    for start, end in pairwise(offsets):
        whole = [torch.cat((state[:, :, :shared], state[:, :, start:end]), dim=2) for state in states]
        row = F.scaled_dot_product_attention(*whole, is_causal=True, scale=scale, enable_gqa=True)
        rows.append(row if start == shared else row[:, :, shared:])
    return torch.cat(rows, dim=2).transpose(1, 2)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 16), (2, 1, 80), (8, 2, 128)])
@pytest.mark.parametrize("shared", [0, 1, 24, 71])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_and_its_gradients(heads: int, kv_heads: int, width: int, shared: int, threads: int) -> None:
    torch.manual_seed(0)
    lengths = [1, 2, 5, 6, 7, 47, 48, 49, 63, 64, 65, 131]
    offsets = torch.tensor([shared, *lengths]).cumsum(0).to(torch.int32)
    tokens = int(offsets[-1])
    # Queries laid out by tokens, as a model makes them; keys by heads; values with something between.
    query = torch.randn(1, tokens, heads, width).transpose(1, 2)
    key = torch.randn(1, kv_heads, tokens, width)
    value = torch.randn(1, tokens, kv_heads, 2 * width)[..., :width].transpose(1, 2)
    grad = torch.randn(1, tokens, heads, width)
    right = [state.double().requires_grad_() for state in (query, key, value)]
    wanted = by_torch(right, offsets.tolist(), 0.2)
    wanted_grads = torch.autograd.grad(wanted, right, grad.double())

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, logsumexp = native.attend(query, key, value, offsets, 0.2)
        made = native.attend_backward(grad, query, key, value, out, logsumexp, offsets, 0.2)
    finally:
        torch.set_num_threads(before)

    assert far(out, wanted) < TOLERANCE
    assert [one.shape for one in made] == [query.shape, key.shape, value.shape]
    assert all(far(one, there) < TOLERANCE for one, there in zip(made, wanted_grads, strict=True))


def test_attention_of_large_scores_stays_finite() -> None:
    torch.manual_seed(0)
    query, key, value = (100 * torch.randn(1, 2, 40, 16) for _ in range(3))
    out, logsumexp = native.attend(query, key, value, torch.tensor([0, 40], dtype=torch.int32), 1.0)
    right = by_torch([query.double(), key.double(), value.double()], [0, 40], 1.0)
    assert far(out, right) < TOLERANCE
    grads = native.attend_backward(
        out, query, key, value, out, logsumexp, torch.tensor([0, 40], dtype=torch.int32), 1.0
    )
    assert all(bool(one.isfinite().all()) for one in grads)


def test_what_is_not_a_number_is_not_hidden() -> None:
    states = [torch.randn(1, 1, 20, 16) for _ in range(3)]
    states[1][0, 0, 3, 5] = float("nan")
    out, _ = native.attend(states[0], states[1], states[2], torch.tensor([0, 20], dtype=torch.int32), 1.0)
    assert bool(out[0, :3].isfinite().all())
    assert bool(out[0, 3:].isnan().all())


@pytest.mark.parametrize("rank", [1, 4, 8, 11, 16, 64])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 16), (7, 48), (50, 576), (131, 1536)])
def test_thin_products(tokens: int, columns: int, rank: int) -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(tokens, columns), torch.randn(rank, columns), torch.randn(columns, rank)
    narrow = matmul.narrow_down(x, a)
    assert far(narrow, x.double() @ a.double().t()) < TOLERANCE
    assert far(matmul.narrow_down(x, b.t()), x.double() @ b.double()) < TOLERANCE
    assert far(matmul.sum_over_tokens(narrow, x), narrow.double().t() @ x.double()) < TOLERANCE
    other = torch.randn(tokens, rank)
    made, again = matmul.sum_and_narrow_down(other, x, a)
    assert far(made, other.double().t() @ x.double()) < TOLERANCE
    assert far(again, x.double() @ a.double().t()) < TOLERANCE
    y = x.clone()
    matmul.add_widened(y, narrow, b.t(), 0.5)
    assert far(y, x.double() + 0.5 * narrow.double() @ b.double().t()) < TOLERANCE


@pytest.mark.parametrize(("columns", "dtype"), [(24, torch.float32), (32, torch.float64), (32, torch.bfloat16)])
def test_what_does_not_fit_is_torchs(columns: int, dtype: torch.dtype) -> None:
    assert not native.fits(columns, torch.empty(1, dtype=dtype))
    x, a = torch.randn(5, columns).to(dtype), torch.randn(4, columns).to(dtype)
    assert torch.equal(matmul.narrow_down(x, a), x @ a.t())


@pytest.mark.parametrize("weight", [torch.randn(24, 40), torch.randn(40, 24).t()])
def test_products_by_weights_and_their_views(weight: torch.Tensor) -> None:
    x, bias = torch.randn(7, 40), torch.randn(24)
    assert far(matmul.product(x, weight, bias), x.double() @ weight.double().t() + bias.double()) < TOLERANCE
    assert matmul.product(x[:0], weight).shape == (0, 24)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_compiler_that_is_missing_or_fails_is_said(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    said = native._library.__wrapped__()
    assert isinstance(said, str)
    assert "C compiler" in said


def test_why_nothing_here_can_be_used_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_library", lambda: "there is no C compiler 'cc'")
    native.why_missing.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not any(native.fits(16, torch.empty(1, 16)) for _ in range(3))
            assert torch.equal(matmul.narrow_down(torch.ones(2, 16), torch.ones(1, 16)), torch.full((2, 1), 16.0))
    finally:
        native.why_missing.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "attention and thin products are torch's own, which are several times slower: there is no C compiler 'cc'"
    ]


def _with_little_memory(queue: Any) -> None:
    """What becomes of each call, by its name, where it may allocate its results and not what it works with."""
    torch.set_num_threads(2)
    rows, few = (torch.tensor([0, tokens], dtype=torch.int32) for tokens in (40_000, 64))
    states = [torch.randn(1, 1, 40_000, 16, requires_grad=True) for _ in range(3)]
    low, x = torch.randn(32, 128), torch.randn(32, 16_384)
    # The threads are there.
    attention._attend_on_cpu(*(state[:, :, :64] for state in states), few, 0.2)[0].sum().backward()
    native.sum_over_tokens(low, x[:, :64])
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "forward": (8 << 20, lambda: attention._attend_on_cpu(*states, rows, 0.2)),
        "backward": (20 << 20, attention._attend_on_cpu(*states, rows, 0.2)[0].sum().backward),
        "sum_over_tokens": (12 << 20, lambda: native.sum_over_tokens(low, x)),
    }
    queue.put({name: _error_of(call, allowed) for name, (allowed, call) in calls.items()})


def _error_of(call: Callable[[], object], allowed: int) -> str:
    """The error of a call that may allocate so many bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(line.split()[1]) * 1024 + allowed, hard))
    try:
        call()
    except (MemoryError, RuntimeError) as error:
        assert is_out_of_memory(error)
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return "none"


def test_memory_that_runs_out_is_an_error_and_not_the_processs_end() -> None:
    queue = workers.CONTEXT.SimpleQueue()
    process = workers.CONTEXT.Process(target=_with_little_memory, args=(queue,))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    names = ("forward", "backward", "sum_over_tokens")
    assert queue.get() == {name: f"MemoryError: memory ran out in {name} of native.c" for name in names}
