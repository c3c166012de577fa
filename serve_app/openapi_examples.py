"""Examples of request bodies in the OpenAPI document."""

from __future__ import annotations

from fastapi.openapi.models import Example

_SMALL = {
    "model": "smollm2-135m-instruct",
    "dataset": "gsm8k",
    "flavor": "cpu-small",
    "output_model": "smollm2-gsm8k",
    "hyperparameters": {"prompt_field": "question", "response_field": "answer"},
}
TRAIN: dict[str, Example] = {
    "short": {"summary": "What must be said", "value": _SMALL},
    "long": {
        "summary": "More of what can be said",
        "value": {
            **_SMALL,
            "kind": "train",
            "name": "gsm8k-first",
            "model": "smollm2-135m-instruct@1",
            "dataset": "gsm8k@1",
            "training_type": "text-question-answering",
            "method": "LoRA",
            "hyperparameters": {"prompt_field": "question", "response_field": "answer", "max_steps": 50},
            "advanced": {"seed": 7},
            "cards": 1,
            "priority": 0,
            "max_run_time_s": 3600,
        },
    },
}
MODEL: dict[str, Example] = {
    "folder": {
        "summary": "A folder on the door's machine",
        "value": {"name": "smollm2-135m-instruct", "source": "/data/smollm2", "task_type": "text-question-answering"},
    },
    "bucket": {"summary": "A bucket", "value": {"name": "smollm2-135m-instruct", "source": "s3://models/smollm2"}},
}
DATASET: dict[str, Example] = {
    "file": {"summary": "One file", "value": {"name": "gsm8k", "source": "/data/gsm8k/train.jsonl"}},
    "bucket": {"summary": "A bucket", "value": {"name": "gsm8k", "source": "s3://data/gsm8k"}},
}
