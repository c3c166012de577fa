"""Jobs of models with an image of their own, on a platform that really runs: from the card to the new model."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import galleries, jobs, programs
from tests.support.programs import Start
from tests.support.publishing import files_key
from tests.support.ray_fixture import Running
from tunesmith import processes
from tunesmith.api.views import JobView

pytestmark = pytest.mark.ray


@dataclass
class StartInImage:
    """Publishes a model with an image and this end of its `train.py`, and orders a job."""

    start: Start
    image: str

    def __call__(self, train: str, *, image: str | None = None, command: str | None = None, **order: Any) -> JobView:
        def complete(folder: Path) -> None:
            (folder / "run.sh").write_text(
                '[[ $FROM_IMAGE == yes ]] && exec python3 "$ENV_AG_MODEL_DIR/gallery_train/train.py"'
            )
            if image is not None and "." in image:
                (folder / "image.tar").hardlink_to(self.image.removeprefix("docker-archive:"))

        card = f"Train_image_url: {image or self.image}\nTrain_command_path: {command or 'gallery_train/train.py'}\n"
        return self.start(train, card=card, complete=complete, **order)


@pytest.fixture(scope="module")
def data(platform: Running, tmp_path_factory: pytest.TempPathFactory) -> str:
    return programs.publish_points(platform, tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(debian_image: Path, platform: Running, data: str, tmp_path: Path) -> StartInImage:
    return StartInImage(Start(platform, tmp_path, data), f"docker-archive:{debian_image}")


def test_a_model_with_an_image_becomes_a_new_model(platform: Running, start: StartInImage) -> None:
    train = """
    for step in range(1, params["epochs"] + 1):
        with metrics.open("a") as file:
            file.write(f"{step}|{1 / step}|100.5\\n")
        print("step", step, "on", os.uname().nodename)
    (output / "weights.pt").write_bytes(b"tuned")
    (output / "seen.json").write_text(json.dumps({
        "secrets": [name for name in env if name.startswith(("AWS", "TUNESMITH_", "RAY"))],
        "paths": list(filter(os.path.exists, ("HOME/api_token", "HOME/storage/jobs", "/root/.ssh"))),
        "dataset": os.listdir(env["ENV_AG_DATASET_DIR"]),
        "cwd": sorted(os.listdir(".")),
        "image": env["FROM_IMAGE"],
    }))
    """
    train = train.replace("HOME", str(platform.settings.home))
    job = start(train, image="docker-archive:image.tar", command="run.sh", hyperparameters={"epochs": 2})
    ended = platform.client.wait(job.id)
    assert ended.state == "completed", (ended, jobs.log(platform, job.id, "0"), jobs.log(platform, job.id, "driver"))
    view = platform.client.model(ended.output)
    assert {file.path for file in view.files} == {
        "README.md",
        "gallery_train/dataset_readme.md",
        "gallery_train/train.py",
        "gallery_train/train_params.json",
        "image.tar",
        "run.sh",
        "seen.json",
        "training_logs/image.json",
        "training_logs/user_params.json",
        "weights.pt",
    }
    assert view.training is not None and (view.training.default, view.training.others) == ("custom", [])
    key = files_key(platform.storage, view.ref)
    assert json.loads(platform.storage.get(f"{key}/seen.json")) == {
        "secrets": [],
        "paths": [],
        "dataset": ["rows.csv"],
        "cwd": ["dataset_readme.md", "train.py", "train_params.json"],
        "image": "yes",
    }
    kept = platform.storage.get(f"jobs/{job.id}/attempts/1/image.json")
    assert json.loads(kept)["digest"].startswith("sha256:")
    assert platform.storage.get(f"{key}/training_logs/image.json") == kept
    points = {(line.step, line.name): line.value for line in jobs.metrics(platform, job.id, "loss", "throughput")}
    assert points == {(1, "loss"): 1.0, (1, "throughput"): 100.5, (2, "loss"): 0.5, (2, "throughput"): 100.5}
    assert jobs.metrics(platform, job.id, "memory_rss_bytes")
    said = jobs.events(platform, job.id)
    assert [event.phase for event in said if event.phase] == ["fetch", "environment", "train", "publish"]
    log = jobs.log(platform, job.id, "0")
    assert "Writing manifest to image destination" in log
    assert "step 2 on job" in log
    assert not list((platform.settings.home / "runs").glob(f"{job.id}*"))


def test_an_image_that_cannot_be_had_is_the_users_error(platform: Running, start: StartInImage) -> None:
    ended = platform.client.wait(start("", image="localhost:9/train:1", command="/train.py").id)
    assert (ended.state, ended.reason) == ("failed", "user_error")
    assert "the image localhost:9/train:1 could not be fetched" in (ended.message or "")
    assert "connection refused" in (ended.message or "")
    assert "connection refused" in jobs.log(platform, ended.id, "0")


def test_a_stop_reaches_a_program_in_an_image(platform: Running, start: StartInImage) -> None:
    job = start(galleries.SAVES_AT_SIGTERM)
    jobs.wait_for_log(platform, job, "waiting")
    platform.client.stop(job.id)
    ended = platform.client.wait(job.id)
    assert (ended.state, ended.reason) == ("stopped", "stopped_by_user")
    assert platform.storage.get(f"jobs/{job.id}/attempts/1/output/saved.txt") == b"in time"


def test_a_lost_worker_takes_its_container_along_and_the_next_attempt_goes_on(
    platform: Running, start: StartInImage
) -> None:
    job = start("""
    if env["ENV_AG_OUTPUT_RESTORED"] == "1":
        (output / "second.txt").write_text((output / "first.txt").read_text())
        sys.exit()
    (output / "first.txt").write_text("from before")
    subprocess.run(["sleep", "4322"], start_new_session=True)
    """)
    while not platform.storage.exists(f"jobs/{job.id}/attempts/1/output/first.txt"):
        assert platform.client.job(job.id).state not in ("failed", "completed")
        time.sleep(0.2)
    (worker,) = jobs.workers(platform, job.id, "ray::run_program")
    container = worker.children(recursive=True)
    assert {"podman", "conmon", "podman-init"} <= {process.name() for process in container}
    worker.kill()
    _, left = psutil.wait_procs(container, timeout=10)
    assert [process for process in left if processes.is_alive(process)] == []
    ended = platform.client.wait(job.id)
    assert (ended.state, ended.attempt) == ("completed", 2), ended
    name = ended.output.split("@")[0]
    assert platform.storage.get(f"{files_key(platform.storage, name)}/second.txt") == b"from before"
    assert not list(Path("/sys/fs/cgroup").glob(f"**/*{job.id}*"))
