"""Which training types a model may have: the table, row by row."""

import pytest

from tunesmith.assets.gallery import Gallery
from tunesmith.assets.training_types import training_types

QUESTIONS, TEXT, CUSTOM = "text-question-answering", "text-generation", "custom"
VALID = Gallery(methods=[])
BROKEN = Gallery(problems=["gallery_train/train.py is missing"])
IMAGE = Gallery(image_url="registry/train:1")
BROKEN_IMAGE = Gallery(image_url="registry/train:1", problems=["gallery_train/train_params.json is missing"])


@pytest.mark.parametrize(
    ("task_type", "gallery", "language_model", "default", "others"),
    [
        (QUESTIONS, None, True, QUESTIONS, [TEXT]),
        (TEXT, None, True, TEXT, [QUESTIONS]),
        (TEXT, BROKEN, True, TEXT, [QUESTIONS]),
        (QUESTIONS, VALID, True, QUESTIONS, [TEXT, CUSTOM]),
        (TEXT, VALID, True, TEXT, [QUESTIONS, CUSTOM]),
        ("tabular", VALID, True, CUSTOM, [QUESTIONS, TEXT]),
        ("tabular", VALID, False, CUSTOM, []),
        (CUSTOM, VALID, False, CUSTOM, []),
        ("tabular", None, True, None, []),
        ("tabular", BROKEN, False, None, []),
        (None, None, False, None, []),
        ("tabular", IMAGE, True, CUSTOM, []),
        (TEXT, IMAGE, True, CUSTOM, []),
        ("tabular", BROKEN_IMAGE, True, None, []),
        (TEXT, BROKEN_IMAGE, True, None, []),
        # A text model that its own training has made into something else.
        (TEXT, VALID, False, CUSTOM, []),
        (TEXT, None, False, None, []),
    ],
)
def test_the_table_of_training_types(
    task_type: str | None, gallery: Gallery | None, language_model: bool, default: str | None, others: list[str]
) -> None:
    types = training_types(task_type, gallery, language_model=language_model)
    assert (types.default, types.others) == (default, others)
    assert types.allowed == ([default, *others] if default else [])
    assert (types.reason is None) == (default is not None and gallery is not BROKEN)


@pytest.mark.parametrize(
    ("task_type", "gallery", "says"),
    [
        ("tabular", None, "the folder gallery_train/ is missing"),
        ("tabular", BROKEN, "gallery_train/train.py is missing"),
        (TEXT, BROKEN, "custom training is not possible: gallery_train/train.py is missing"),
        (TEXT, BROKEN_IMAGE, "cannot be trained in its image: gallery_train/train_params.json is missing"),
    ],
)
def test_a_model_that_cannot_be_trained_says_why(task_type: str, gallery: Gallery | None, says: str) -> None:
    assert says in (training_types(task_type, gallery, language_model=True).reason or "")
