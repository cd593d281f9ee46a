"""Where work is done: in a thread of this process, or in a Ray actor on any machine of a cluster.

A place holds one object and calls its methods one at a time; every call is a `concurrent.futures.Future`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from urllib.parse import urlsplit

RAY_NEEDED = (
    'Several servers are scheduled with Ray, which is not installed: pip install ray, or "storyloom[benchmark]". '
    "With --no-ray threads do it."
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ThreadPlace:
    """A daemon thread, so that nothing waits for it when the run is stopped."""

    def __init__(self, make: Callable, *args):
        self._work: SimpleQueue = SimpleQueue()
        threading.Thread(target=self._loop, args=(make, args), daemon=True).start()

    def call(self, name: str, *args) -> Future:
        future: Future = Future()
        self._work.put((future, name, args))
        return future

    def lost(self, error: BaseException) -> bool:
        """Whether an error of a call means that the place itself is gone: a thread never is."""
        return False

    def close(self) -> None:
        self._work.put(None)

    def _loop(self, make: Callable, args: tuple) -> None:
        held = None
        while (item := self._work.get()) is not None:
            future, name, call_args = item
            try:
                held = make(*args) if held is None else held
                future.set_result(getattr(held, name)(*call_args))
            except BaseException as error:
                future.set_exception(error)


class RayPlace:
    """An actor. here: on the machine of this process, since what it needs is only reachable there."""

    def __init__(self, make: Callable, *args, here: bool = False):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {"num_cpus": 0, "max_restarts": -1}
        if here:
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        self._actor = ray.remote(Held).options(**options).remote(make, *args)

    def call(self, name: str, *args) -> Future:
        return self._actor.call.remote(name, *args).future()

    def lost(self, error: BaseException) -> bool:
        """Whether the actor's process or machine is gone. Ray starts it again for the next call."""
        from ray.exceptions import RayActorError

        return isinstance(error, RayActorError)

    def close(self) -> None:
        import ray

        ray.kill(self._actor)


class Held:
    """What an actor runs: an object of another class, made on the actor's machine."""

    def __init__(self, make: Callable, *args):
        self._held = make(*args)

    def call(self, name: str, *args):
        return getattr(self._held, name)(*args)


def start_ray(address: str | None) -> None:
    """Join the cluster at an address, or start one of this machine. ImportError says what to install."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ImportError(RAY_NEEDED) from None
    own = {} if address else {"include_dashboard": False, "num_cpus": 1, "object_store_memory": 200 * 1024**2}
    ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)


def stop_ray() -> None:
    import ray

    ray.shutdown()


def is_here(url: str) -> bool:
    """Whether a server's address means this machine."""
    return urlsplit(url).hostname in LOOPBACK
