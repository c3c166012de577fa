"""`python -m serve_app --address HOST:PORT --proxy-port PORT`: put door and reconciler on a Ray cluster, and return."""

from __future__ import annotations

import argparse

from serve_app.deploy import deploy, log_to_stderr
from tunesmith.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve_app", description=__doc__)
    parser.add_argument("--address", required=True, help="HOST:PORT of the Ray cluster's GCS")
    parser.add_argument("--proxy-port", type=int, required=True, help="port on loopback that Serve's proxy takes")
    arguments = parser.parse_args()
    log_to_stderr()
    deploy(Settings.from_env(), arguments.address, proxy_port=arguments.proxy_port)


if __name__ == "__main__":
    main()
