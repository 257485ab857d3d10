"""The gate: opened it lets everybody through, and an interrupt at any moment leaves nobody waiting for ever."""

import signal
import threading
import time

import pytest

from llmlab.offload.gate import Gate


def test_it_is_closed_until_it_is_opened_and_open_then_for_all():
    gate, through = Gate(), []
    assert not gate.is_open and not gate.wait(0) and not gate.wait(0.01)
    threads = [threading.Thread(target=lambda: through.append(gate.wait(20))) for _ in range(5)]
    for thread in threads:
        thread.start()
    gate.open()
    for thread in threads:
        thread.join(10)
    assert through == [True] * 5 and gate.is_open
    gate.open()                                # twice is no harm
    assert gate.wait(0) and gate.wait()


def test_opened_by_many_at_once():
    for _ in range(200):
        gate = Gate()
        threads = [threading.Thread(target=gate.open) for _ in range(3)] + [threading.Thread(target=gate.wait)]
        for thread in threads:
            thread.start()
        assert gate.wait(10)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def opened_by_another() -> None:
    gate = Gate()
    opener = threading.Thread(target=gate.open)
    opener.start()
    while not gate.wait(0.01):
        pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt")
def test_interrupts_in_any_number_leave_nobody_hanging():
    interrupted = 0

    def press(_, frame):
        while frame is not None and frame.f_code is not Gate.wait.__code__:     # the test itself is not to be interrupted
            frame = frame.f_back
        if frame is not None:
            raise KeyboardInterrupt

    plain = signal.signal(signal.SIGALRM, press)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 5e-5)
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            try:
                opened_by_another()
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, plain)
    assert interrupted > 10
