"""Runs prompt sets of ConsiStory+ through ComfyUI servers and measures the pictures.

    python -m storyloom.benchmarks.consistory --prompts consistory+.yaml --server http://gpu1:8188 --server http://gpu2:8188
    python -m storyloom.benchmarks.consistory --prompts demo --method vanilla --method svr+ipca

Every set of the file is drawn with every --method on whichever server is free. Pictures, texts and measures lie in
out/consistory/ set by set, and `table.md` there beside the published values. A run that was stopped or killed goes on
with the same command; a server that ends gives its set to another. Without --server one ComfyUI is started here.

Methods: vanilla (each frame its own prompt), or joined with + one of none, npr, svr, svr-eot (the story as one prompt)
with ipca and csa: svr-eot+ipca (published), csa, csa+svr+ipca, ...
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from ...scripts import comfyui
from ..common import table
from .graph import DEMO_SETTINGS, PUBLISHED, Method, Settings, digest, graph_of, parse_method
from .measuring import METRICS, Choice, Measuring, Ruler
from .places import RayPlace, ThreadPlace, is_here, start_ray, stop_ray
from .prompts import DEMO, DEMO_STORIES, PromptFileError, PromptSet, chosen, demo_sets, read_prompts
from .schedule import NoServersError, Schedule
from .store import Store, StoreError, picture_file, set_files
from .worker import GONE, Drawn, Job, Worker

OUT = Path(__file__).absolute().parents[2] / "out" / "consistory"
STOP_SECONDS = 3


@dataclass(frozen=True)
class Plan:
    """Everything that a run is to draw. A set drawn with a method has the key "method/set"."""

    prompts: str
    prompts_digest: str
    settings: Settings
    methods: tuple[Method, ...]
    sets: tuple[PromptSet, ...]

    @property
    def run_settings(self) -> dict:
        """What decides the pictures of the folder: `run.json`."""
        seed = "each set's own" if all(one.seed is not None for one in self.sets) else self.settings.seed
        return {
            "prompts": self.prompts,
            "prompts_sha256": self.prompts_digest,
            **asdict(self.settings),
            "seed": seed,
        }

    def keys(self, method: Method) -> list[str]:
        return [f"{method.name}/{one.name}" for one in self.sets]

    def job(self, method: Method, one: PromptSet) -> Job:
        key, graph = f"{method.name}/{one.name}", graph_of(one, method, self.settings)
        return Job(key, f"{key} {digest(graph)}", graph, len(one.settings))

    def texts(self, method: Method, one: PromptSet) -> dict:
        """`set.json` of a set."""
        said = {**asdict(one), "settings": list(one.settings), "identity": one.identity, "prompts": one.prompts}
        return {**said, "method": method.name, "seed": self.settings.seed if one.seed is None else one.seed}


def plan_of(options: argparse.Namespace) -> Plan:
    """Raises PromptFileError, and ValueError for a method or a size that there is not."""
    given = {field.name: getattr(options, field.name) for field in fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    is_demo = options.prompts == DEMO
    base = DEMO_SETTINGS if given.get("checkpoint", DEMO if is_demo else None) == DEMO else Settings()
    settings = replace(base, **given)
    for name in ("width", "height"):
        if getattr(settings, name) % 8 or getattr(settings, name) < 64:
            raise ValueError(f"--{name} must be at least 64 and a multiple of 8, got {getattr(settings, name)}.")
    if is_demo:
        sets = demo_sets(DEMO_STORIES if options.limit is None else options.limit)
        named, digested = DEMO, ""
        if options.seed is not None:
            sets = [replace(one, seed=None) for one in sets]
    else:
        path = Path(options.prompts)
        sets, named = read_prompts(path), path.name
        digested = sha256(path.read_bytes()).hexdigest()
    methods = tuple(dict.fromkeys(map(parse_method, options.method or [PUBLISHED])))
    return Plan(named, digested, settings, methods, tuple(chosen(sets, options.only, options.limit)))


def folder_of(options: argparse.Namespace, plan: Plan) -> Path:
    return options.out or OUT / f"{Path(plan.prompts).stem}-{Path(plan.settings.checkpoint).stem}"


# ---- servers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def servers(options: argparse.Namespace, demo: bool) -> Iterator[list[str]]:
    """Addresses of the servers: those that are named, and those that are started here until the end."""
    named = list(dict.fromkeys(url if "//" in url else f"http://{url}" for url in options.server))
    count = options.local if options.local is not None else int(not named)
    with contextlib.ExitStack() as stack:
        if count:
            host = comfyui.require_comfyui(options.comfyui, "--comfyui") if options.comfyui else comfyui.find_comfyui()
            cards = 0 if demo else graphics_cards()
            many = f"{count} times ComfyUI" if count > 1 else "ComfyUI"
            say(f"Starting {many} {comfyui.version_text(host)} here, on the {'GPU' if cards else 'CPU'}")
            for number in range(count):
                base = comfyui.pack_base(stack.enter_context(comfyui.scratch("consistory")))
                models = base / "models.yaml"
                models.write_text(json.dumps({"here": models_of(options.models or host / "models")}), encoding="utf-8")
                arguments = ["--extra-model-paths-config", str(models)]
                arguments += ["--cuda-device", str(number % cards)] if cards > 1 else []
                server = comfyui.Server(
                    host, base, sys.executable, arguments, cpu=not cards, dies_with_us=True, processes=count
                )
                named.append(stack.enter_context(server).url)
        yield named


def models_of(folder: Path) -> dict[str, str]:
    return {"base_path": str(folder.resolve()), "checkpoints": "checkpoints"}


def graphics_cards() -> int:
    """How many graphics cards PyTorch sees; Apple's counts as one."""
    import torch

    return torch.cuda.device_count() or int(torch.backends.mps.is_available())


