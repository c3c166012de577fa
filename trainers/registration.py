"""Taking a model or dataset in: its files copied, checked as far as a job will rely on them, and published."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from trainers.attempt import Attempt
from tunesmith import catalog, layout
from tunesmith.attempts import Result
from tunesmith.catalog import Manifest, Table, describe_files
from tunesmith.clock import utc_text
from tunesmith.errors import DataError, ModelError, SpecError
from tunesmith.model_folder import LANGUAGE_MODEL_FILES, read_model_folder, refuse_links
from tunesmith.orders import output
from tunesmith.spec import RegisterJob
from tunesmith.storage import open_storage
from tunesmith.tables import FORMATS, data_format, describe
from tunesmith.training_types import TEXT_TYPES

MAX_FILE_BYTES = 5 << 30
MAX_DATASET_BYTES = 50 << 30

logger = logging.getLogger(__name__)


def run_registration(attempt: Attempt, job: RegisterJob) -> Result:
    """Copy, check and publish. Raises SpecError, DataError or ModelError that says what is wrong with the source."""
    attempt.events.write(phase="fetch")
    scratch = attempt.settings.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name) / "files"
        copy_source(job.source, folder, attempt)
        attempt.events.write(phase="audit")
        parts: dict[str, Any] = _check_dataset(folder) if job.asset == "dataset" else _check_model(folder, job)
        attempt.events.write(state="running", phase="publish")
        attempt.events.flush()
        kind, asset_name, version = output(job)
        files = describe_files(folder)
        attempt.storage.upload_folder(folder, layout.asset_files(kind, asset_name, version))
    manifest = Manifest(
        kind=job.asset,
        name=asset_name,
        version=version,
        files=files,
        created_at=utc_text(),
        account=job.account,
        job=job.id,
        **parts,
    )
    catalog.publish(attempt.storage, manifest)
    message = f"{job.asset} {job.output} is registered"
    if job.asset == "model" and manifest.training.reason:
        message += f"; {manifest.training.reason}"
    return Result(outcome="completed", message=message, time=utc_text())


def copy_source(source: str, folder: Path, attempt: Attempt) -> None:
    """Copy a folder, a file, or all below an `s3://` or `obs://` prefix to `folder`; links are refused."""
    if "://" in source and not source.startswith("file://"):
        remote = open_storage(source, attempt.settings)
        for entry in remote.entries():
            remote.download_file(entry.key, folder / entry.key)
        if not folder.is_dir():
            raise SpecError(
                f"there is nothing at {source}", fields=["source"], hint="give a prefix with files below it"
            )
        return
    path = Path(source.removeprefix("file://"))
    if not path.exists():
        raise SpecError(
            f"there is nothing at {source} on the machine that registers",
            fields=["source"],
            hint="give a full path, or an s3:// or obs:// prefix",
        )
    refuse_links(path)
    if path.is_dir():
        # A link that was made meanwhile stays one.
        shutil.copytree(path, folder, symlinks=True)
    else:
        folder.mkdir()
        shutil.copyfile(path, folder / path.name, follow_symlinks=False)
    refuse_links(folder)


def _check_dataset(folder: Path) -> dict[str, Any]:
    tables: dict[str, Table] = {}
    total = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        total += size
        if size > MAX_FILE_BYTES or total > MAX_DATASET_BYTES:
            raise DataError(
                f"{path.name} has {size} bytes, the files so far {total}; allowed are 5 GB a file and 50 GB a dataset",
                hint="split the file, or leave rows out",
                code="too_large",
            )
        if data_format(path) is not None:
            tables[path.relative_to(folder).as_posix()] = describe(path)
    if not tables:
        names = sorted(p.name for p in folder.rglob("*") if p.is_file())[:10]
        raise DataError(
            f"there is no data file among {', '.join(names) or 'the files: there are none'}",
            fields=["source"],
            hint=f"data files end in {', '.join('.' + name for name in FORMATS)}",
            code="no_data_file",
        )
    return {"tables": tables}


def _check_model(folder: Path, job: RegisterJob) -> dict[str, Any]:
    found = read_model_folder(folder, task_type=job.task_type)
    in_image = found.gallery is not None and found.gallery.image_url is not None
    if found.task_type in TEXT_TYPES and not in_image:
        details, language_model = check_language_model(folder), True
    else:
        # The text types are among a custom model's only where it is trainable at all, and outside of an image.
        worth_it = found.gallery is not None and not found.gallery.problems and not in_image
        details, language_model = look_for_language_model(folder) if worth_it else ({}, False)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(f"---\ntask_type: {found.task_type}\n---\n\n# {job.name}\n")
    return {
        "task_type": found.task_type,
        "framework": found.card.text("framework") or "PyTorch",
        "license": found.card.text("license"),
        "details": details,
        "gallery": found.gallery,
        "language_model": language_model,
    }


def look_for_language_model(folder: Path) -> tuple[dict[str, Any], bool]:
    """What the files in `folder` are, and whether a causal language model at all."""
    has_weights = any(folder.glob("*.safetensors"))
    if not has_weights or not all((folder / name).is_file() for name in LANGUAGE_MODEL_FILES):
        return {}, False
    try:
        return check_language_model(folder), True
    except ModelError as error:
        logger.info("the model is no causal language model: %s", error.message)
        return {}, False


def check_language_model(folder: Path) -> dict[str, Any]:
    """Load the model as a job will, and run it once; what it is. ModelError says why it does not."""
    _convert_gguf(folder)
    for name in LANGUAGE_MODEL_FILES:
        if not (folder / name).exists():
            there = ", ".join(sorted(p.name for p in folder.iterdir()))
            raise ModelError(
                f"the model has no {name}; it has {there}",
                fields=["source"],
                hint="a causal language model has config.json, tokenizer.json and *.safetensors, or is one GGUF file; "
                "a model with training of its own has another task type",
            )
    try:
        return _load(folder)
    except ModelError:
        raise
    except Exception as error:
        # Whatever a library says of broken files is the verdict.
        logger.exception("the model does not load")
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the model does not load: {first}",
            fields=["source"],
            hint="it must load with transformers' AutoModelForCausalLM, from safetensors, without code of its own",
        ) from error


def _load(folder: Path) -> dict[str, Any]:
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
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_seq_length": getattr(model.config, "max_position_embeddings", None),
        "chat_template": tokenizer.chat_template is not None,
    }


def _convert_gguf(folder: Path) -> None:
    """Where the weights are one GGUF file, put safetensors in its place."""
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return
    if len(files) > 1:
        raise ModelError(f"there are {len(files)} GGUF files, one is allowed: {', '.join(p.name for p in files)}")
    from trainers.gguf_weights import convert

    convert(files[0], folder)
    files[0].unlink()
