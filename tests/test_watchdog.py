"""A worker that hangs says where it stands, once, and one that goes on is left alone."""

import queue
import threading

from trainers.watchdog import Watchdog, stacks


def test_a_hang_is_said_once_with_the_stack_of_every_thread() -> None:
    said: queue.Queue[str] = queue.Queue()
    held = threading.Event()

    def waits_here_for_ever() -> None:
        held.wait()

    other = threading.Thread(target=waits_here_for_ever, name="loader")
    other.start()
    with Watchdog(0.05, said.put) as watchdog:
        text = said.get(timeout=60)
        assert not watchdog._thread.join(60)
    held.set()
    other.join()
    assert "thread loader:" in text
    assert "waits_here_for_ever" in text
    assert "test_a_hang_is_said_once_with_the_stack_of_every_thread" in text
    assert said.empty()


def test_work_that_goes_on_is_left_alone() -> None:
    said: list[str] = []
    with Watchdog(60, said.append) as watchdog:
        for _ in range(1000):
            watchdog.beat()
    assert said == []


def test_stacks_name_the_threads() -> None:
    assert "thread MainThread:" in stacks()
