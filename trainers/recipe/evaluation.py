"""The model on held-out rows: its answers to their prompts, and how close these are to the expected ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainers.recipe.strategy import shares_base
from tunesmith.hyperparameters.definitions import EncodingAdvanced, EncodingHyperparameters
from tunesmith.jobs.evaluation_record import Answer, Evaluation
from tunesmith.text.formats import Example
from tunesmith.text.tokenization import Encoder

KEPT_ANSWERS = 64
"""Answers that an evaluation keeps, the first ones; the scores are over all."""
BATCH_ROWS = 64
"""Prompts answered together."""
MAX_NEW_TOKENS = 256
"""Tokens of an answer at most."""
_ENOUGH_CHARACTERS = 2000
"""What is kept of a text."""

# Chinese characters, and Japanese ones, which are not parted by spaces either, are words of their own.
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_PROBE = "\U0010fffd"


@dataclass(frozen=True)
class HeldOut:
    """The prompts and expected answers of held-out rows, ready for a model. Rows of plain text have none."""

    prompts: list[str]
    """The last turn before each answer, as text."""
    prompt_ids: list[list[int]]
    """The tokens that the model is given."""
    expected: list[str]
    max_new_tokens: int
    """Enough for every expected answer: an answer that is much longer is wrong anyway."""

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        tokenizer: Any,
        hyperparameters: EncodingHyperparameters,
        advanced: EncodingAdvanced,
    ) -> HeldOut:
        asking = [example for example in examples if len(example.turns) > 1]
        encoder = Encoder(tokenizer, hyperparameters, advanced)
        expected = [example.turns[-1].text.strip() for example in asking]
        longest = max((len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected), default=0)
        return cls(
            prompts=[example.turns[-2].text for example in asking],
            prompt_ids=[encoder.prompt_ids(example).tolist() for example in asking],
            expected=expected,
            max_new_tokens=min(MAX_NEW_TOKENS, longest + longest // 4 + 8),
        )


def answer(
    model: Any,
    tokenizer: Any,
    held_out: HeldOut,
    *,
    rank: int,
    world_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str] | None:
    """The model's answers to all rows, made by the workers together. Each worker calls this, and gets all answers.

    Every worker gets None once `should_stop` returned true for one of them.
    """
    share, together = held_out.prompt_ids[rank::world_size], world_size > 1 and shares_base(model)
    if together:  # as many batches for each
        share = [*share, *held_out.prompt_ids[:1]][: -(-len(held_out.prompt_ids) // world_size)]
    own = generate_answers(
        model,
        tokenizer,
        share,
        max_new_tokens=held_out.max_new_tokens,
        should_stop=should_stop,
        together=together,
    )
    shares: list[list[str] | None] = [None if should_stop() else own] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, shares[0])
    answers = [""] * len(held_out.expected)
    for number, part in enumerate(shares):
        if part is None:
            return None
        answers[number::world_size] = part[: len(answers[number::world_size])]
    return answers


def evaluation(step: int, rows: int, loss: float, held_out: HeldOut, answers: Sequence[str]) -> Evaluation:
    """The record of the model after `step`, whose mean loss over the `rows` held-out rows is `loss`."""
    texts = list(zip(held_out.prompts, held_out.expected, answers, strict=True))[:KEPT_ANSWERS]
    return Evaluation(
        step=step,
        rows=rows,
        loss=loss,
        perplexity=perplexity(loss),
        scores=score(answers, held_out.expected) if answers else {},
        answers=[Answer(prompt=_shorten(p), expected=_shorten(e), answer=_shorten(a)) for p, e, a in texts],
    )


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_rows: int = BATCH_ROWS,
    should_stop: Callable[[], bool] = lambda: False,
    together: bool = False,
) -> list[str]:
    """The model's greedy answer to each prompt, without special tokens; the model is left as it was.

    A prompt is token ids, one at least. A peft model answers with its adapter, inside `model.disable_adapter()`
    as its base. An answer ends at a token of `stop_ids`, or after `max_new_tokens`, at most half the model's
    context length; a prompt that is too long beside it loses its beginning. `should_stop` is asked at every
    token; once it returns true, answers end where they are, and those that have not begun are empty. Workers that share
    the model's weights answer `together`: each makes the same number of batches.
    """
    # peft's own generate() writes to the model it wraps; the layers of the adapter are at work in the base as well.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None) or math.inf
    new_tokens = int(min(max_new_tokens, context // 2))
    stops = stop_ids(base, tokenizer)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))

    def stopping(ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return torch.full((len(ids),), should_stop(), device=ids.device)

    with _answering(base, new_tokens, stops) as config:
        for at in range(0, len(order), batch_rows):
            if should_stop() and not together:
                break
            share = order[at : at + batch_rows]
            kept = [prompts[row][-int(min(len(prompts[row]), context - new_tokens)) :] for row in share]
            ids, mask = _pad_left(kept, base.device)
            made = base.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=[stopping],
                synced_gpus=together,
            )[:, ids.shape[1] :]
            for row, answer in zip(share, made.tolist(), strict=True):
                end = next((place for place, token in enumerate(answer) if token in stops), len(answer))
                text = tokenizer.decode(answer[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[row] = text.strip()
    return answers


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the model's end of text, and the template's end of turn."""
    found = [tokenizer.eos_token_id]
    of_model = getattr(model.generation_config, "eos_token_id", None)
    found += of_model if isinstance(of_model, list) else [of_model]
    found.append(_end_of_turn(tokenizer))
    return sorted({int(token) for token in found if token is not None})


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`bleu`, `rouge1`, `rouge2` and `rougeL` of the answers, each 0 to 100.

    BLEU is that of the whole corpus (Papineni et al., 2002; Post, 2018), ROUGE the mean of the rows' F-measures
    (Lin, 2004). Chinese characters count as words in both, so that the scores depend on no dictionary. Raises
    ValueError where there is nothing to score.
    """
    from sacrebleu.metrics.bleu import BLEU
    from torchmetrics.functional.text.rouge import rouge_score

    if not answers or len(answers) != len(references):
        raise ValueError(f"as many answers as references are needed, one at least, got {len(answers)}")
    chinese = any(_CHINESE.search(text) for text in references)
    # With the effective order answers of less than four words, such as labels, do not score 0 by definition.
    bleu = BLEU(tokenize="zh" if chinese else "13a", effective_order=True, force=True)
    names = ("rouge1", "rouge2", "rougeL")
    rouge = rouge_score(answers, references, rouge_keys=names, normalizer=str.lower, tokenizer=_WORD.findall)
    scores = {"bleu": float(bleu.corpus_score(answers, [references]).score)}
    return scores | {name: 100 * float(rouge[f"{name}_fmeasure"]) for name in names}


def perplexity(loss: float) -> float:
    """e to the power of the mean loss per token, or the largest float where that is too large for one."""
    return math.exp(min(loss, 709.0))


@contextmanager
def _answering(model: Any, new_tokens: int, stops: list[int]) -> Iterator[Any]:
    """Make the model ready to answer greedily, and yield the generation config. Mode and config are restored."""
    from transformers import GenerationConfig

    # The model's own (temperature, repetition penalty, ...) would fill in whatever this one leaves out.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        use_cache=True,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    own, modes = model.generation_config, {module: module.training for module in model.modules()}
    model.eval()
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = own
        for module, mode in modes.items():
            module.training = mode


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [rows, longest], the prompts' ends side by side."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _end_of_turn(tokenizer: Any) -> int | None:
    """The first control token that the chat template puts after an answer."""
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        return None
    tail = tokenizer(text.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in tail if token in tokenizer.added_tokens_decoder), None)


def _shorten(text: str) -> str:
    return text if len(text) <= _ENOUGH_CHARACTERS else f"{text[:_ENOUGH_CHARACTERS]}…"
