"""lib/signals.py: signals end a program at once, or are noted between iterations."""
import os
import signal

import pytest

from lib.signals import DeferredSignals

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def handlers():
    """None of them is ignored, as nohup and background jobs ignore some; afterwards all are as they were."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_before_training_ends_the_program(number):
    signals = DeferredSignals()
    with pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number and signals.received == 0


def test_the_first_signal_during_training_is_noted():
    signals = DeferredSignals()
    signals.deferring = True
    for number in reversed(NUMBERS):
        os.kill(os.getpid(), number)
    assert signals.received == signal.SIGUSR2


def test_a_signal_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    DeferredSignals()
    os.kill(os.getpid(), signal.SIGHUP)
