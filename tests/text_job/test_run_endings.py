"""Why a run's workers ended, from what each of them ended with."""

import subprocess
import sys

import pytest
import torch

from trainers.text_job.training_run import HungError, _cause
from tunesmith.errors import DataError, OutOfMemoryError


def test_memory_that_a_cpu_does_not_have_is_known_for_what_it_is() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert not isinstance(caught.value, MemoryError)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        cause = _cause({0: RuntimeError("Connection closed by peer"), 1: error})
        assert isinstance(cause, OutOfMemoryError)
        assert (cause.reason, cause.message.startswith("worker 1 ran out of memory: ")) == ("out_of_memory", True)


def test_an_error_raised_on_purpose_counts_before_what_it_did_to_the_others() -> None:
    own = DataError("row 7")
    assert _cause({0: RuntimeError("Connection closed by peer"), 1: own}) is own


def test_a_hang_says_who_spoke_and_who_did_not() -> None:
    error = HungError(20, spoke=[0, 2], silent=[1])
    assert error.message == (
        "no progress for 20 s: workers 0, 2 said where they stood, in their logs; worker 1 said nothing"
    )
    assert error.as_data() == {"hung": {"spoke": [0, 2], "silent": [1]}}
    assert HungError(20, spoke=[0], silent=[]).message.endswith("worker 0 said where they stood, in their logs")


def test_who_drives_workers_imports_no_recipe() -> None:
    code = "import sys, trainers.text_job.training_run, trainers.text_job.worker_task; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
