"""PyTorch's CPU threads in the processes that the scripts start: a busy core must not stall the others.

PyTorch's threads wait for each other after every operation, and spin while they wait. A small model runs thousands of
small operations per step. If another process occupies one of the cores, every operation waits for it, and the spinning
threads delay it further. Fewer threads than free cores and a short spin avoid that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

SPINS = "4000"
"""Spins before a waiting thread of GNU OpenMP goes to sleep; its default is 300000."""
OWN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables that a user may have set; they take precedence."""


def cores_here() -> int:
    """Number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load_now() -> float:
    """Load average over the last minute; 0 where the system does not report one."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def thread_settings(
    environment: Mapping[str, str], cores: int | None = None, load: float | None = None, processes: int = 1
) -> dict[str, str]:
    """Environment variables to add to `environment` for a new process; none if the user has set any of them.

    cores, load: default those of this machine. processes: number of such processes that share the cores. PyTorch's
    default of one thread per core is kept on an idle machine; otherwise it is half the number of free cores, because a
    core with two hardware threads counts as two.
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
