"""Whether a model's files are a causal language model that loads: the reader that says so.

It loads torch and the weights within the walls, so others ask it through `trainers.registration.model_check`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from trainers.registration.model_check import LanguageModel, ModelQuestion, Refusal, Verdict, check_names
from tunesmith.assets.model_references import check_references
from tunesmith.errors import ModelError

_NO_MEMORY = "can't allocate memory"
"""What torch says instead of raising MemoryError."""


def judge(request: bytes, tell: Callable[[BaseModel, bytes], None]) -> Verdict:
    """What the model is, or why it is none. Where its weights are a GGUF file, safetensors are left in this folder."""
    asked = ModelQuestion.model_validate_json(request)
    try:
        folder = _converted(asked.folder)
        check_names([path.name for path in folder.iterdir()])
        check_references(folder)
        return Verdict(model=_load(folder))
    except ModelError as error:
        return Verdict(refusal=Refusal(**error.as_dict()))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the process's border: what a library says of broken files is the verdict
        traceback.print_exc()
        if _NO_MEMORY in str(error):
            raise MemoryError("config.json or the weights ask for it") from None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "it must load with transformers' AutoModelForCausalLM, from safetensors, without code of its own"
        return Verdict(
            refusal=Refusal(
                message=f"the model does not load: {first}", fields=["source"], hint=hint, code=ModelError.code
            )
        )


def _load(folder: Path) -> LanguageModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        raise ModelError(
            f"the weights do not fit config.json: missing {missing[:5]}, of another shape {mismatched[:5]}",
            fields=["source"],
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise ModelError(f"the tokenizer knows {len(tokenizer)} tokens, the model {vocabulary}", fields=["source"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3, 4]]) % vocabulary).logits
    if not torch.isfinite(logits).all():
        raise ModelError("the model's logits are not numbers", fields=["source"])
    return LanguageModel(
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        max_seq_length=getattr(model.config, "max_position_embeddings", None),
        chat_template=tokenizer.chat_template is not None,
    )


def _converted(folder: Path) -> Path:
    """The folder; where its weights are one GGUF file, this process's own, with safetensors made of it."""
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return folder
    if len(files) > 1:
        raise ModelError(f"there are {len(files)} GGUF files, one is allowed: {', '.join(p.name for p in files)}")
    from trainers.registration.gguf_weights import convert

    own = Path.cwd()
    convert(files[0], own)
    return own
