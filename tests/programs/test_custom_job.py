"""Custom jobs on a platform that really runs: a model's own train.py, isolated, from the order to the new model."""

import json
from pathlib import Path

import pytest

from tests.support import galleries, jobs, programs
from tests.support.programs import Start
from tests.support.publishing import files_key
from tests.support.ray_fixture import Running

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def data(platform: Running, tmp_path_factory: pytest.TempPathFactory) -> str:
    return programs.publish_points(platform, tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(platform: Running, data: str, tmp_path: Path) -> Start:
    return Start(platform, tmp_path, data)


def test_train_py_becomes_a_new_model(platform: Running, start: Start) -> None:
    train = """
    for step in range(1, params["epochs"] + 1):
        with metrics.open("a") as file:
            file.write(f"{step}|{1 / step}|100.5\\n")
        print("step", step, "LOSS", 9.0)
    with metrics.open("a") as file:
        file.write("4|high|1\\n5|0.1|7")
    (output / "deep").mkdir()
    (output / "deep" / "weights.pt").write_bytes(b"tuned")
    (output / "README.md").write_text("mine")
    (output / "out").symlink_to("/etc/passwd")
    seen = {
        "secrets": [name for name in env if name.startswith(("AWS", "TUNESMITH_", "RAY"))],
        "paths": list(filter(os.path.exists, ("HOME/api_token", "HOME/storage/jobs", "/etc/shadow", "/root/.ssh"))),
        "dataset": os.listdir(env["ENV_AG_DATASET_DIR"]),
        "cwd": os.listdir("."),
        "pids": len([p for p in os.listdir("/proc") if p.isdecimal()]),
        "rank": "RANK" in env,
    }
    for what, place in (("model", "mine"), ("dataset", env["ENV_AG_DATASET_DIR"] + "/rows.csv")):
        try:
            open(place, "w")
            seen[what + " written"] = True
        except OSError as error:
            seen[what + " written"] = False
    try:
        socket.create_connection(("127.0.0.1", PORT), timeout=2)
        seen["network"] = True
    except OSError:
        seen["network"] = False
    seen["namespaces"] = subprocess.run(["unshare", "-U", "true"], capture_output=True).returncode == 0
    (output / "seen.json").write_text(json.dumps(seen))
    subprocess.Popen(["sleep", "98321"])
    """
    here = platform.settings
    train = train.replace("PORT", str(here.ray_dashboard_port)).replace("HOME", str(here.home))
    job = start(train, hyperparameters={"epochs": 2})
    ended = platform.client.wait(job.id)
    assert ended.state == "completed", (ended, jobs.log(platform, job.id, "0"), jobs.log(platform, job.id, "driver"))

    view = platform.client.model(ended.output)
    files = {file.path for file in view.files}
    assert files == {
        "README.md",
        "deep/weights.pt",
        "gallery_train/dataset_readme.md",
        "gallery_train/train.py",
        "gallery_train/train_params.json",
        "seen.json",
        "training_logs/user_params.json",
    }
    assert (view.base, view.task_type, view.training and view.training.default) == (
        job.job["model"],
        "tabular",
        "custom",
    )
    key = files_key(platform.storage, view.ref)
    base = files_key(platform.storage, job.job["model"])
    assert platform.storage.get(f"{key}/README.md") == platform.storage.get(f"{base}/README.md")
    assert json.loads(platform.storage.get(f"{key}/training_logs/user_params.json"))["epochs"] == 2
    seen = json.loads(platform.storage.get(f"{key}/seen.json"))
    assert seen.pop("pids") < 10
    assert seen.pop("secrets") == ["TUNESMITH_PROGRAM"]
    assert sorted(seen.pop("cwd")) == ["dataset_readme.md", "train.py", "train_params.json"]
    assert seen == {
        "paths": [],
        "dataset": ["rows.csv"],
        "rank": False,
        "model written": False,
        "dataset written": False,
        "network": False,
        "namespaces": False,
    }
    points = {(line.step, line.name): line.value for line in jobs.metrics(platform, job.id, "loss", "throughput")}
    assert points == {(1, "loss"): 1.0, (1, "throughput"): 100.5, (2, "loss"): 0.5, (2, "throughput"): 100.5,
                      (5, "loss"): 0.1, (5, "throughput"): 7.0}  # fmt: skip
    assert jobs.metrics(platform, job.id, "memory_rss_bytes")
    said = jobs.events(platform, job.id)
    assert [event.state for event in said if event.state] == ["pending", "queued", "preparing", "running", "completed"]
    assert [event.phase for event in said if event.phase] == ["fetch", "environment", "train", "publish"]
    assert any("line 3: '4|high|1'" in (event.message or "") for event in said)
    assert any("not taken into the model: README.md (these names" in (event.message or "") for event in said)
    assert any("not taken into the model: out (links" in (event.message or "") for event in said)
    assert "step 2 LOSS 9.0" in jobs.log(platform, job.id, "0")
    assert not list(jobs.processes(platform, "sleep 98321"))


def test_a_train_py_that_fails_keeps_its_log_and_output_and_publishes_nothing(platform: Running, start: Start) -> None:
    job = start("""
    (output / "partial.bin").write_bytes(b"half")
    print("step 7 LOSS 3.5", flush=True)
    raise ValueError("no such column")
    """)
    ended = platform.client.wait(job.id)
    assert (ended.state, ended.reason, ended.attempt) == ("failed", "user_error", 1)
    assert "worker 0 ended with exit code 1" in (ended.message or "")
    assert "ValueError: no such column" in (ended.message or "")
    assert platform.storage.get(f"jobs/{job.id}/attempts/1/output/partial.bin") == b"half"
    assert "Traceback" in jobs.log(platform, job.id, "0")
    assert [(line.step, line.value) for line in jobs.metrics(platform, job.id, "loss")] == [(7, 3.5)]
    assert platform.client.models(name=ended.output.split("@")[0]).items == []


def test_a_stop_is_a_sigterm_after_which_the_output_is_kept(platform: Running, start: Start) -> None:
    job = start(galleries.SAVES_AT_SIGTERM)
    jobs.wait_for_log(platform, job, "waiting")
    platform.client.stop(job.id)
    ended = platform.client.wait(job.id)
    assert (ended.state, ended.reason) == ("stopped", "stopped_by_user")
    assert platform.storage.get(f"jobs/{job.id}/attempts/1/output/saved.txt") == b"in time"
    grace_s = platform.settings.stop_grace_s / 2
    assert any(f"SIGTERM; after {grace_s:g} s" in (event.message or "") for event in jobs.events(platform, job.id))


def test_two_workers_meet_and_a_failed_one_ends_the_other(platform: Running, start: Start) -> None:
    reduce = """
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([float(env["RANK"]) + 1])
    dist.all_reduce(total)
    (output / "total.txt").write_text(f"{total.item()} {env['WORLD_SIZE']} {env['LOCAL_RANK']}")
    dist.barrier()
    dist.destroy_process_group()  # left to the end of the process, gloo's threads may end it by a signal
    """
    job = start(reduce, cards=2)
    ended = platform.client.wait(job.id)
    assert ended.state == "completed", (ended, jobs.log(platform, job.id, "0"), jobs.log(platform, job.id, "1"))
    name = ended.output.split("@")[0]
    assert platform.storage.get(f"{files_key(platform.storage, name)}/total.txt") == b"3.0 2 0"
    job = start("sys.exit(3) if env['RANK'] == '1' else time.sleep(1000)", cards=2)
    ended = platform.client.wait(job.id)  # far less than the other would sleep
    assert (ended.state, "worker 1 ended with exit code 3" in (ended.message or "")) == ("failed", True)
