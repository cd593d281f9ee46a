"""Waiting for what other threads, processes and servers do."""

import time

LIMIT = 1800
"""Seconds after which what does not happen is taken for a fault. It ends what hangs and judges no speed."""


def wait_until(true):
    """Wait until a function gives something true, and return that."""
    until = time.monotonic() + LIMIT
    while not (result := true()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)
    return result
