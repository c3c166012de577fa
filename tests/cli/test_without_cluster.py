"""The client and the command line work where only the core's own dependencies are installed."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CLUSTER = {re.split(r"[\[><=;]", each)[0] for each in PROJECT["optional-dependencies"]["cluster"]}

HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(CLUSTER | {"numpy", "botocore", "starlette"})!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True, timeout=120, check=False)


def test_the_cluster_is_an_extra() -> None:
    assert {"ray", "torch", "deepspeed", "fastapi", "sqlalchemy", "boto3"} <= CLUSTER
    assert not {re.split(r"[\[><=;]", each)[0] for each in PROJECT["dependencies"]} & CLUSTER


def test_the_client_and_all_commands_load_without_the_cluster() -> None:
    code = """
import pkgutil, importlib, tunesmith.cli, tunesmith.api.client
for module in pkgutil.walk_packages(tunesmith.cli.__path__, "tunesmith.cli."):
    importlib.import_module(module.name)
print("loaded", tunesmith.api.client.Client("http://127.0.0.1:1").url)
"""
    done = run(code)
    assert done.stdout.strip() == "loaded http://127.0.0.1:1", done.stderr


def test_a_command_that_asks_a_door_asks_it(tmp_path: Path) -> None:
    command = f"import os; os.environ.update(TUNESMITH_URL='http://127.0.0.1:1', TUNESMITH_HOME={str(tmp_path)!r})\n"
    done = run(command + "from tunesmith.cli import main; main(['jobs', 'list'])")
    assert (done.returncode, "127.0.0.1:1" in done.stderr) == (3, True), done.stderr


def test_what_needs_the_cluster_says_what_to_install(tmp_path: Path) -> None:
    command = f"import os; os.environ.update(TUNESMITH_HOME={str(tmp_path)!r}, TUNESMITH_STORAGE_URL='s3://b')\n"
    order = "'jobs', 'render', '--model', 'm', '--dataset', 'd', '--flavor', 'cpu-small', '--output-model', 'o'"
    done = run(command + f"from tunesmith.cli import main; main([{order}])")
    assert done.returncode == 1, done.stderr
    assert "error: this command needs the package boto3, which is not installed" in done.stderr
    assert "pip install 'tunesmith[cluster]'" in done.stderr
