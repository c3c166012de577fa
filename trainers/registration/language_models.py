"""Whether a model's files are a causal language model that loads: a program that says so.

`python -m trainers.registration.language_models FOLDER` writes a Verdict as JSON. It loads torch and the weights, so
others ask it through `trainers.registration.model_check`.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from trainers.registration.model_check import LanguageModel, Refusal, Verdict, check_names
from tunesmith.assets.model_references import check_references
from tunesmith.errors import ModelError


def main(folder: Path) -> None:
    """Write what the model in `folder` is, or why it is none, to stdout."""
    # Libraries write to stdout as well; only the verdict goes to the real one.
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with os.fdopen(answer, "w") as out:
        out.write(_judge(folder).model_dump_json())


def _judge(folder: Path) -> Verdict:
    try:
        _convert_gguf(folder)
        check_names([path.name for path in folder.iterdir()])
        check_references(folder)
        return Verdict(model=_load(folder))
    except ModelError as error:
        return Verdict(refusal=Refusal(**error.as_dict()))
    except Exception as error:  # noqa: BLE001 - the process's border: what a library says of broken files is the verdict
        traceback.print_exc()
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


def _convert_gguf(folder: Path) -> None:
    """Where the weights are one GGUF file, put safetensors in its place."""
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return
    if len(files) > 1:
        raise ModelError(f"there are {len(files)} GGUF files, one is allowed: {', '.join(p.name for p in files)}")
    from trainers.registration.gguf_weights import convert

    convert(files[0], folder)
    files[0].unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
