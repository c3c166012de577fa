"""Answers of models by stock transformers, greedy, and the table that sets them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

BATCH_ROWS = 64


def answer(model_folder: Path, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """What the model says to each prompt, in the form its own chat template gives it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # A token is many small operations: threads that wait for each other cost more than they bring, on a busy machine
    # several times as much.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    answers: list[str] = []
    for at in range(0, len(prompts), BATCH_ROWS):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[at : at + BATCH_ROWS]]
        asked: Any = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            said = model.generate(
                **asked, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        answers += tokenizer.batch_decode(said[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def comparison(rows: Sequence[tuple[str, str, str, str]], *, tuned: str, base: str) -> Table:
    """A table of (prompt, expected, base's answer, new model's answer)."""
    table = Table(show_lines=True, title="Held-out prompts, which no training row had", expand=True)
    for title, style in (("prompt", ""), ("expected", "cyan"), (f"base: {base}", "yellow"), (f"new: {tuned}", "green")):
        table.add_column(title, style=style, ratio=1, overflow="fold")
    for row in rows:
        table.add_row(*(_short(cell) for cell in row))
    return table


def exact(answers: Sequence[str], expected: Sequence[str]) -> int:
    """How many answers are the expected ones, to the letter."""
    return sum(given == wanted.strip() for given, wanted in zip(answers, expected, strict=True))


def _short(text: str, limit: int = 400) -> str:
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.replace("[", r"\[")
