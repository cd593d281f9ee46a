"""Threads of PyTorch on a CPU for what the scripts start: a busy core must not stop all others.

PyTorch's threads wait for each other after every operation, and spin while they wait. A small model has thousands of
small operations in a step: as soon as something else runs on one of the cores, each of them waits until that gives way,
and the spinning threads keep it from doing so. Fewer threads than free cores and a short spin end that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

SPINS = "4000"
"""Turns of a wait before a thread of GNU OpenMP goes to sleep, for which its own number is 300000."""
OWN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""What a user may have set, which wins."""


def cores_here() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load_now() -> float:
    """Processes that want to run, over the last minute; 0 where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def thread_settings(
    environment: Mapping[str, str], cores: int | None = None, load: float | None = None, processes: int = 1
) -> dict[str, str]:
    """Environment variables that what is started gets beside `environment`; none where its owner has chosen.

    cores, load: of this machine when not given. processes: how many are started like this one, each with its share.
    PyTorch's own number of threads, one per core, stays where nothing else runs; otherwise it is half of the free ones,
    for systems count two where a core can run two threads.
    """
    if any(name in environment for name in OWN):
        return {}
    cores = cores_here() if cores is None else cores
    others = round(load_now() if load is None else load)
    settings = {"GOMP_SPINCOUNT": SPINS}
    if others or processes > 1 or cores == 1:
        threads = max(1, (cores - others) // 2 // processes)
        settings |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return settings
