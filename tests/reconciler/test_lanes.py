"""Lanes: many subjects side by side, each by one thread at a time."""

import threading

from serve_app.reconciler.lanes import Countdown, Lanes


def test_a_subject_is_worked_on_by_one_thread_at_a_time_and_nothing_handed_is_forgotten() -> None:
    lanes, at_work, overlaps = Lanes({"jobs": 8}), set[str](), list[str]()
    seen: dict[str, int] = {}

    def work(subject: str, number: int) -> None:
        if subject in at_work:
            overlaps.append(subject)
        at_work.add(subject)
        seen[subject] = number
        at_work.discard(subject)

    for number in range(200):
        for subject in "abcd":
            lanes.hand("jobs", subject, lambda subject=subject, number=number: work(subject, number))
    assert lanes.wait(30)
    assert overlaps == []
    assert seen == dict.fromkeys("abcd", 199)


def test_a_task_that_hangs_holds_up_its_own_subject_alone() -> None:
    lanes, released, done = Lanes({"jobs": 2, "queue": 1}), threading.Event(), threading.Event()
    late: list[str] = []
    lanes.hand("jobs", "a", lambda: released.wait(60))
    lanes.hand("jobs", "a", lambda: late.append("dropped for a newer one"))
    lanes.hand("jobs", "a", lambda: late.append("follows"))
    lanes.hand("jobs", "b", lambda: lanes.hand("queue", "a", done.set))
    assert done.wait(30)
    assert lanes.is_busy("jobs", "a")
    assert late == []
    assert not lanes.wait(0)
    released.set()
    assert lanes.wait(30)
    assert late == ["follows"]


def test_a_task_that_fails_ends_neither_its_thread_nor_the_tasks_behind_it() -> None:
    lanes, done = Lanes({"jobs": 1}), threading.Event()
    lanes.hand("jobs", "a", lambda: 1 / 0)
    lanes.hand("jobs", "b", done.set)
    assert done.wait(30)
    assert lanes.wait(30)


def test_closed_lanes_begin_nothing_more() -> None:
    lanes, begun, released = Lanes({"jobs": 1}), threading.Event(), threading.Event()
    late: list[str] = []

    def hang() -> None:
        begun.set()
        released.wait(60)

    lanes.hand("jobs", "a", hang)
    assert begun.wait(30)
    for subject in "ab":
        lanes.hand("jobs", subject, lambda: late.append("begun"))
    lanes.close()
    lanes.hand("jobs", "c", lambda: late.append("begun"))
    released.set()
    assert lanes.wait(30)
    assert late == []


def test_a_countdown_calls_once_all_that_was_added_is_done() -> None:
    called: list[int] = []
    countdown = Countdown(lambda: called.append(1))
    first, second = countdown.add(lambda: None), countdown.add(lambda: None)
    first()
    countdown.begin()
    assert called == []
    second()
    assert called == [1]
