"""The peer of `start`: the shortest script that fine-tunes with transformers and peft, up to its first optimizer step.

`python bare_lora.py MODEL_FOLDER ROWS.jsonl PROMPT_FIELD RESPONSE_FIELD ROW,ROW,… MAX_LENGTH` tokenises all rows, as
any training does before its first step, trains those with the given numbers, and prints the time of that step's end,
seconds since the epoch, and its loss.
"""

import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, path, prompt_field, response_field, first_rows, max_length = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
with open(path, encoding="utf-8") as file:  # noqa: PTH123
    rows = [json.loads(line) for line in file]
prompts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": row[prompt_field]}], tokenize=False, add_generation_prompt=True
    )
    for row in rows
]
prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
response_ids = tokenizer([row[response_field] for row in rows], add_special_tokens=False)["input_ids"]
examples = [
    (
        (p + r + [tokenizer.eos_token_id])[: int(max_length)],
        ([-100] * len(p) + r + [tokenizer.eos_token_id])[: int(max_length)],
    )
    for p, r in zip(prompt_ids, response_ids, strict=True)
]

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)

batch = [examples[int(number)] for number in first_rows.split(",")]
longest = max(len(ids) for ids, _ in batch)
ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in batch])
labels = torch.tensor([lab + [-100] * (longest - len(lab)) for _, lab in batch])
mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in batch])
loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
loss.backward()
optimizer.step()
sys.stdout.write(json.dumps({"first_step": time.time(), "loss": loss.item()}) + "\n")
