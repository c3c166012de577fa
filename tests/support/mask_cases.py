"""What is trained of a row, written out by hand, case by case; most were wrong in a trainer of the field once.

`expected` is the row as it is tokenised, its trained tokens in ⟦⟧: every character is a token, and so is every control
token. Where tokens are longer, or where it matters that a control token is none, they are parted by `·`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support import families as f

Said = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    name: str
    expected: str
    """The row with its marks, or the code that it is refused with."""
    tokenizer: Callable[[], Any]
    said: Said
    source: str = ""
    """The public issue or pull request that reports the fault."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: bool = False
    """train_on_history."""


OWN = {"instruction_template": "Q:", "response_template": "A:"}
HI = [("user", "hi"), ("assistant", "ho")]
TWICE = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
THOUGHT = [
    ("user", "a"),
    ("assistant", "<think>\nx\n</think>\n\nb"),
    ("user", "c"),
    ("assistant", "<think>\ny\n</think>\n\nd"),
]
DIGITS = "0123456789" * 10
LETTERS = "abcdefghijklmnopqrst"


def system(said: Said) -> Said:
    return [("system", "Be brief."), *said]


def asked(text: str) -> Said:
    return [("user", text), ("assistant", "ho")]


def plain(**options: Any) -> Any:
    return f.make(["<pad>", "</s>"], **({"eos": "</s>", "pad": "<pad>"} | options))


def spaced() -> Any:
    return plain(merges=[("Ġ", "b")])


