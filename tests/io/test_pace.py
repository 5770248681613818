"""When requests may begin: at a rate, and not during a pause that the server asks for."""

import threading

from holdfast.io.remote.http_client import RequestPace


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self):
        self.time, self.lock = 100.0, threading.Lock()

    def now(self):
        return self.time

    def sleep(self, seconds):
        with self.lock:
            self.time += seconds


def test_requests_begin_at_the_rate_and_are_spread_again_after_a_pause():
    clock = Clock()
    pace = RequestPace(5.0, clock.now, clock.sleep)
    begun = []
    for request in range(12):
        if request == 6:
            pace.pause(3.0)
        pace.wait()
        begun.append(round(clock.now() - 100.0, 6))
    assert begun[:6] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert begun[6:] == [4.0, 4.2, 4.4, 4.6, 4.8, 5.0]


def test_a_pause_also_applies_to_a_waiting_request():
    clock = Clock()

    def sleep(seconds):
        clock.sleep(seconds)
        if len(slept) < 1:
            slept.append(seconds)
            pace.pause(2.0)

    slept = []
    pace = RequestPace(2.0, clock.now, sleep)
    pace.wait()
    pace.wait()
    assert round(clock.now() - 100.0, 6) == 2.5


def test_a_request_with_retry_after_does_not_wait_twice():
    clock = Clock()
    pace = RequestPace(None, clock.now, clock.sleep)
    until = pace.pause(7.0)
    clock.sleep(7.0)
    pace.wait(until)
    assert clock.now() == 107.0
