"""The arithmetic that a step of LoRA needs, whoever computes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def required_flops(config: Any, *, lora_rank: int, spans: Iterable[tuple[int, int]], trained_tokens: int) -> int:
    """FLOPs of forward and backward over `spans` of rows, for a model of Llama's layers; a product counts 2.

    A span is the tokens of a row from one to another; those before it were computed with another row's.

    `config` is the model's, with an adapter on the seven matrices of every layer. Only what the mathematics needs:

    - no padding, no recomputation, nothing but matrix products;
    - a frozen matrix: the forward product and the gradient of its input, none of its weights;
    - an adapter's two: the forward product, the gradients of input and weights;
    - no gradient of the embedding, so none of the input of the first layer's q, k and v;
    - attention within a row: a token with itself and those before it; two products forward, four backward;
    - logits, and the gradient of their input, at `trained_tokens` places only.
    """
    matrices = layer_matrices(config)
    layers = int(config.num_hidden_layers)
    frozen = sum(rows * columns for rows, columns in matrices)
    adapters = sum(lora_rank * (rows + columns) for rows, columns in matrices)
    # The input's gradient goes through W and through the adapter's A, [rank, rows].
    spared = sum(2 * rows * (columns + lora_rank) for rows, columns in matrices[:3])
    tokens = pairs = 0
    for start, end in spans:
        tokens += end - start
        pairs += (end * (end + 1) - start * (start + 1)) // 2
    attention = 2 * (2 + 4) * pairs * matrices[0][1] * layers
    head = (2 + 2) * trained_tokens * int(config.hidden_size) * int(config.vocab_size)
    return tokens * (layers * (4 * frozen + 6 * adapters) - spared) + attention + head


def layer_matrices(config: Any) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's q, k, v, o, gate, up and down."""
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    width = int(getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    queries, keys = width * int(config.num_attention_heads), width * int(config.num_key_value_heads)
    return [
        (hidden, queries),
        (hidden, keys),
        (hidden, keys),
        (queries, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