CASES = [
    # The end of turn is trained.
    Case(
        "the end of text ends an answer in templates of the user's own",
        "Q:hiA:⟦ho</s>⟧",
        plain,
        HI,
        "tatsu-lab/stanford_alpaca#126",
        OWN,
    ),
    Case(
        "the end of turn is trained though padding has its id",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦ho<|im_end|>⟧",
        lambda: f.chatml(pad="<|im_end|>"),
        HI,
        "huggingface/trl#976",
    ),
    Case(
        "the end of plain text is trained though padding has its id",
        "⟦once<|endoftext|>⟧",
        lambda: f.make(["<|endoftext|>"], eos="<|endoftext|>"),
        [("text", "once")],
        "huggingface/transformers#23530",
    ),
    Case(
        "the end of turn is trained where it is not the tokenizer's end of text",
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n⟦ho<end_of_turn>⟧",
        f.gemma,
        HI,
        "axolotl-ai-cloud/axolotl#3754",
    ),
    Case(
        "no end of text is put between turns that end by a token of their own",
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n⟦b<end_of_turn>⟧\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n⟦d<end_of_turn>⟧",
        f.gemma,
        TWICE,
        "axolotl-ai-cloud/axolotl#1921",
        history=True,
    ),
    Case(
        "an end of text that follows the end of turn is trained",
        "<|user|>\nhi<|end|>\n<|assistant|>\n⟦ho<|end|>\n<|endoftext|>⟧",
        f.phi3,
        HI,
        "huggingface/trl#5526",
    ),
    Case(
        "the end of text is the last answer's alone where the template says so",
        "<|user|>\na<|end|>\n<|assistant|>\n⟦b<|end|>⟧\n<|user|>\nc<|end|>\n<|assistant|>\n⟦d<|end|>\n<|endoftext|>⟧",
        f.phi3,
        TWICE,
        history=True,
    ),
    Case(
        "a header that the template puts after the last answer is not trained",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦ho<|eot_id|>⟧",
        lambda: f.llama3(template=f.LLAMA3_ALWAYS_ASKS, eos="<|end_of_text|>"),
        HI,
        "meta-llama/llama3#104",
    ),
    Case(
        "an end of turn in plain words is trained, and the end of text after it",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦ho<|im_end|></s>⟧",
        lambda: plain(template=f.CHATML),
        HI,
    ),
    # Nothing but the answer is trained.
    Case(
        "without generation marks in the template the answer is trained and nothing else",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "⟦ho<|im_end|>⟧",
        f.chatml,
        system(HI),
        "NVIDIA-NeMo/Megatron-Bridge#3359",
    ),
    Case(
        "answers in the history are not learnt",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧",
        f.chatml,
        TWICE,
        "modelscope/ms-swift#4596",
    ),
    Case(
        "nor is the end of text that closes them",
        "Q:aA:b</s>Q:cA:⟦d</s>⟧",
        plain,
        TWICE,
        "hiyouga/LlamaFactory#10827",
        OWN,
    ),
    Case(
        "with train_on_history every answer is trained",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧",
        f.chatml,
        TWICE,
        "axolotl-ai-cloud/axolotl#1761",
        history=True,
    ),
    Case(
        "an answer that says what was said before is found all the same",
        "<s>[INST] hi[/INST] hi</s>[INST] hi[/INST]⟦ hi</s>⟧",
        f.mistral,
        [("user", "hi"), ("assistant", "hi"), ("user", "hi"), ("assistant", "hi")],
        "axolotl-ai-cloud/axolotl#2089",
    ),
    # Prompt and answer meet.
    Case(
        "control tokens that frame the question do not hide the answer",
        "<s>[INST] hi[/INST]⟦ ho</s>⟧",
        f.mistral,
        HI,
        "unslothai/unsloth#1290",
    ),
    Case(
        "a frame of words is cut where it ends, though its tokens differ behind other text",
        "<s>· #·#· Q·a·\n·#·#· A·⟦b·</s>⟧",
        f.make_sentencepiece,
        [("user", "a"), ("assistant", "b")],
        "huggingface/trl#598",
        {"instruction_template": "## Q", "response_template": "\n## A"},
    ),
    Case(
        "the first token of a later answer is trained",
        "<s>·[·I·N·S·T·]· a· [·/·I·N·S·T·]·⟦ b· ·</s>⟧·<s>·[·I·N·S·T·]· c· [·/·I·N·S·T·]·⟦ d· ·</s>⟧",
        lambda: f.make_sentencepiece(template=f.LLAMA2),
        TWICE,
        "lm-sys/FastChat#2494",
        history=True,
    ),
    Case(
        "no space gets in before an answer",
        "<s>· Q·:·h·i·A·:·⟦h·o·</s>⟧",
        f.make_sentencepiece,
        HI,
        "lm-sys/FastChat#3006",
        OWN,
    ),
    Case(
        "a prompt that ends in a space keeps it",
        "Q·:·a· ·A·:· ·⟦b·</s>⟧",
        spaced,
        [("user", "a"), ("assistant", "b")],
        "foundation-model-stack/fms-hf-tuning#492",
        {"instruction_template": "Q:", "response_template": " A: "},
    ),
    Case(
        "an answer that begins with a space keeps it",
        "Q·:·a·A·:·⟦ b·</s>⟧",
        spaced,
        [("user", "a"), ("assistant", " b")],
        "axolotl-ai-cloud/axolotl#213",
        OWN,
    ),
    Case(
        "a prompt that opens the thought has its own tokens",
        "<|im_start|>·u·s·e·r·\n·c·<|im_end|>·\n·<|im_start|>·a·s·s·i·s·t·a·n·t·\n·<think>·\n·"
        "⟦\n·</think>·\n\n·d·<|im_end|>⟧",
        lambda: f.qwen3(template=f.QWEN3_THINKING, merges=[("Ċ", "Ċ")]),
        [("user", "c"), ("assistant", "d")],
        "huggingface/trl#5213",
    ),
    Case(
        "a template that asks otherwise than it answers is refused",
        "template_not_additive",
        lambda: f.chatml(template=f.CHATML.replace("assistant\n{% endif", "assistant:\n{% endif")),
        HI,
        "axolotl-ai-cloud/axolotl#834",
    ),
    # The beginning of text.
    Case(
        "a template that writes the beginning of text gets no second one",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦ho<|eot_id|>⟧",
        f.llama3,
        HI,
        "huggingface/trl#1400",
    ),
    Case(
        "templates of the user's own get the tokenizer's, once, and none before the answer",
        "<s>Q:hiA:⟦ho</s>⟧",
        f.mistral,
        HI,
        "mosaicml/llm-foundry#1003",
        OWN,
    ),
    Case(
        "and none where they write it",
        "<s>Q:hiA:⟦ho</s>⟧",
        f.mistral,
        HI,
        "OpenRLHF/OpenRLHF#393",
        {**OWN, "prefix": "<s>"},
    ),
    # What a template leaves out or adds.
    Case(
        "a last thought is trained, and those before are left out as the model will see it",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\ny\n</think>\n\nd<|im_end|>⟧",
        f.qwen3,
        THOUGHT,
        "modelscope/ms-swift#4939",
    ),
    Case(
        "an answer that loses its thought in the history is not trained there",
        "template_changes_history",
        f.qwen3,
        THOUGHT,
        "pytorch/torchtitan#2769",
        history=True,
    ),
    Case(
        "a template that drops the thought of the last answer is refused",
        "template_drops_text",
        f.r1,
        [("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb")],
        "huggingface/open-r1#604",
    ),
    Case(
        "a template that asks for a thought and answers without is refused",
        "template_not_additive",
        lambda: f.r1(template=f.R1_THINKING),
        HI,
    ),
    Case(
        "a thought that the prompt opened is not lost",
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n⟦y\n</think>\n\nd<|im_end|>⟧",
        lambda: f.qwen3(template=f.QWEN3_THINKING),
        [("user", "c"), ("assistant", "<think>\ny\n</think>\n\nd")],
    ),
    Case(
        "a system text that the template adds is context",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦ho<|im_end|>⟧",
        lambda: f.chatml(template=f.DEFAULT_SYSTEM),
        HI,
    ),
    Case(
        "a system text of the row takes its place",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "⟦ho<|im_end|>⟧",
        lambda: f.chatml(template=f.DEFAULT_SYSTEM),
        system(HI),
        "hiyouga/LlamaFactory#7592",
    ),
    Case(
        "a template that passes over the system text is refused",
        "template_drops_text",
        lambda: f.chatml(template=f.DEFAULT_SYSTEM.replace("{% for m in messages %}", "{% for m in messages[1:] %}")),
        system(HI),
        "QwenLM/Qwen#1089",
    ),
    Case(
        "a template that takes no system text is refused",
        "template_refuses",
        f.gemma,
        system(HI),
        "hiyouga/LlamaFactory#8217",
    ),
    Case(
        "white space that the template trims is no loss",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦ho<|eot_id|>⟧",
        f.llama3,
        [("user", " hi"), ("assistant", "\nho\n")],
    ),
    # Rows that are too long.
    Case(
        "a long prompt leaves the answer whole",
        "678901234567890123456789<|im_end|>\n<|im_start|>assistant\n⟦ho<|im_end|>⟧",
        f.chatml,
        asked(DIGITS),
        "NVIDIA-NeMo/Speech#8025",
        {"max_seq_length": 40},
    ),
    Case(
        "a row that is cut keeps its end of turn",
        "<|im_start|>assistant\n⟦abcdefghijklmnopqrst<|im_end|>⟧",
        f.chatml,
        [("user", DIGITS), ("assistant", LETTERS)],
        "hiyouga/LlamaFactory#5231",
        {"max_seq_length": 32},
    ),
    Case(
        "an answer that is cut teaches no end of turn",
        "ant\n⟦abcdefghijkl⟧",
        f.chatml,
        [("user", DIGITS), ("assistant", LETTERS)],
        "huggingface/transformers#19742",
        {"max_seq_length": 16},
    ),
    Case(
        "a limit that is just reached takes nothing away",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦ho<|im_end|>⟧",
        f.chatml,
        HI,
        "meta-pytorch/torchtune#2792",
        {"max_seq_length": 24},
    ),
    Case(
        "the beginning of text stays",
        "<|begin_of_text|>67890123456789<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦ho<|eot_id|>⟧",
        f.llama3,
        asked(DIGITS),
        "hiyouga/LlamaFactory#3143",
        {"max_seq_length": 32},
    ),
    # Data is no control.
    Case(
        "control tokens that data spells out are plain text",
        "<|im_start|>·u·s·e·r·\n·x·<·|·i·m·_·e·n·d·|·>·<|im_end|>·\n·<|im_start|>·a·s·s·i·s·t·a·n·t·\n·"
        "⟦<·|·i·m·_·e·n·d·|·>·z·<|im_end|>⟧",
        f.chatml,
        [("user", "x<|im_end|>"), ("assistant", "<|im_end|>z")],
        "huggingface/transformers#29279",
    ),
    Case(
        "so are tags of HTML",
        "<s>· Q·:·x·A·:·⟦<·s·>·y·<·/·s·>·</s>⟧",
        f.make_sentencepiece,
        [("user", "x"), ("assistant", "<s>y</s>")],
        settings=OWN,
    ),
    Case(
        "so is an end of turn that is not declared special",
        "<|im_start|>·u·s·e·r·\n·x·<|im_end|>·\n·<|im_start|>·a·s·s·i·s·t·a·n·t·\n·"
        "⟦y·<·|·i·m·_·e·n·d·|·>·z·<|im_end|>⟧",
        lambda: f.make(["</s>", "<|im_start|>"], eos="</s>", added=["<|im_end|>"], template=f.CHATML),
        [("user", "x"), ("assistant", "y<|im_end|>z")],
        "huggingface/transformers#47386",
    ),
    # And the ordinary.
    Case(
        "Chinese is trained whole",
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n⟦您好！<|im_end|>⟧",
        f.chatml,
        [("user", "你好"), ("assistant", "您好！")],
    ),
    Case(
        "a prefix stands before every question",
        "<|im_start|>user\nP:a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nP:c<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧",
        f.chatml,
        TWICE,
        settings={"prefix": "P:"},
    ),
]
