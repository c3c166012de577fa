"""A causal language model of a few thousand weights, with a tokenizer and a chat template, made from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.hyperparameters.checks import resolve
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters
from tunesmith.jobs.spec import TextJob

if TYPE_CHECKING:
    from trainers.text.shards import TokenizedRows

TRAINED_ROWS = 260
"""So many of the 300 rows of the tiny dataset are trained on; the others are held out."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Any:
    """Every byte is a token; `<|user|>`, `<|assistant|>` and `<|end|>` are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_word_tokenizer() -> Any:
    """Every word is a token: fast, so that the data can be large."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(1000))])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(
    folder: Path, tokenizer: Any = None, *, width: int = 32, head_width: int = 8, mlp_width: int = 64
) -> Path:
    """Write the model to `folder` with its tokenizer, or another one; the same weights every time.

    Attention over packed rows on a CPU is our own where 16 divides `head_width`, else torch's.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_width,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,  # wide enough for logits that an adapter can move
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hyperparameters(**given: Any) -> LoraHyperparameters:
    """Hyperparameters of a short run, with `given` over them."""
    return resolve(LoraHyperparameters, {"learning_rate": 1e-2, "lora_rank": 4, "max_seq_length": 64, **given})


def advanced(**given: Any) -> Advanced:
    return resolve(Advanced, given)


def sums(count: int) -> list[dict[str, str]]:
    """Rows of unequal length that a tiny model can learn something from."""
    return [
        {"prompt": f"say {chr(97 + n % 26)} {'x' * (n % 7)}", "response": chr(97 + n % 26) * (1 + n % 5)}
        for n in range(count)
    ]


def tokens(count: int) -> TokenizedRows:
    """So many rows of `sums`, tokenised."""
    from trainers.text.tokenized_data import tokenize_rows

    return tokenize_rows(
        sums(count),
        make_tokenizer(),
        hyperparameters=hyperparameters(),
        advanced=advanced(),
        training_type="text-question-answering",
    )


def at_work(model: Any) -> Any:
    """The peft model with an adapter that changes its answers, the same one every time: as it begins, B is all zero."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def train_job(h: LoraHyperparameters, more: Advanced) -> TextJob:
    """A job over the tiny model, of these hyperparameters and advanced ones."""
    return TextJob(
        id="job-1",
        account="operator",
        name="tuned",
        model="tiny@1",
        dataset="data@1",
        training_type="text-question-answering",
        hyperparameters=h,
        advanced=more,
        flavor="cpu-small",
        cards=1,
        resources={"CPU": 1},
        output_model="tuned@1",
        created_at="2026-01-01T00:00:00Z",
    )
