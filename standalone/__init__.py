"""StoryLoom without ComfyUI: the same patches on a diffusers SDXL pipeline. See `pipeline.py`."""

from importlib.util import find_spec

NEEDED = {"diffusers": "diffusers", "transformers": "transformers", "open_clip": "open_clip_torch", "tqdm": "tqdm"}
"""Module -> package that this host needs in addition to the pack's own."""


def check_packages() -> None:
    """Raise ImportError if packages are missing, with the command that installs them."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"StoryLoom without ComfyUI needs {', '.join(missing)} (not installed). "
            'Install with: pip install "storyloom[standalone]"'
        )


def __getattr__(name: str):
    if name in ("StoryPipeline", "demo_model"):
        check_packages()
        from . import demo, pipeline

        return {"StoryPipeline": pipeline.StoryPipeline, "demo_model": demo.demo_model}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
