"""Answers are the model's own, whatever they are batched with; scores are those that a hand computes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny, workers
from trainers.recipe.device import pick_device
from trainers.recipe.evaluation import (
    KEPT_ANSWERS,
    HeldOut,
    answer,
    evaluation,
    generate_answers,
    perplexity,
    score,
    stop_ids,
)
from trainers.recipe.lora import load_model
from tunesmith.jobs.evaluation_record import Evaluation
from tunesmith.local.ports import free
from tunesmith.text.formats import Example, Turn

TOKENIZER = tiny.make_tokenizer()
PROMPTS = [
    TOKENIZER(f"<|user|>{text}<|end|>\n<|assistant|>")["input_ids"] for text in ("a", "bcd efg", "你好", "x" * 40)
]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_folder: Path) -> Any:
    """A peft model whose adapter changes its answers."""
    model = load_model(model_folder, tiny.hyperparameters(lora_dropout=0.5), tiny.advanced(), pick_device())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model.train()


@torch.no_grad()
def by_hand(model: Any, prompt: list[int], stops: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    """Greedy tokens with no cache, no batch and no padding."""
    was_training, made = model.training, list[int]()
    model.eval()
    while len(made) < new_tokens:
        token = int(model(input_ids=torch.tensor([[*prompt, *made]]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        made.append(token)
    model.train(was_training)
    return made


def text(tokens: list[int]) -> str:
    return str(TOKENIZER.decode(tokens, skip_special_tokens=True)).strip()


def test_answers_in_batches_are_those_of_each_prompt_alone(model: Any) -> None:
    expected = [text(by_hand(model, prompt, [TOKENIZER.eos_token_id])) for prompt in PROMPTS]
    assert len(set(expected)) == len(expected)
    seen: list[int] = []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    for batch_rows in (1, 3, 8):
        seen.clear()
        answers = generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=NEW_TOKENS, batch_rows=batch_rows)
        assert answers == expected
    assert seen == [max(map(len, PROMPTS))] + [1] * (len(seen) - 1)  # the rest came from the cache


def test_the_base_answers_where_the_adapter_is_off(model: Any, model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = [text(by_hand(base, prompt, [TOKENIZER.eos_token_id])) for prompt in PROMPTS]
    tuned = generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=NEW_TOKENS)
    with model.disable_adapter():
        assert generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=NEW_TOKENS) == expected
    assert generate_answers(base, TOKENIZER, PROMPTS, max_new_tokens=NEW_TOKENS) == expected
    assert generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=NEW_TOKENS) == tuned != expected


def test_an_answer_ends_at_the_end_of_turn_or_at_its_bound(model: Any) -> None:
    whole = by_hand(model, PROMPTS[0], [])
    assert len(whole) == NEW_TOKENS
    stop = whole[3]
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    before = whole[: whole.index(stop)]
    assert generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=NEW_TOKENS) == [text(before)]
    tokenizer.eos_token = "<|pad|>"
    tokenizer.chat_template = None
    model.get_base_model().generation_config.eos_token_id = None
    assert generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=5) == [text(whole[:5])]


def test_answers_end_where_the_job_is_to_stop(model: Any) -> None:
    whole = by_hand(model, PROMPTS[0], [TOKENIZER.eos_token_id])
    assert len(whole) > 3
    asked = iter([False, False, False, True])
    answers = generate_answers(
        model,
        TOKENIZER,
        [PROMPTS[0], PROMPTS[0]],
        max_new_tokens=NEW_TOKENS,
        batch_rows=1,
        should_stop=lambda: next(asked, True),
    )
    assert answers == [text(whole[:3]), ""]


def test_the_models_the_tokenizers_and_the_templates_ends_all_stop_an_answer(model: Any) -> None:
    tokenizer = tiny.make_tokenizer()
    end, pad, user = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|pad|>", "<|user|>"))
    tokenizer.eos_token = "<|pad|>"
    base = model.get_base_model()
    base.generation_config.eos_token_id = [user]
    assert stop_ids(base, tokenizer) == sorted([end, pad, user])
    tokenizer.chat_template = "{{ raise_exception('no assistant here') }}"
    assert stop_ids(base, tokenizer) == sorted([pad, user])


def test_generation_leaves_the_model_the_tokenizer_and_the_random_numbers_as_they_were(model: Any) -> None:
    base = model.get_base_model()
    base.generation_config.repetition_penalty = 3.0
    base.config.use_cache = False
    next(base.modules()).training = False
    model.model.lm_head.eval()

    def state() -> object:
        modes = [module.training for module in model.modules()]
        configs = (base.config.to_dict(), id(base.generation_config), base.generation_config.to_dict())
        return modes, configs, TOKENIZER.padding_side, torch.get_rng_state().tolist()

    before = state()
    expected = text(by_hand(model, PROMPTS[0], [TOKENIZER.eos_token_id]))
    for module, mode in zip(model.modules(), before[0], strict=True):  # type: ignore[index]
        module.training = mode
    # Neither the model's own repetition penalty nor dropout has a part in it.
    assert generate_answers(model, TOKENIZER, PROMPTS[:1], max_new_tokens=NEW_TOKENS) == [expected]
    assert state() == before


def test_gradient_checkpointing_does_not_change_an_answer(model: Any, model_folder: Path) -> None:
    advanced = tiny.advanced(gradient_checkpointing=True)
    saving = load_model(model_folder, tiny.hyperparameters(), advanced, pick_device()).train()
    saving.load_state_dict(model.state_dict())
    answers = generate_answers(saving, TOKENIZER, PROMPTS, max_new_tokens=NEW_TOKENS)
    assert answers == generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=NEW_TOKENS)


def test_a_prompt_beyond_the_models_context_loses_its_beginning(model: Any) -> None:
    prompt = [*PROMPTS[3] * 8, *PROMPTS[1]]  # more than the model's 256 tokens
    assert len(prompt) > 256
    answers = generate_answers(model, TOKENIZER, [prompt, prompt[-(256 - NEW_TOKENS) :]], max_new_tokens=NEW_TOKENS)
    assert answers[0] == answers[1]
    assert generate_answers(model, TOKENIZER, [prompt], max_new_tokens=10**6) != [""]


def test_scores_of_chinese_equal_those_computed_by_hand() -> None:
    # 今天天气不好 against 今天天气很好, character by character: 5 of 6 single ones, 3 of 5 pairs (今天 天天 天气),
    # 2 of 4 triples (今天天 天天气), 1 of 3 fours (今天天气); the same length, so no penalty.
    one = score(["今天天气不好"], ["今天天气很好"])
    assert one["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))  # 53.73
    # ROUGE: precision and recall are alike, 5/6 and 3/5; the longest common subsequence is 今天天气好, 5 of 6.
    assert one["rouge1"] == pytest.approx(100 * 5 / 6)
    assert one["rouge2"] == pytest.approx(100 * 3 / 5)
    assert one["rougeL"] == pytest.approx(100 * 5 / 6)

    # 我爱天安门 against 我爱北京天安门: 5 of 5, 3 of 4 (我爱 天安 安门), 1 of 3 (天安门), 0 of 2, which is smoothed to
    # half a match; 5 characters for 7 cost e^(1 - 7/5).
    two = score(["我爱天安门"], ["我爱北京天安门"])
    assert two["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 5) * (1 * 3 / 4 * 1 / 3 * 0.5 / 2) ** (1 / 4))  # 33.52
    # ROUGE-1 and ROUGE-L: precision 5/5, recall 5/7, F = 2·5/(5+7). ROUGE-2: 3/4 and 3/6, F = 2·3/(4+6).
    assert two["rouge1"] == pytest.approx(100 * 10 / 12)
    assert two["rouge2"] == pytest.approx(100 * 6 / 10)
    assert two["rougeL"] == pytest.approx(100 * 10 / 12)

    # Together: BLEU from the sums, 10 of 11, 6 of 9, 3 of 7, 1 of 5, 11 characters for 13; ROUGE is the mean.
    both = score(["今天天气不好", "我爱天安门"], ["今天天气很好", "我爱北京天安门"])
    assert both["bleu"] == pytest.approx(100 * math.exp(1 - 13 / 11) * (10 / 11 * 6 / 9 * 3 / 7 * 1 / 5) ** (1 / 4))
    assert both["rougeL"] == pytest.approx((one["rougeL"] + two["rougeL"]) / 2)


def test_scores_of_chinese_with_words_and_numbers_equal_those_computed_by_hand() -> None:
    # 用 GPU 训 练 2 次 。against 用 GPU 训 练 3 次 。 for BLEU: 6 of 7, 4 of 6, 2 of 5 (用GPU训 GPU训练), 1 of 4.
    mixed = score(["用GPU训练2次。"], ["用GPU训练3次。"])
    assert mixed["bleu"] == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** (1 / 4))
    # ROUGE leaves the full stop out: 用 gpu 训 练 2 次; 5 of 6, 3 of 5 pairs, subsequence 用 gpu 训 练 次.
    assert [mixed[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([500 / 6, 60, 500 / 6])


def test_scores_of_english_equal_those_computed_by_hand() -> None:
    # BLEU minds case and full stop: "the cat sat on a mat" against "The cat sat on the mat .": 5 of 6 words
    # (the cat sat on mat), 2 of 5 pairs (cat sat, sat on), 1 of 4 triples, 0 of 3 fours (half); 6 words for 7.
    scores = score(["the cat sat on a mat"], ["The cat sat on the mat."])
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 6) * (5 / 6 * 2 / 5 * 1 / 4 * 0.5 / 3) ** (1 / 4))
    # ROUGE minds neither: 5 of 6 words; 3 of 5 pairs (the cat, cat sat, sat on); subsequence the cat sat on mat.
    assert [scores[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([500 / 6, 60, 500 / 6])


def test_right_answers_score_100_however_short_and_empty_ones_0() -> None:
    for right in ("好", "天安门", "yes", "four words are here"):
        scores = score([right], [right])
        assert scores["bleu"] == pytest.approx(100)
        assert (scores["rouge1"], scores["rougeL"]) == pytest.approx((100, 100))
    assert set(score(["", ""], ["天安门", "a b c"]).values()) == {0.0}
    with pytest.raises(ValueError, match="got 0"):
        score([], [])


def test_permuted_answers_score_lower() -> None:
    references = ["保持健康要多吃蔬菜和水果。", "北京是中国的首都。", "水的化学式是 H2O。", "Python is a language."]
    answers = ["要保持健康应多吃水果和蔬菜。", "中国的首都是北京。", "水的化学式写作 H2O。", "Python is one language."]
    right, permuted = score(answers, references), score(answers[1:] + answers[:1], references)
    assert all(permuted[name] < 0.5 * right[name] for name in right)


def test_perplexity_is_e_to_the_loss_and_always_a_number() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(7)) == pytest.approx(7)  # as unsure as among 7 tokens alike
    assert math.isfinite(perplexity(1e6))


def test_an_evaluation_holds_the_answers_of_all_rows_and_their_scores() -> None:
    held_out = HeldOut(["甲", "乙", "丙" * 3000], [[1], [2], [3]], ["好", "对", "错"], max_new_tokens=8)
    right, wrong = (evaluation(7, 40, 2.0, held_out, answers) for answers in (["好", "对", "错"], ["坏", "坏", "坏"]))
    assert (right.step, right.rows, right.loss, right.perplexity) == (7, 40, 2.0, pytest.approx(math.e**2))
    assert right.answers[1].model_dump() == {"prompt": "乙", "expected": "对", "answer": "对"}
    assert len(right.answers[2].prompt) < 2100
    assert (right.scores["rouge1"], wrong.scores["rouge1"]) == pytest.approx((100, 0))
    assert Evaluation.model_validate_json(right.model_dump_json()) == right


def test_an_evaluation_keeps_the_first_answers_and_scores_all() -> None:
    held_out = HeldOut(["p"] * 80, [[1]] * 80, ["e"] * 80, max_new_tokens=8)
    made = evaluation(0, 80, 2.0, held_out, ["e"] * 60 + ["no"] * 20)
    assert (len(made.answers), made.scores["rouge1"]) == (KEPT_ANSWERS, pytest.approx(75))


def test_held_out_rows_ask_what_generation_is_given_and_plain_text_asks_nothing() -> None:
    examples = [
        Example([Turn("user", "one"), Turn("assistant", "uno"), Turn("user", "two"), Turn("assistant", " dos, due ")]),
        Example([Turn("text", "no question")]),
    ]
    held_out = HeldOut.of(examples, TOKENIZER, tiny.hyperparameters(), tiny.advanced())
    assert (held_out.prompts, held_out.expected) == (["two"], ["dos, due"])
    given = "<|user|>one<|end|>\n<|assistant|>uno<|end|>\n<|user|>two<|end|>\n<|assistant|>"
    assert held_out.prompt_ids == [TOKENIZER(given)["input_ids"]]
    assert len("dos, due") < held_out.max_new_tokens <= 2 * len("dos, due") + 8
    nothing = HeldOut.of(examples[1:], TOKENIZER, tiny.hyperparameters(), tiny.advanced())
    assert evaluation(0, 1, 2.0, nothing, []).scores == {}


@pytest.mark.slow
def test_workers_share_the_rows_and_each_has_all_answers(model_folder: Path) -> None:
    held_out = HeldOut(["p"] * 3, PROMPTS[:3], ["e"] * 3, max_new_tokens=NEW_TOKENS)
    model = load_model(model_folder, tiny.hyperparameters(), tiny.advanced(), pick_device())
    alone = answer(model, TOKENIZER, held_out, rank=0, world_size=1)
    assert alone is not None
    assert len(set(alone)) == 3
    answers = workers.CONTEXT.SimpleQueue()
    # Four workers: one of them has no row.
    workers.run_on(4, _answer_on, free(1)[0], model_folder, held_out, answers)
    given = [answers.get() for _ in range(4)]
    assert [whole for whole, _ in given] == [alone] * 4
    assert [cut for _, cut in given] == [None] * 4  # one of them was to stop


def _answer_on(rank: int, port: int, model_folder: Path, held_out: HeldOut, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    model = load_model(model_folder, tiny.hyperparameters(), tiny.advanced(), pick_device())
    whole = answer(model, TOKENIZER, held_out, rank=rank, world_size=4)
    cut = answer(model, TOKENIZER, held_out, rank=rank, world_size=4, should_stop=lambda: rank == 1)
    answers.put((whole, cut))
    torch.distributed.barrier()
