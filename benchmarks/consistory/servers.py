"""The ComfyUI servers of a run: those that it is given, and those that it starts."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...scripts import comfyui
from .session import UNREACHABLE, ServerSession
from .workers import RayWorker, ThreadWorker, start_ray, stop_ray

STOP_SECONDS = 3


def print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def servers(options: argparse.Namespace, demo: bool) -> Iterator[list[str]]:
    """URLs of the servers: those of --server, and those started here for the duration of the context."""
    urls = list(dict.fromkeys(url if "//" in url else f"http://{url}" for url in options.server))
    count = options.local if options.local is not None else int(not urls)
    with contextlib.ExitStack() as stack:
        if count:
            host = comfyui.require_comfyui(options.comfyui, "--comfyui") if options.comfyui else comfyui.find_comfyui()
            cards = 0 if demo else graphics_cards()
            many = f"{count} servers of ComfyUI" if count > 1 else "ComfyUI"
            print_status(f"Starting {many} {comfyui.version_text(host)} here on the {'GPU' if cards else 'CPU'}")
            for number in range(count):
                base = comfyui.pack_base(stack.enter_context(comfyui.scratch("consistory")))
                models = base / "models.yaml"
                models.write_text(json.dumps({"here": models_of(options.models or host / "models")}), encoding="utf-8")
                arguments = ["--extra-model-paths-config", str(models)]
                arguments += ["--cuda-device", str(number % cards)] if cards > 1 else []
                server = comfyui.Server(
                    host, base, sys.executable, arguments, cpu=not cards, dies_with_us=True, processes=count
                )
                urls.append(stack.enter_context(server).url)
        yield urls


def models_of(folder: Path) -> dict[str, str]:
    return {"base_path": str(folder.resolve()), "checkpoints": "checkpoints"}


def graphics_cards() -> int:
    """Number of graphics cards that PyTorch sees; Apple's GPU counts as one."""
    import torch

    return torch.cuda.device_count() or int(torch.backends.mps.is_available())


@contextlib.contextmanager
def transport(urls: Sequence[str], options: argparse.Namespace) -> Iterator[Callable[..., RayWorker | ThreadWorker]]:
    """A function worker(here, class, *arguments) that makes a worker, in Ray or a thread. here: on this machine."""
    if options.no_ray or (len(urls) < 2 and options.ray is None):
        yield lambda here, *call: ThreadWorker(*call)
        return
    start_ray(options.ray)
    try:
        yield lambda here, *call: RayWorker(*call, here=here)
    finally:
        stop_ray()


def stop_servers(urls: Sequence[str], run: str) -> None:
    """Remove this run's workflows from the servers' queues, if they respond within STOP_SECONDS."""

    def stop(url: str) -> None:
        with contextlib.suppress(*UNREACHABLE):
            ServerSession(url, run, 0).cancel()

    threads = [threading.Thread(target=stop, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(STOP_SECONDS)
