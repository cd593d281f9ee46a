"""Processes that are killed while they write."""

import itertools
import os
import signal
import time

import pytest

can_be_killed = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed while it writes")
MOMENTS = range(5, 105, 5)
"""Milliseconds after which a process is killed."""


def killed_at_many_moments(write, moments=MOMENTS):
    """Kill a process, each time at another moment, that writes over and over; yields after each. write: of a number."""
    write(0)
    for milliseconds in moments:
        child = os.fork()
        if not child:
            try:
                for number in itertools.count():
                    write(number)
            finally:
                os._exit(1)
        time.sleep(milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it failed by itself"
        yield
