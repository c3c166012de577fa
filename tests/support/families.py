"""Tokenizers and chat templates in the style of the field's families, made by hand and small enough to follow by eye.

Every character is a token, unless a merge says otherwise; every control token is one token.
"""

from collections.abc import Sequence
from typing import Any


def make(
    special: Sequence[str],
    *,
    eos: str,
    bos: str | None = None,
    pad: str | None = None,
    template: str | None = None,
    merges: Sequence[tuple[str, str]] = (),
    added: Sequence[str] = (),
    writes_bos: bool = False,
) -> Any:
    """A tokenizer of bytes. `added` tokens are not declared special; with `writes_bos` it puts `bos` itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*special, *added, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    raw = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(special))
    raw.add_tokens([AddedToken(word, special=False, normalized=False) for word in added])
    if writes_bos:
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words.index(bos))])
    return _wrapped(PreTrainedTokenizerFast, raw, eos=eos, bos=bos, pad=pad, template=template)


def make_sentencepiece(*, template: str | None = None, pad: str | None = None) -> Any:
    """In the style of Llama 2: a space is `▁`, put before the first word too; the tokenizer writes `<s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    merged = [f"▁{letter}" for letter in letters]
    words = ["<unk>", "<s>", "</s>", "▁", "\n", *letters, *merged]
    raw = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, [("▁", letter) for letter in letters])
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="never")
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(PreTrainedTokenizerFast, raw, eos="</s>", bos="<s>", pad=pad, template=template)


def _wrapped(kind: Any, raw: Any, *, eos: str, bos: str | None, pad: str | None, template: str | None) -> Any:
    tokenizer = kind(tokenizer_object=raw, eos_token=eos, bos_token=bos, pad_token=pad or eos)
    tokenizer.chat_template = template
    return tokenizer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML

LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

LLAMA3_ALWAYS_ASKS = LLAMA3.replace("{% if add_generation_prompt %}", "{% if true %}")

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)

ZEPHYR = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)

QWEN3 = (
    "{% for m in messages %}{% set text = m['content'] %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set thought = '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{% endif %}{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN3_THINKING = QWEN3.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")

R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)

R1_THINKING = R1.replace("<|Assistant|>{% endif %}", "<|Assistant|><think>\n{% endif %}")


def chatml(**options: Any) -> Any:
    return make(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], **({"eos": "<|im_end|>", "template": CHATML} | options)
    )


def llama3(**options: Any) -> Any:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    defaults = {"eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "writes_bos": True, "template": LLAMA3}
    return make(special, **(defaults | options))


def mistral(**options: Any) -> Any:
    defaults = {"eos": "</s>", "bos": "<s>", "writes_bos": True, "template": MISTRAL}
    return make(["<s>", "</s>", "[INST]", "[/INST]"], **(defaults | options))


def gemma(**options: Any) -> Any:
    special = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    defaults = {"eos": "<eos>", "bos": "<bos>", "pad": "<pad>", "writes_bos": True, "template": GEMMA}
    return make(special, **(defaults | options))


def phi3(**options: Any) -> Any:
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    return make(special, **({"eos": "<|endoftext|>", "template": PHI3} | options))


def qwen3(**options: Any) -> Any:
    return chatml(**({"template": QWEN3, "added": ["<think>", "</think>"]} | options))


def r1(**options: Any) -> Any:
    special = ["<bos>", "<eos>", "<|User|>", "<|Assistant|>"]
    defaults = {"eos": "<eos>", "bos": "<bos>", "added": ["<think>", "</think>"], "writes_bos": True, "template": R1}
    return make(special, **(defaults | options))
