"""Blocks of data files encoded to batches of rows, in this process or in several."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import Any

from trainers.text.shards import Batch
from tunesmith.assets.tables import Block, place
from tunesmith.errors import DataError, TunesmithError, WorkerLostError
from tunesmith.hyperparameters.definitions import EncodingAdvanced, EncodingHyperparameters
from tunesmith.text.columns import RowFormat
from tunesmith.text.formats import Example, turns
from tunesmith.text.tokenization import Encoded, Encoder

BATCH_ROWS = 512
"""Rows tokenised in one call; batches of text are faster than single ones."""
WINDOW = 3
"""Blocks under way or waiting to be written, for each process."""

logger = logging.getLogger(__name__)


class HelperLostError(WorkerLostError):
    """A process that tokenises has ended before its time."""

    exit_code = 0


@dataclass(frozen=True)
class EncodingConfig:
    """What rows are encoded with. It can be pickled."""

    tokenizer: Any
    hyperparameters: EncodingHyperparameters
    advanced: EncodingAdvanced

    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.hyperparameters, self.advanced)


EncodingTask = tuple[Block, RowFormat]
"""A block, and the format of its rows."""


def encode_block(task: EncodingTask, encoder: Encoder, config: EncodingConfig, limit: int | None = None) -> Batch:
    """The rows of a block, at most `limit` of them. DataError names the file and the line or row at fault."""
    block, row_format = task
    encoded: list[Encoded] = []
    read = skipped = 0
    rows = block.rows()
    while (limit is None or len(encoded) < limit) and (some := list(islice(rows, BATCH_ROWS))):
        examples: list[Example] = []
        places: list[str] = []
        for number, row in some:
            if limit is not None and len(encoded) + len(examples) == limit:
                break
            read += 1
            where = place(block.path, number)
            example = turns(row, row_format, config.hyperparameters, where)
            if example is None:
                skipped += 1
                continue
            examples.append(example)
            places.append(where)
        encoded += encoder.encode(examples, places)
    return Batch.of(encoded, read=read, skipped=skipped)


def encode_here(
    tasks: Iterable[EncodingTask], config: EncodingConfig, limit: int | None = None
) -> Generator[Batch, None, None]:
    """The batches of `tasks` in their order, at most `limit` rows in all."""
    encoder = config.encoder()
    left = limit
    for task in tasks:
        batch = encode_block(task, encoder, config, left)
        yield batch
        if left is not None:
            left -= batch.counts.rows
            if left <= 0:
                return


def encode_in_processes(
    tasks: Iterable[EncodingTask], config: EncodingConfig, processes: int
) -> Generator[Batch, None, None]:
    """The batches of `tasks` in their order, made by `processes` processes; a few blocks are held at a time.

    Raises what encoding raised, or WorkerLostError where a process was killed. However this process ends, its helpers
    end too, because the pipe that they read from is closed.
    """
    window: deque[Future[Batch]] = deque()
    with _helpers(config, processes) as idle, ThreadPoolExecutor(processes) as threads:

        def run(task: EncodingTask) -> Batch:
            helper = idle.get()
            try:
                return helper.encode(task)
            finally:
                idle.put(helper)

        failure: DataError | None = None
        source = iter(tasks)
        try:
            while failure is None:
                try:
                    window.append(threads.submit(run, next(source)))
                except StopIteration:
                    break
                except DataError as error:
                    # What stands before it in the files may be at fault too, and is named first.
                    failure = error
                if len(window) >= WINDOW * processes:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
            if failure is not None:
                raise failure
        finally:
            for future in window:
                future.cancel()


@contextmanager
def _helpers(config: EncodingConfig, processes: int) -> Iterator[SimpleQueue[_Helper]]:
    idle: SimpleQueue[_Helper] = SimpleQueue()
    helpers = []
    try:
        for _ in range(processes):
            helpers.append(_Helper(config))
            idle.put(helpers[-1])
        yield idle
    finally:
        for helper in helpers:
            helper.end()


class _Helper:
    """A process that encodes blocks: pickles in, pickles out."""

    def __init__(self, config: EncodingConfig) -> None:
        # One thread each: the processes share the cores already. The paths are those this process imports from.
        paths = os.pathsep.join(path or "." for path in sys.path)
        env = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from trainers.text.encoding_processes import serve; serve()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._config: EncodingConfig | None = config

    def encode(self, task: EncodingTask) -> Batch:
        try:
            if self._config is not None:
                pickle.dump(self._config, self._in)
                self._config = None
            pickle.dump(task, self._in)
            self._in.flush()
            answer = pickle.load(self._out)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            lost = HelperLostError(f"a process that tokenises ended with exit code {code}")
            lost.exit_code = code
            raise lost from error
        if isinstance(answer, Exception):
            raise answer
        batch: Batch = answer
        return batch

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._in, self._out):
            with suppress(OSError):
                stream.close()


def block_name(task: EncodingTask) -> str:
    """Where a block lies, for messages."""
    block, _ = task
    first = block.parsed[0][0] if block.parsed else block.first
    return f"{place(block.path, first)} and what follows it"


def serve() -> None:
    """A helper's whole life: a config and then tasks from standard input, batches or errors to standard output."""
    source = sys.stdin.buffer
    ended = suppress(EOFError, BrokenPipeError, pickle.UnpicklingError)
    with ended, os.fdopen(os.dup(1), "wb") as out:
        # What a library prints must not get between the answers.
        os.dup2(2, 1)
        config: EncodingConfig = pickle.load(source)
        encoder: Encoder | None = None
        while True:
            task: EncodingTask = pickle.load(source)
            answer: Batch | TunesmithError
            try:
                encoder = encoder or config.encoder()
                answer = encode_block(task, encoder, config)
            except TunesmithError as error:
                answer = error
            except MemoryError:
                answer = DataError(
                    f"{block_name(task)}: a template or the tokenizer takes more memory than it may have",
                    hint="look at the model's chat template, or shorten the row",
                    code="too_much_memory",
                )
            except Exception as error:
                logger.exception("a block could not be encoded")
                answer = TunesmithError(f"a block could not be encoded: {type(error).__name__}: {error}")
            pickle.dump(answer, out, protocol=pickle.HIGHEST_PROTOCOL)
            out.flush()
