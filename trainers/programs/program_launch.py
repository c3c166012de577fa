"""How the program of a custom job is started: the platform's Python or the model's image, its room, its variables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from trainers.attempt.fetch import Fetched
from trainers.isolation import sandbox
from trainers.isolation.networks import OwnNetwork, own_network
from trainers.isolation.program import Launch, Program
from trainers.isolation.sandbox import Network, Room
from trainers.programs import images
from trainers.programs.environments import Environment, own_environment
from trainers.programs.images import Image
from trainers.programs.program_log import ProgramLog
from trainers.programs.program_task import ProgramTask
from tunesmith.assets.gallery import FOLDER, REQUIREMENTS, TRAIN
from tunesmith.jobs.flavors import get_flavor
from tunesmith.settings import Settings

CONTAINER = "container"
"""Folder of a worker's container, in that of its run."""


@dataclass(frozen=True)
class Inputs:
    """What a program is given."""

    base: Fetched
    dataset: Fetched
    restored: bool
    """Whether its output holds files of an earlier attempt."""


def program_name(base: Fetched) -> str:
    """The program as its user knows it: `train.py`, or what the model's card names in an image."""
    gallery = base.manifest.gallery
    if gallery is None or gallery.image_url is None:
        return TRAIN
    return gallery.command_path or TRAIN


def find_place(
    worker: ProgramTask, base: Fetched, *, settings: Settings, log: ProgramLog, watch: Callable[[Program], None]
) -> Environment | Image:
    """Where the program runs: the platform's Python with what the model needs besides, or the model's image.

    `watch` waits for the end of what makes it, and raises what keeps it from going on.
    """
    gallery, requirements = base.manifest.gallery, base.folder / FOLDER / REQUIREMENTS
    if gallery is None or gallery.image_url is None:
        return own_environment(
            requirements,
            account=worker.job.account,
            settings=settings,
            log=log,
            watch=watch,
            memory_bytes=get_flavor(worker.job.flavor).memory_gib << 30,
        )
    if requirements.is_file():
        log.write(b"requirements.txt is not installed: the image holds what the program needs")
    return images.fetch_image(gallery.image_url, model=base.folder, settings=settings, log=log, watch=watch)


def launch_program(
    worker: ProgramTask, place: Environment | Image, inputs: Inputs, network: Network, settings: Settings
) -> Launch:
    """How the program is started; its metrics file is `metrics_path`, its output `output/` of the run's folder."""
    folder, model = worker.folder(settings), inputs.base.folder
    memory_bytes = get_flavor(worker.job.flavor).memory_gib << 30
    own = [place.folder] if isinstance(place, Environment) and place.folder is not None else []
    room = Room(
        readable=[model, inputs.dataset.folder, *own],
        writable=[folder / "output", folder / "metrics"],
        temporary=folder / "tmp",
        network=network,
        resources=worker.job.resources,
        largest_file_bytes=settings.program_disk_gib << 30,
        memory_bytes=memory_bytes,
    )
    variables, cwd = _variables(worker, inputs, network, settings), model / FOLDER
    if isinstance(place, Environment):
        command = [str(place.python), TRAIN]
        launch = sandbox.launch(command, cwd=cwd, room=room, variables=variables, settings=settings)
        return replace(launch, mark=worker.mark)
    launch = images.launch(
        images.program_command(str(model / program_name(inputs.base))),
        cwd=cwd,
        room=room,
        variables=variables,
        image=place,
        folder=folder / CONTAINER,
        memory_bytes=memory_bytes,
        settings=settings,
    )
    return replace(launch, mark=worker.mark)


def metrics_path(worker: ProgramTask, settings: Settings) -> Path:
    """The file that the program writes its metrics to."""
    return worker.folder(settings) / "metrics" / "metrics.log"


@contextmanager
def network_of(worker: ProgramTask, settings: Settings) -> Iterator[Network]:
    """What the program may reach: nothing; its peers alone; or, with peers on other nodes, what the node does."""
    if worker.job.cards == 1:
        yield "none"
    elif not worker.alone_on_node or settings.isolation == "none":
        yield "node"
    else:
        with own_network(worker.network_file(settings)) as network:
            yield network


def _variables(worker: ProgramTask, inputs: Inputs, network: Network, settings: Settings) -> dict[str, str]:
    given = {
        "ENV_AG_MODEL_DIR": str(inputs.base.folder),
        "ENV_AG_DATASET_DIR": str(inputs.dataset.folder),
        "ENV_AG_USER_PARAMS": json.dumps(dict(worker.job.hyperparameters)),
        "ENV_AG_TRAIN_OUTPUT_DIR": str(worker.folder(settings) / "output"),
        "ENV_AG_USER_METRICS_LOG_PATH": str(metrics_path(worker, settings)),
        "ENV_AG_OUTPUT_RESTORED": "1" if inputs.restored else "0",
    }
    if worker.job.cards == 1:
        return given
    return given | {
        "RANK": str(worker.rank),
        "WORLD_SIZE": str(worker.job.cards),
        "LOCAL_RANK": str(worker.local_rank),
        "MASTER_ADDR": "127.0.0.1" if isinstance(network, OwnNetwork) else worker.master_addr,
        "MASTER_PORT": str(worker.master_port),
    }
