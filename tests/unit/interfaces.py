"""The list of ComfyUI's interfaces in `scripts/`, for tests."""

import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def host_interfaces():
    """The module of this name, which imports others of its folder."""
    scripts = str(ROOT / "scripts")
    sys.path.insert(0, scripts)
    try:
        import host_interfaces

        yield host_interfaces
    finally:
        sys.path.remove(scripts)
        for name in ("host_interfaces", "host_source", "host_data"):
            sys.modules.pop(name, None)
