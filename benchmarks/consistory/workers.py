"""Workers that run the calls of one object: a thread of this process, or a Ray actor on any machine of a cluster.

A worker holds one object and calls its methods one at a time; every call is a `concurrent.futures.Future`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from urllib.parse import urlsplit

RAY_MISSING = (
    'Several servers need Ray, which is not installed: pip install ray, or "storyloom[benchmark]". '
    "With --no-ray, threads are used."
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ThreadWorker:
    """A daemon thread, so that it does not delay the end of a stopped run."""

    def __init__(self, make: Callable, *args):
        self._work: SimpleQueue = SimpleQueue()
        threading.Thread(target=self._loop, args=(make, args), daemon=True).start()

    def call(self, name: str, *args) -> Future:
        future: Future = Future()
        self._work.put((future, name, args))
        return future

    def lost(self, error: BaseException) -> bool:
        """Whether an error of a call means that the worker itself is gone: never for a thread."""
        return False

    def close(self) -> None:
        self._work.put(None)

    def _loop(self, make: Callable, args: tuple) -> None:
        target = None
        while (item := self._work.get()) is not None:
            future, name, call_args = item
            try:
                target = make(*args) if target is None else target
                future.set_result(getattr(target, name)(*call_args))
            except BaseException as error:
                future.set_exception(error)


class RayWorker:
    """A Ray actor. here: on the machine of this process, if its server or files are only reachable there."""

    def __init__(self, make: Callable, *args, here: bool = False):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {"num_cpus": 0, "max_restarts": -1}
        if here:
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        self._actor = ray.remote(Actor).options(**options).remote(make, *args)

    def call(self, name: str, *args) -> Future:
        return self._actor.call.remote(name, *args).future()

    def lost(self, error: BaseException) -> bool:
        """Whether the actor's process or machine is gone; Ray restarts it for the next call."""
        from ray.exceptions import RayActorError

        return isinstance(error, RayActorError)

    def close(self) -> None:
        import ray

        ray.kill(self._actor)


class Actor:
    """Wraps an object of any class, made on the actor's machine."""

    def __init__(self, make: Callable, *args):
        self._target = make(*args)

    def call(self, name: str, *args):
        return getattr(self._target, name)(*args)


def start_ray(address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine. Raises ImportError without Ray."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ImportError(RAY_MISSING) from None
    own = {} if address else {"include_dashboard": False, "num_cpus": 1, "object_store_memory": 200 * 1024**2}
    ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)


def stop_ray() -> None:
    import ray

    ray.shutdown()


def is_here(url: str) -> bool:
    """Whether a server's address is this machine's loopback."""
    return urlsplit(url).hostname in LOOPBACK