@contextlib.contextmanager
def transport(urls: Sequence[str], options: argparse.Namespace) -> Iterator[Callable[..., RayPlace | ThreadPlace]]:
    """How to make a place: place(here, class, *arguments), in Ray or in a thread; here: on this machine."""
    if options.no_ray or (len(urls) < 2 and options.ray is None):
        yield lambda here, *made: ThreadPlace(*made)
        return
    start_ray(options.ray)
    try:
        yield lambda here, *made: RayPlace(*made, here=here)
    finally:
        stop_ray()


def stop_servers(urls: Sequence[str], run: str) -> None:
    """Take what this run has queued off the servers, as far as they answer at once."""

    def stop(url: str) -> None:
        with contextlib.suppress(*GONE):
            Worker(url, run, 0).cancel()

    threads = [threading.Thread(target=stop, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(STOP_SECONDS)


# ---- the run ---------------------------------------------------------------------------------------------------------


class Display:
    """A bar of pictures with what each server does, and lines for what goes wrong; all of it in the log too."""

    def __init__(self, store: Store, sets: int, pictures: int, done_sets: int, done_pictures: int):
        from tqdm import tqdm

        self.store, self.sets, self.done = store, sets, done_sets
        self.states: dict[str, str] = {}
        self.bar = tqdm(total=pictures, initial=done_pictures, unit="picture", desc="drawing", dynamic_ncols=True)

    def __call__(self, what: str, server: str, job: Job | None, reason: str) -> None:
        line = " ".join(filter(None, [server, what, job and job.key, reason and f"({reason})"]))
        self.store.log(line)
        self.states[server] = job.key if what == "draws" else what
        self.done += what == "drawn"
        if what in ("failed", "lost", "left out"):
            self.bar.write(line, file=sys.stderr)
        states = ", ".join(f"{server} {state}" for server, state in self.states.items())
        self.bar.set_postfix_str(f"{self.done}/{self.sets} sets; {states}", refresh=what != "drawn")
        if what == "drawn":
            self.bar.update(job.frames)


def run(plan: Plan, store: Store, options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Draw what the folder lacks, and measure beside. Returns failed sets with reasons, and what is not measured."""
    pairs = {f"{method.name}/{one.name}": (method, one) for one in plan.sets for method in plan.methods}
    there = [key for key in pairs if store.has(key)]
    missing = [] if options.metrics_only else [plan.job(*pair) for key, pair in pairs.items() if key not in there]
    demo = plan.settings.checkpoint == DEMO
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        urls = stack.enter_context(servers(options, demo)) if missing else []
        place = stack.enter_context(transport(urls, options))
        measuring = None
        if not options.no_metrics:
            measuring = Measuring(store, place(True, Ruler, choice_of(options, demo)), options.metrics_only)
            measuring.add(there)

        def save(job: Job, drawn: Drawn) -> None:
            method, one = pairs[job.key]
            files = [picture_file(picture, job.graph) for picture in drawn.pictures]
            store.save_set(job.key, set_files(files, plan.texts(method, one)))
            if measuring:
                measuring.add([job.key])
                measuring.collect()

        if missing:
            workers = {
                urlsplit(url).netloc: place(is_here(url), Worker, url, store.run, options.patience) for url in urls
            }
            kinds = sorted({node["class_type"] for job in missing for node in job.graph.values()})
            done = sum(len(pairs[key][1].settings) for key in there)
            display = Display(store, len(pairs), done + sum(job.frames for job in missing), len(there), done)
            connect = kinds, None if demo else plan.settings.checkpoint
            try:
                failed = Schedule(missing, workers, connect, save, display, options.retries).run()
            except BaseException:
                stop_servers(urls, store.run)
                raise
            finally:
                display.bar.close()
        reasons = finish(measuring) if measuring else []
        return failed | (measuring.faults if measuring else {}), reasons


def finish(measuring: Measuring) -> list[str]:
    """Wait for what is still to be measured, with a bar. Returns why something is not measured at all."""
    from tqdm import tqdm

    _, reasons = measuring.loaded()
    remaining = measuring.collect()
    with tqdm(total=remaining, unit="set", desc="measuring", disable=not remaining, dynamic_ncols=True) as bar:
        while remaining:
            now = measuring.collect(wait=True)
            bar.update(remaining - now)
            remaining = now
    return reasons


def choice_of(options: argparse.Namespace, demo: bool) -> Choice:
    return Choice(options.clip_i, options.clip_t, options.dreamsim, options.download, options.device, demo)


def results(plan: Plan, store: Store) -> str:
    """The tables of everything of the plan that is drawn, in Markdown."""
    from .table import MeasuredSet, report

    found = {
        method.name: [
            MeasuredSet(store.read(key, "set.json"), store.read(key, METRICS))
            for key in plan.keys(method)
            if store.has(key)
        ]
        for method in plan.methods
    }
    return report(found, plan.settings, plan.prompts)


def listed(plan: Plan, store: Store) -> str:
    """What would run: every set with its state for each method."""

    def state(key: str) -> str:
        if not store.has(key):
            return "to draw"
        return "measured" if store.read(key, METRICS) else "drawn"

    rows = [
        [one.name, str(len(one.settings)), *(state(f"{method.name}/{one.name}") for method in plan.methods)]
        for one in plan.sets
    ]
    pictures = sum(len(one.settings) for one in plan.sets)
    head = ["set", "frames", *(method.name for method in plan.methods)]
    to_draw = sum(row.count("to draw") for row in rows)
    return f"{table(head, rows)}\n\n{len(rows)} sets, {pictures} frames; {to_draw} to draw. Folder: {store.folder}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m storyloom.benchmarks.consistory", description=__doc__, formatter_class=shape
    )
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help="prompt sets in the published format, or: demo")
    add("--method", action="append", metavar="METHOD", help=f"as above, may be repeated (default {PUBLISHED})")
    add("--only", action="append", default=[], metavar="SUPERCLASS", help="these sets only, may be repeated")
    add("--limit", type=int, metavar="N", help=f"the first N sets only (of demo: {DEMO_STORIES} without)")
    add("--out", type=Path, metavar="DIR", help="folder of the run (default out/consistory/<prompts>-<checkpoint>)")
    add("--list", action="store_true", help="show what would run, and end")
    where = parser.add_argument_group("servers")
    add = where.add_argument
    add(
        "--server", action="append", default=[], metavar="URL", help="a running ComfyUI with StoryLoom, may be repeated"
    )
    add("--local", type=int, metavar="N", help="ComfyUI servers to start here (default 1 without --server, else 0)")
    add("--comfyui", type=Path, metavar="DIR", help="ComfyUI to start (default: as make demo finds it)")
    add("--models", type=Path, metavar="DIR", help="models folder for servers started here (default: that ComfyUI's)")
    add("--ray", metavar="ADDRESS", help='Ray cluster to join, or "auto" (default: one of this machine)')
    add("--no-ray", action="store_true", help="schedule several servers with threads")
    add("--retries", type=int, default=5, help="how often in a row a lost server is tried again (default 5)")
    add("--patience", type=float, default=3600, metavar="SECONDS", help="longest time for one set (default 3600)")
    drawing = parser.add_argument_group("drawing (defaults: as published; in brackets with the demo model)")
    add = drawing.add_argument
    tiny, full = DEMO_SETTINGS, Settings()
    add("--checkpoint", metavar="NAME", help=f"checkpoint of the servers, or: demo (default {full.checkpoint})")
    add("--seed", type=int, help=f"of every set (default {full.seed}; stories of --prompts demo have their own)")
    add("--steps", type=int, help=f"({full.steps} [{tiny.steps}])")
    add("--width", type=int, help=f"({full.width} [{tiny.width}])")
    add("--height", type=int, help=f"({full.height} [{tiny.height}])")
    add("--cfg", type=float, help=f"({full.cfg:g})")
    add("--sampler", help=f"({full.sampler})")
    add("--scheduler", help=f"({full.scheduler} [{tiny.scheduler}])")
    add("--noise", choices=("same", "different"), help="same: all frames of a set start from the same (default)")
    add("--identity-weight", type=float, help=f"of IPCA ({full.identity_weight:g})")
    add("--sampling-rate", type=float, help=f"of CSA ({full.sampling_rate:g})")
    measures = parser.add_argument_group("measuring")
    add = measures.add_argument
    add("--no-metrics", action="store_true", help="only draw")
    add("--metrics-only", action="store_true", help="measure what is drawn again, draw nothing")
    add("--clip-t", default="openai", metavar="FILE|TAG", help="weights of ViT-B/32 for CLIP-T (default openai)")
    add("--clip-i", default="openai", metavar="FILE|TAG", help="weights of ViT-B/16 for CLIP-I (default openai)")
    add("--dreamsim", type=Path, metavar="DIR", help="folder with DreamSim's weights")
    add("--download", action="store_true", help="download weights that are not in the cache")
    add("--device", default="cpu", help="device that measures (default cpu)")
    options = parser.parse_args(arguments)
    if options.no_metrics and options.metrics_only:
        parser.error("--no-metrics and --metrics-only leave nothing to do")
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    options.shared_noise = None if options.noise is None else options.noise == "same"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 when sets failed, 2 when the run could not go on, 130 when it was stopped."""
    options = parse(arguments)
    try:
        plan = plan_of(options)
        store = Store(folder_of(options, plan))
        if options.list:
            print(listed(plan, store))
            return 0
        with store.opened(plan.run_settings):
            failed, reasons = run(plan, store, options)
            text = results(plan, store)
            store.write(store.folder / "table.md", text.encode())
        print(f"\n{text}")
        for reason in reasons:
            say(reason)
        say(f"Pictures, measures and table.md: {store.folder}")
        for key, reason in failed.items():
            say(f"Failed: {key}: {reason}")
        if failed:
            say(f"{len(failed)} sets failed; the same command tries them again.")
        return 1 if failed else 0
    except KeyboardInterrupt:
        say("\nStopped. The same command goes on where it was.")
        return 130
    except NoServersError as error:
        say(f"{error} The same command goes on where it was.")
    except (PromptFileError, StoreError, ImportError, ValueError, OSError, comfyui.ComfyUIError) as error:
        say(str(error))
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
