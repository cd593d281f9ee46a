"""What is made once in a run is made once, also when threads for several cards ask at the same time."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, get_ident, local

import pytest
import torch

from storyloom.runtime.cache import RunCache
from storyloom.runtime.call import Chunk, Conditioning, UNetCall

THREADS, PATIENCE = 4, 60
"""PATIENCE: seconds after which a thread that is alone gives up, and its test fails."""


class RequestedAtOnce(RunCache):
    """A cache in which all threads that look something up see that it is missing before one of them goes on.

    Making it takes until all of them are at the lock, or have looked again without one: see `hold`.
    """

    def __init__(self):
        super().__init__()
        self.barrier, self.seen, self.met = Barrier(THREADS, timeout=PATIENCE), local(), []
        self.here, self.all_here, self._lock = set(), Event(), Watched(self._lock, self.arrive)

    def __contains__(self, key):
        present = super().__contains__(key)
        if not hasattr(self.seen, "once"):
            self.seen.once = True
            assert not present
            self.barrier.wait()
            self.met.append(key)
        else:
            self.arrive()
        return present

    def arrive(self):
        self.here.add(get_ident())
        if len(self.here) == THREADS:
            self.all_here.set()

    def hold(self):
        """For what makes the thing: goes on when no thread is left that could still find it there by being late."""
        assert self.all_here.wait(PATIENCE)


class Watched:
    """A lock that calls `notify` when a thread arrives, before that thread waits."""

    def __init__(self, lock, notify):
        self.lock, self.notify = lock, notify

    def __enter__(self):
        self.notify()
        return self.lock.__enter__()

    def __exit__(self, *error):
        return self.lock.__exit__(*error)


def in_threads(function):
    with ThreadPoolExecutor(THREADS) as pool:
        return [result.result() for result in [pool.submit(function, number) for number in range(THREADS)]]


def call_of(kept, number=0):
    device = torch.device("meta") if number % 2 else torch.device("cpu")
    return UNetCall(1.0, (Chunk(range(2), Conditioning(None, 77)),), None, cache=kept, device=device)


@pytest.mark.parametrize(
    "lookup",
    [RunCache.get_or_make, lambda kept, key, make: call_of(kept).cached_for_run(key, make)],
    ids=["kept", "in a run"],
)
def test_who_asks_at_the_same_time_is_given_the_same_thing(lookup):
    kept, made = RequestedAtOnce(), []

    def make():
        kept.hold()
        made.append(object())
        return made[-1]

    assert in_threads(lambda number: lookup(kept, "key", make)) == made * THREADS and len(made) == 1
    assert kept.met == ["key"] * THREADS


def test_every_card_has_its_own_things_and_layers_of_one_call_share_them():
    kept, made = RequestedAtOnce(), []

    def lookup(number):
        return call_of(kept, number).cached_by_layout("rows", lambda: kept.hold() or made.append(number) or number)

    given = in_threads(lookup)
    assert sorted(number % 2 for number in made) == [0, 1]
    assert all(number % 2 == place % 2 for place, number in enumerate(given))


def test_one_call_that_several_threads_ask():
    call, made = call_of(RunCache()), []
    kept = RequestedAtOnce()
    call = UNetCall(1.0, call.chunks, None, call_cache=kept)
    in_threads(lambda number: call.cached("key", lambda: kept.hold() or made.append(number)))
    assert len(made) == 1


def test_what_is_made_may_ask_for_other_things():
    kept = RunCache()
    assert kept.get_or_make("sum", lambda: kept.get_or_make("one", lambda: 1) + kept.get_or_make("two", lambda: 2)) == 3
    assert dict(kept) == {"one": 1, "two": 2, "sum": 3}


def test_what_could_not_be_made_is_made_by_the_next_who_asks():
    kept = RunCache()
    with pytest.raises(ZeroDivisionError):
        kept.get_or_make("key", lambda: 1 / 0)
    assert "key" not in kept and kept.get_or_make("key", lambda: 1) == 1


def test_nothing_is_a_thing_too():
    kept, made = RunCache(), []
    assert [kept.get_or_make("key", lambda: made.append(0)) for _ in range(2)] == [None, None] and made == [0]


def test_a_layout_is_known_again_by_what_its_rows_are():
    kept, made = RunCache(), []

    def lookup(length=77, rows=2, images=None):
        chunk = Chunk(range(rows), Conditioning(None, length))
        UNetCall(1.0, (chunk,), images, cache=kept).cached_by_layout("key", lambda: made.append((length, rows, images)))

    for _ in range(2):
        lookup(), lookup(154), lookup(rows=3), lookup(images=(1, 2)), lookup(images=(2, 1))
    assert made == [(77, 2, None), (154, 2, None), (77, 3, None), (77, 2, (1, 2)), (77, 2, (2, 1))]
