"""Which training types a model may have (docs/contracts.md, section 2)."""

from __future__ import annotations

from pydantic import Field

from tunesmith.assets.gallery import FOLDER, Gallery
from tunesmith.frozen import Tolerant

TEXT_TYPES = ("text-question-answering", "text-generation")
CUSTOM = "custom"


class TrainingTypes(Tolerant):
    """The training types of a model."""

    default: str | None
    """None: the model cannot be trained."""
    others: list[str] = Field(default=[])
    """What may be chosen in its place."""
    reason: str | None = None
    """Why the model cannot be trained, or not in a way that it seems to be meant for."""

    @property
    def allowed(self) -> list[str]:
        """All of them, the default first."""
        return [] if self.default is None else [self.default, *self.others]


def training_types(task_type: str | None, gallery: Gallery | None, *, language_model: bool) -> TrainingTypes:
    """The training types of a model of that task type, with that `gallery_train/` and card (None: it has none).

    `language_model`: whether its files were found to be a causal language model, which the text recipe needs.
    """
    problems = gallery.problems if gallery is not None else [f"the folder {FOLDER}/ is missing"]
    why_not_custom = "; ".join(problems)
    if gallery is not None and gallery.image_url is not None:
        if problems:
            return TrainingTypes(default=None, reason=f"it cannot be trained in its image: {why_not_custom}")
        return TrainingTypes(default=CUSTOM)
    text = list(TEXT_TYPES) if language_model else []
    if task_type in text:
        others = [each for each in text if each != task_type]
        if not problems:
            return TrainingTypes(default=task_type, others=[*others, CUSTOM])
        told = f"custom training is not possible: {why_not_custom}" if gallery is not None else None
        return TrainingTypes(default=task_type, others=others, reason=told)
    if problems:
        what = f"a model of task type {task_type!r} is trained by its {FOLDER}/"
        if task_type in TEXT_TYPES:
            what = "its files are not a causal language model that loads, and for training of its own"
        return TrainingTypes(default=None, reason=f"{what}: {why_not_custom}")
    return TrainingTypes(default=CUSTOM, others=text)
