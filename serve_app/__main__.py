"""`python -m serve_app --address HOST:PORT`: put the door and the reconciler on a Ray cluster, and return."""

from __future__ import annotations

import argparse

from serve_app.deploy import deploy, log_to_stderr
from tunesmith.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve_app", description=__doc__)
    parser.add_argument("--address", required=True, help="HOST:PORT of the Ray cluster's GCS")
    arguments = parser.parse_args()
    log_to_stderr()
    deploy(Settings.from_env(), arguments.address)


if __name__ == "__main__":
    main()
