"""Drawing and measuring of a plan, its progress, and its tables."""

from __future__ import annotations

import argparse
import contextlib
import sys
from urllib.parse import urlsplit

from ..common import table
from .measuring import METRICS, MeasureOptions, MeasureQueue, Measurer
from .plan import Plan
from .prompts import DEMO
from .schedule import Schedule
from .servers import servers, stop_servers, transport
from .session import Drawn, Job, ServerSession
from .store import Store, picture_file, set_files
from .workers import is_here


class Display:
    """A progress bar of pictures with the state of each server, and a line per problem. Every event is logged."""

    def __init__(self, store: Store, sets: int, pictures: int, done_sets: int, done_pictures: int):
        from tqdm import tqdm

        self.store, self.sets, self.done = store, sets, done_sets
        self.states: dict[str, str] = {}
        self.bar = tqdm(total=pictures, initial=done_pictures, unit="picture", desc="drawing", dynamic_ncols=True)

    def __call__(self, event: str, server: str, job: Job | None, reason: str) -> None:
        line = " ".join(filter(None, [server, event, job and job.key, reason and f"({reason})"]))
        self.store.log(line)
        self.states[server] = job.key if event == "draws" else event
        self.done += event == "drawn"
        if event in ("failed", "lost", "left out"):
            self.bar.write(line, file=sys.stderr)
        states = ", ".join(f"{server} {state}" for server, state in self.states.items())
        self.bar.set_postfix_str(f"{self.done}/{self.sets} sets; {states}", refresh=event != "drawn")
        if event == "drawn":
            self.bar.update(job.frames)


def run(plan: Plan, store: Store, options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Draw and measure the sets that the folder lacks.

    Returns key of a failed set -> reason, and a sentence for each measure that is not available.
    """
    pairs = {f"{method.name}/{one.name}": (method, one) for one in plan.sets for method in plan.methods}
    done_before = [key for key in pairs if store.has(key)]
    missing = [] if options.metrics_only else [plan.job(*pair) for key, pair in pairs.items() if key not in done_before]
    demo = plan.settings.checkpoint == DEMO
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        urls = stack.enter_context(servers(options, demo)) if missing else []
        worker = stack.enter_context(transport(urls, options))
        measuring = None
        if not options.no_metrics:
            measuring = MeasureQueue(
                store, worker(True, Measurer, measure_options(options, demo)), options.metrics_only
            )
            measuring.add(done_before)

        def save(job: Job, drawn: Drawn) -> None:
            method, one = pairs[job.key]
            files = [picture_file(picture, job.graph) for picture in drawn.pictures]
            store.save_set(job.key, set_files(files, plan.texts(method, one)))
            if measuring:
                measuring.add([job.key])
                measuring.collect()

        if missing:
            workers = {
                urlsplit(url).netloc: worker(is_here(url), ServerSession, url, store.run, options.patience)
                for url in urls
            }
            kinds = sorted({node["class_type"] for job in missing for node in job.graph.values()})
            done = sum(len(pairs[key][1].settings) for key in done_before)
            display = Display(store, len(pairs), done + sum(job.frames for job in missing), len(done_before), done)
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


def finish(measuring: MeasureQueue) -> list[str]:
    """Wait for the remaining measures, with a progress bar. Returns a sentence for each unavailable measure."""
    from tqdm import tqdm

    _, reasons = measuring.loaded()
    remaining = measuring.collect()
    with tqdm(total=remaining, unit="set", desc="measuring", disable=not remaining, dynamic_ncols=True) as bar:
        while remaining:
            after = measuring.collect(wait=True)
            bar.update(remaining - after)
            remaining = after
    return reasons


def measure_options(options: argparse.Namespace, demo: bool) -> MeasureOptions:
    return MeasureOptions(options.clip_i, options.clip_t, options.dreamsim, options.download, options.device, demo)


def results(plan: Plan, store: Store) -> str:
    """The report on all drawn sets of the plan, in Markdown."""
    from .table import MeasuredSet, report

    measured = {
        method.name: [
            MeasuredSet(store.read(key, "set.json"), store.read(key, METRICS))
            for key in plan.keys(method)
            if store.has(key)
        ]
        for method in plan.methods
    }
    return report(measured, plan.settings, plan.prompts)


def listed(plan: Plan, store: Store) -> str:
    """A table of every set with its state for each method."""

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
