"""`python -m trainers <path or URL of job.json>`: drive one attempt of one job."""

from __future__ import annotations

import argparse
import os
import sys

from trainers.driver import drive
from tunesmith.errors import EXIT_STORAGE_FULL, STORAGE_FULL, TunesmithError
from tunesmith.settings import PREFIX, Settings


def main() -> int:
    """The exit code.

    0: the job ended well, or the attempt is another's; 1: it failed; 2: there is no such job, or storage is away;
    EXIT_STORAGE_FULL: storage has no room for the attempt's result, so the code alone can say so.
    """
    parser = argparse.ArgumentParser(prog="python -m trainers", description=__doc__)
    parser.add_argument("job", help="ROOT/jobs/ID/job.json: a path, or an s3:// or obs:// URL")
    parser.add_argument("--attempt", type=int, default=int(os.environ.get(PREFIX + "ATTEMPT", "1")))
    arguments = parser.parse_args()
    try:
        return drive(arguments.job, arguments.attempt, Settings.from_env())
    except TunesmithError as error:
        sys.stderr.write(f"{error.code}: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return EXIT_STORAGE_FULL if error.code == STORAGE_FULL else 2


if __name__ == "__main__":
    sys.exit(main())
