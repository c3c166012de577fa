"""The recipe needs torch, transformers, peft, pyarrow, pydantic and jinja2: it trains where the platform's are not."""

import subprocess
import sys
from pathlib import Path

from tests.support import tiny

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path

missing = ("ray", "deepspeed", "boto3", "fastapi", "sqlalchemy", "typer", "datasets", "trl")
sys.modules |= dict.fromkeys(missing)  # None: as if it were not installed

from tests.support import tiny
from trainers.recipe.training_loop import Hooks, train
from trainers.text.tokenized_data import tokenize_rows

options = {"hyperparameters": tiny.hyperparameters(max_steps=2), "advanced": tiny.advanced()}
rows = tokenize_rows(tiny.sums(16), tiny.make_tokenizer(), training_type="text-question-answering", **options)
hooks = Hooks(report=lambda step, values: None, save=lambda step, folder: None, should_stop=lambda: False)
print("steps", train(Path(sys.argv[1]), rows, None, hooks=hooks, **options).steps)
"""


def test_the_recipe_trains_without_ray(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path)
    paths = [str(ROOT), str(ROOT / "platform"), *sys.path]
    program = f"import sys; sys.path = {paths!r}\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("steps 2\n"), done.stderr
