"""Taking a model or dataset in: its files copied, checked as far as a job will rely on them, and published."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from trainers.attempt import Attempt
from tunesmith import catalog, layout
from tunesmith.attempts import Result
from tunesmith.catalog import Manifest, Table, describe_files
from tunesmith.clock import utc_text
from tunesmith.errors import DataError, ModelError, SpecError
from tunesmith.orders import output
from tunesmith.spec import TEXT_TYPES, RegisterJob
from tunesmith.storage import open_storage
from tunesmith.tables import FORMATS, data_format, describe

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
    return Result(outcome="completed", message=f"{job.asset} {job.output} is registered", time=utc_text())


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
    links = [p for p in (path, *(path.rglob("*") if path.is_dir() else ())) if p.is_symlink()]
    if links:
        raise DataError(f"{links[0]} is a link; only files and folders are taken", hint="copy what it points to")
    if path.is_dir():
        shutil.copytree(path, folder)
    else:
        folder.mkdir()
        shutil.copyfile(path, folder / path.name)


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
    card = _front_matter(folder / "README.md")
    task_type = job.task_type or card.get("task_type")
    if not isinstance(task_type, str) or not task_type:
        raise SpecError(
            "the model's task type is not given",
            fields=["task_type"],
            hint=f"give task_type, or write it in the front matter of README.md: {', '.join(TEXT_TYPES)}, or a word of "
            "your own for a custom model",
        )
    details = _check_language_model(folder) if task_type in TEXT_TYPES else {}
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(f"---\ntask_type: {task_type}\n---\n\n# {job.name}\n")
    return {
        "task_type": task_type,
        "framework": str(card.get("framework", "PyTorch")),
        "license": str(card["license"]) if "license" in card else None,
        "details": details,
    }


def _check_language_model(folder: Path) -> dict[str, Any]:
    """Load the model as a job will, and run it once; what it is. ModelError says why it does not."""
    _convert_gguf(folder)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            there = ", ".join(sorted(p.name for p in folder.iterdir()))
            raise ModelError(
                f"the model has no {name}; it has {there}",
                fields=["source"],
                hint="a causal language model has config.json, tokenizer.json and *.safetensors, or is one GGUF file",
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


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines of `---`; empty where there is none."""
    if not card.exists():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        matter = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise ModelError(f"the front matter of README.md is not YAML: {error}", fields=["README.md"]) from None
    return matter if isinstance(matter, dict) else {}
