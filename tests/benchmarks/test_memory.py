"""The benchmark of memory: rows have the length that is asked for, and its figures are those of the runs."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import memory
from benchmarks.cpu_lora import Run
from benchmarks.memory import Cell
from benchmarks.results_file import figure
from tests.support import tiny


def run(gib: float, loss: float = 2.0) -> Run:
    step = {"loss": loss, "tokens": 10, "seconds": 1.0, "cpu_seconds": 1.0}
    return Run([step] * 2, 0, int(gib * 2**30), {})


def test_rows_are_the_files_tokens_in_order_cut_to_the_length() -> None:
    rows = tiny.tokens(12)
    cut = memory.cut_rows(rows, length=24, count=5)
    assert cut.lengths.tolist() == [24] * 5
    for part in ("ids", "trained"):
        whole = np.concatenate([getattr(rows, part)(row) for row in range(len(rows))])
        assert (np.concatenate([getattr(cut, part)(row) for row in range(5)]) == whole[: 24 * 5]).all()
    with pytest.raises(SystemExit, match="too few for 5 rows of 1000"):
        memory.cut_rows(rows, length=1000, count=5)


def test_only_the_recipe_splits_a_large_batch() -> None:
    assert [Cell(1, 2048).pass_tokens(name) for name in ("ours", "hf_trainer")] == [2048, 2048]
    assert [Cell(4, 256).pass_tokens(name) for name in ("ours", "hf_trainer")] == [1024, 1024]
    assert [Cell(8, 512).pass_tokens(name) for name in ("ours", "hf_trainer")] == [1536, 4096]


def test_smaller_cells_foretell_a_larger_ones_memory() -> None:
    done = {Cell(1, 128): [run(1.25)]}
    assert memory.foretell(done, "hf_trainer", Cell(8, 1024)) == 0
    done[Cell(4, 128)] = [run(2.0)]
    assert memory.foretell(done, "hf_trainer", Cell(8, 1024)) == pytest.approx(1 + 8192 / 512)


def test_ratios_are_over_the_cells_that_both_ran() -> None:
    small, middle, large = Cell(4, 128), Cell(4, 512), Cell(8, 512)
    runs = {
        "ours": {small: [run(1.0), run(1.25)], middle: [run(2.0)] * 2, large: [run(2.0, loss=9.0)] * 2},
        "hf_trainer": {small: [run(2.0)] * 2, middle: [run(8.0, loss=2.5)] * 2},
    }
    figures = memory.take_figures(runs)
    values = {name: value["value"] for name, value in figures.items()}
    assert values["ours_b8_l512_gib"] == 2.0 and "hf_trainer_b8_l512_gib" not in values
    assert values["min_ratio"] == 0.25
    assert figures["max_ratio"] == {"value": 0.5625, "unit": "times", "min": 0.5, "max": 0.625, "runs": 2}
    assert values["max_relative_loss_difference"] == pytest.approx(0.2)
    assert values["hf_trainer_fixed_gib"] == pytest.approx(0.0, abs=1e-9)
    assert values["hf_trainer_mib_per_pass_token"] == pytest.approx(4.0)


def test_the_picture_is_drawn_where_cells_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peaks = {"ours_b4_l512_gib": [2.0], "ours_b8_l512_gib": [2.5, 2.7], "hf_trainer_b4_l512_gib": [8.0]}
    memory.draw({name: figure(values, "GiB") for name, values in peaks.items()}, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
