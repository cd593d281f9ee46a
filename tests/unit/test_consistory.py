"""The ConsiStory+ benchmark without a model: files, workflows, scheduling, the folder, tables, and whole runs."""

import importlib.util
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ALL_COMPLETED, Future, wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_comfyui import CHECKPOINT, FakeComfyUI
from PIL import Image
from waiting import LIMIT, wait_until

from storyloom.benchmarks.consistory import __main__ as command
from storyloom.benchmarks.consistory import schedule as scheduling
from storyloom.benchmarks.consistory import servers
from storyloom.benchmarks.consistory.graph import (
    DEMO_SETTINGS,
    Method,
    Settings,
    digest,
    escaped,
    graph_of,
    parse_method,
)
from storyloom.benchmarks.consistory.measuring import MeasureQueue, Measurer
from storyloom.benchmarks.consistory.options import parse
from storyloom.benchmarks.consistory.plan import plan_of
from storyloom.benchmarks.consistory.prompts import PromptFileError, PromptSet, chosen, demo_sets, read_prompts
from storyloom.benchmarks.consistory.run import finish, measure_options, results, run
from storyloom.benchmarks.consistory.schedule import NoServersError, Schedule
from storyloom.benchmarks.consistory.session import Drawn, Failed, Job, Lost, Ready, ServerSession, Unfit
from storyloom.benchmarks.consistory.store import STATE, Store, StoreError, picture_file, set_files
from storyloom.benchmarks.consistory.table import MeasuredSet, cell, report
from storyloom.benchmarks.consistory.workers import RayWorker, ThreadWorker, start_ray, stop_ray
from storyloom.prompts.script import parse_story

pytest.importorskip("yaml")
PUBLISHED_FILE = Path(__file__).resolve().parents[3] / "shared" / "data" / "consistory_plus.yaml"
TEXT = """\
animals:
- concept_token: red fox
  settings: [asleep in the snow, "at #3, [left]", in a café]
  style: A vivid drawing of
  subject: A fox of A forest
- concept_token: bear
  settings: [in a cave, on a train]
  style: ''
  subject: a bear
technoledge:
- concept_token: robot
  settings: [in a city]
  style: A photo of
  subject: a robot
"""
SET = PromptSet(1, "animals", "fox", "A drawing of", "a fox", ("asleep", "jumping"))


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "sets.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


class TestPromptFiles:
    def test_texts_stay_as_they_are(self, prompt_file):
        fox, bear, robot = read_prompts(prompt_file)
        assert (fox.identity, bear.identity) == ("A vivid drawing of A fox of A forest", "a bear")
        assert fox.prompts[1] == "A vivid drawing of A fox of A forest at #3, [left]"
        assert [one.name for one in (fox, bear, robot)] == [
            "001-animals-red-fox",
            "002-animals-bear",
            "003-technoledge-robot",
        ]

    def test_a_part_can_be_chosen(self, prompt_file):
        sets = read_prompts(prompt_file)
        assert [one.number for one in chosen(sets, ["technoledge"], None)] == [3]
        assert [one.number for one in chosen(sets, [], 2)] == [1, 2]
        with pytest.raises(PromptFileError, match=r'no superclass "technology"\. Known: animals, technoledge'):
            chosen(sets, ["technology"], None)

    @pytest.mark.parametrize(
        "text, fault",
        [
            ("animals: [", "is not valid YAML"),
            ("- 1", "contains no prompt sets"),
            ("animals: fox", '"animals" needs a list of sets, got str'),
            ("animals: [{concept_token: a, settings: [b], style: c}]", '"animals", set 1 has no subject'),
            ("animals: [{concept_token: a, settings: b, style: c, subject: d}]", "settings needs a list"),
            (
                "animals: [{concept_token: a, settings: [no], style: c, subject: d}]",
                "settings 1 is False, which is not text",
            ),
            ("animals: [{concept_token: a, settings: [''], style: c, subject: d}]", "settings 1 is empty"),
        ],
    )
    def test_a_faulty_file_says_where(self, tmp_path, text, fault):
        file = tmp_path / "faulty.yaml"
        file.write_text(text)
        with pytest.raises(PromptFileError, match="faulty.yaml") as error:
            read_prompts(file)
        assert fault in str(error.value)

    @pytest.mark.skipif(not PUBLISHED_FILE.exists(), reason="the published file is not here")
    def test_the_published_file(self):
        sets = read_prompts(PUBLISHED_FILE)
        assert (len(sets), sum(len(one.settings) for one in sets)) == (192, 1100)
        assert len({one.name for one in sets}) == 192
        assert {one.superclass for one in sets} >= {"technoledge"}
        assert sets[0].prompts[0] == (
            "A fiery and majestic illustration of A phoenix with bright orange feathers rising from a fiery ashes"
        )

    def test_the_demo_s_sets_are_the_stories_of_the_effect_page(self):
        from storyloom.benchmarks.consistory.measuring import world_story
        from storyloom.benchmarks.effect import FIRST_SEED, FIRST_STORY
        from storyloom.world.stories import random_story

        for number, one in enumerate(demo_sets(50)):
            story, parsed = random_story(FIRST_STORY + number), world_story(one.identity, one.settings)
            assert one.seed == FIRST_SEED + number
            assert (parsed.frames, parsed.shown) == (story.frames, story.shown)
            assert [(who.species, who.looks) for who in parsed.identities] == [
                (who.species, who.looks) for who in story.identities
            ]


class TestMethods:
    @pytest.mark.parametrize(
        "text, method, name",
        [
            ("vanilla", Method(), "vanilla"),
            ("IPCA", Method(ipca=True), "ipca"),
            ("svr-eot+ipca", Method("svr_eot", True), "svr-eot+ipca"),
            ("ipca+svr+csa", Method("svr", True, True), "csa+svr+ipca"),
            ("none", Method("none"), "none"),
        ],
    )
    def test_names(self, text, method, name):
        assert parse_method(text) == method
        assert method.name == name and parse_method(name) == method

    @pytest.mark.parametrize("text", ["", "svr+npr", "vanilla+ipca", "ipca+ipca", "storydiffusion"])
    def test_other_names_are_refused(self, text):
        with pytest.raises(ValueError, match="There is no method"):
            parse_method(text)

    @pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
    def test_they_mean_what_the_host_without_comfyui_means(self):
        from storyloom.standalone.pipeline import METHODS

        for name, method in METHODS.items():
            assert parse_method("vanilla" if name == "frames" else name) == Method(*method)


class TestWorkflows:
    def test_published_settings(self):
        graph = graph_of(SET, parse_method("svr-eot+ipca"), Settings())
        sampler = graph["sampler"]["inputs"]
        settings = {name: sampler[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler", "model")}
        assert settings == {
            "seed": 42,
            "steps": 50,
            "cfg": 5.0,
            "sampler_name": "euler",
            "scheduler": "ddim_uniform",
            "model": ["ipca", 0],
        }
        assert graph["noise"]["inputs"] | {"story": None} == {
            "width": 1024,
            "height": 1024,
            "shared_noise": True,
            "story": None,
        }
        assert graph["text"]["inputs"]["reweighting"] == "svr_eot"
        assert graph["zeros"]["class_type"] == "ConditioningZeroOut"

    def test_each_part_of_a_method_is_a_node(self):
        def kinds(method):
            return {node["class_type"] for node in graph_of(SET, parse_method(method), Settings()).values()}

        vanilla = kinds("vanilla")
        assert "StoryLoom_EncodePerFrame" in vanilla
        assert kinds("ipca") - vanilla == {"StoryLoom_IPCA"}
        assert kinds("csa") - vanilla == {"StoryLoom_ConsistentSelfAttention"}
        assert kinds("svr") ^ vanilla == {"StoryLoom_EncodePerFrame", "StoryLoom_EncodeOnePrompt"}
        model = graph_of(SET, parse_method("csa+svr+ipca"), Settings())
        assert model["sampler"]["inputs"]["model"] == ["ipca", 0] and model["ipca"]["inputs"]["model"] == ["csa", 0]

    def test_every_text_reaches_the_script_as_it_stands(self):
        texts = ["a #1 [big] fox", "[Fox] at #2", r"back\slash"]
        story = parse_story(escaped(texts[0]), "\n".join(map(escaped, texts[1:])))
        assert story.identity == texts[0]
        assert [frame.text for frame in story.frames] == texts[1:]

    def test_a_set_s_own_seed_goes_before_the_run_s(self):
        own = demo_sets(1)[0]
        seeds = [graph_of(one, Method(csa=True), DEMO_SETTINGS) for one in (own, SET)]
        assert [(g["sampler"]["inputs"]["seed"], g["csa"]["inputs"]["seed"]) for g in seeds] == [(5000, 5000), (42, 42)]


# ---- scheduling ------------------------------------------------------------------------------------------------------


def job(number):
    return Job(f"vanilla/{number}", f"tag {number}", {}, 1)


class FakeWorker:
    """A worker with the results of script(name, *args)."""

    def __init__(self, script):
        self.script, self.calls = script, []

    def call(self, name, *args):
        future = Future()
        self.calls.append((name, *args[:1]))

        def work():
            try:
                future.set_result(self.script(name, *args))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def lost(self, error):
        return isinstance(error, ConnectionError)


class Turns:
    """Workers whose calls finish only while the schedule waits: as many as it waits for, in a chosen order.

    choose: number of waiting calls -> index of the call that finishes next, 0 for the oldest.
    """

    def __init__(self, monkeypatch, choose=lambda waiting: 0):
        self.calls, self.choose = [], choose
        monkeypatch.setattr(scheduling, "wait", self.wait)

    def worker(self, script):
        def call(name, *args):
            self.calls.append((Future(), script(name, *args)))
            return self.calls[-1][0]

        return SimpleNamespace(call=call, lost=lambda error: False)

    def wait(self, calls, seconds=None, for_what=ALL_COMPLETED):
        enough = all if for_what == ALL_COMPLETED else any
        while not enough(call.done() for call in calls):
            future, outcome = self.calls.pop(self.choose(len(self.calls)))
            future.set_result(outcome)
        return wait(calls, seconds, for_what)


def ready(*held):
    return Ready(frozenset(held))


def run_schedule(jobs, workers, retries=2, **options):
    saved, events = [], []

    def watch(event, server, job, reason):
        events.append((event, server, job and job.key))

    def save(job, drawn):
        saved.append(job.key)

    schedule = Schedule(jobs, workers, ((), None), save, watch, retries=retries, pause=0.001, **options)
    return schedule.run(), saved, events


def steady(name, *args):
    return ready() if name == "connect" else Drawn((b"",))


class TestSchedule:
    @pytest.mark.parametrize("seed", range(5))
    def test_every_job_is_drawn_once_in_whatever_order_servers_answer(self, seed, monkeypatch):
        chosen = random.Random(seed)
        turns = Turns(monkeypatch, lambda waiting: chosen.randrange(waiting))
        failed, saved, events = run_schedule(list(map(job, range(12))), {name: turns.worker(steady) for name in "abc"})
        assert not failed and {server for event, server, _ in events if event == "drawn"} == set("abc")
        assert sorted(saved) == sorted(f"vanilla/{i}" for i in range(12))

    def test_a_dead_server_s_job_goes_to_another_and_the_server_is_left_out(self):
        def dies(name, *args):
            return ready() if name == "connect" and len(dead.calls) == 1 else Lost("refused")

        dead = FakeWorker(dies)
        failed, saved, events = run_schedule(list(map(job, range(4))), {"dead": dead, "good": FakeWorker(steady)})
        assert not failed and len(saved) == len(set(saved)) == 4
        (lost,) = {key for event, server, key in events if event == "lost" and key}
        assert ("drawn", "good", lost) in events

    def test_a_server_that_comes_back_goes_on(self):
        answers = iter([ready(), Lost("away"), Lost("still"), ready()])
        alone = FakeWorker(lambda name, *args: next(answers, Drawn((b"",))))
        failed, saved, _ = run_schedule([job(0), job(1)], {"a": alone})
        assert not failed and saved == ["vanilla/0", "vanilla/1"]

    def test_a_drawn_job_counts_a_server_as_sound_again(self):
        answers = iter([ready(), Lost(""), ready(), Drawn(()), Lost(""), ready(), Drawn(()), Lost(""), ready()])
        flaky = FakeWorker(lambda name, *args: next(answers, Drawn(())))
        failed, saved, _ = run_schedule(list(map(job, range(3))), {"a": flaky}, retries=1)
        assert not failed and len(saved) == 3

    def test_it_is_tried_so_often_and_then_the_run_stops(self):
        dead = FakeWorker(lambda name, *args: Lost("refused"))
        with pytest.raises(NoServersError, match=r"1 sets are not drawn \(a: refused\)"):
            run_schedule([job(0)], {"a": dead}, retries=3)
        assert len(dead.calls) == 4

    def test_an_unfit_server_is_not_tried_again(self):
        unfit = FakeWorker(lambda name, *args: Unfit("it has no node X"))
        failed, saved, _ = run_schedule([job(0)], {"a": unfit, "b": FakeWorker(steady)})
        assert saved == ["vanilla/0"] and len(unfit.calls) == 1
        with pytest.raises(NoServersError, match="no node X"):
            run_schedule([job(0)], {"a": unfit})

    def test_a_job_s_own_failure_stops_nothing(self):
        def fails_one(name, *args):
            return Failed("out of memory") if name == "draw" and args[0].key == "vanilla/1" else steady(name)

        failed, saved, _ = run_schedule(list(map(job, range(3))), {"a": FakeWorker(fails_one)})
        assert failed == {"vanilla/1": "out of memory"} and saved == ["vanilla/0", "vanilla/2"]

    def test_a_job_that_servers_die_of_fails_and_the_others_are_drawn(self):
        def crashes(name, *args):
            return Lost("ended") if name == "draw" and args[0].key == "vanilla/1" else steady(name)

        failed, saved, _ = run_schedule(list(map(job, range(4))), {n: FakeWorker(crashes) for n in "ab"}, retries=5)
        assert list(failed) == ["vanilla/1"] and "3 times a server was lost" in failed["vanilla/1"]
        assert sorted(saved) == ["vanilla/0", "vanilla/2", "vanilla/3"]

    def test_pictures_that_cannot_be_read_count_as_a_loss(self):
        def unreadable(job, drawn):
            raise ValueError("the server's picture cannot be read")

        schedule = Schedule([job(0)], {"a": FakeWorker(steady)}, ((), None), unreadable, lambda *a: None, 5, 0.001)
        assert "cannot be read" in schedule.run()["vanilla/0"]

    def test_what_a_server_holds_from_before_stays_there(self, monkeypatch):
        """Even if another server responds first."""

        def holds(name, *args):
            return ready("tag 0", "tag 2") if name == "connect" else Drawn((b"",))

        turns = Turns(monkeypatch)
        workers = {"a": turns.worker(steady), "b": turns.worker(holds)}
        _, _, events = run_schedule(list(map(job, range(3))), workers)
        drawn = {key: server for event, server, key in events if event == "draws"}
        assert drawn == {"vanilla/0": "b", "vanilla/2": "b", "vanilla/1": "a"}

    def test_what_it_held_is_drawn_elsewhere_when_it_is_lost(self):
        def holds_and_dies(name, *args):
            return ready("tag 0", "tag 1") if name == "connect" and len(dying.calls) == 1 else Lost("gone")

        dying = FakeWorker(holds_and_dies)
        _, saved, _ = run_schedule([job(0), job(1)], {"b": dying, "a": FakeWorker(steady)})
        assert sorted(saved) == ["vanilla/0", "vanilla/1"]

    def test_a_worker_that_ends_is_a_lost_server_and_a_fault_of_ours_is_not_hidden(self):
        def breaks(error):
            def script(name, *args):
                if name == "draw":
                    raise error
                return ready()

            return FakeWorker(script)

        _, saved, _ = run_schedule([job(0)], {"a": breaks(ConnectionError()), "b": FakeWorker(steady)})
        assert saved == ["vanilla/0"]
        with pytest.raises(ZeroDivisionError):
            run_schedule([job(0)], {"a": breaks(ZeroDivisionError())})


# ---- the folder ------------------------------------------------------------------------------------------------------


def picture(colour=(1, 2, 3), **options):
    written = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(written, "PNG", **options)
    return written.getvalue()


class TestStore:
    def test_a_set_is_there_whole_or_not_at_all(self, tmp_path, monkeypatch):
        store = Store(tmp_path)
        with store.locked({}):
            monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                store.save_set("svr/one", {"frame-01.png": b"x"})
        assert not store.has("svr/one") and list((store.state / "unfinished").iterdir())
        monkeypatch.undo()
        with store.locked({}):
            assert not list((store.state / "unfinished").iterdir())
            store.save_set("svr/one", {"frame-01.png": b"x"})
            assert store.has("svr/one") and store.pictures("svr/one") == [b"x"]

    def test_two_runs_never_write_into_one_folder(self, tmp_path):
        with Store(tmp_path).locked({}):
            with pytest.raises(StoreError, match="Another run is writing"):
                with Store(tmp_path).locked({}):
                    pass
        with Store(tmp_path).locked({}):
            pass

    def test_other_settings_are_refused_and_named(self, tmp_path):
        with Store(tmp_path).locked({"steps": 50, "seed": 1}):
            pass
        with pytest.raises(StoreError, match=r"\(steps 50 there, 20 now\)"):
            with Store(tmp_path).locked({"steps": 20, "seed": 1}):
                pass

    def test_the_same_pixels_give_the_same_file(self):
        graph = {"1": {"class_type": "A"}}
        files = {picture_file(picture(compress_level=level), graph) for level in (1, 9)}
        assert len(files) == 1
        assert json.loads(Image.open(io.BytesIO(files.pop())).text["prompt"]) == graph
        with pytest.raises(ValueError, match="cannot be read"):
            picture_file(picture()[:40], graph)


# ---- workers on a server ---------------------------------------------------------------------------------------------


@pytest.fixture
def start():
    started = []

    def start(**options):
        started.append(FakeComfyUI(**options))
        return started[-1]

    yield start
    for fake in started:
        if not fake.ended.is_set():
            fake.end()


def a_job(method="vanilla", one=SET):
    graph = graph_of(one, parse_method(method), Settings(CHECKPOINT))
    return Job(f"{method}/{one.name}", f"{method}/{one.name} {digest(graph)}", graph, len(one.settings))


def when(true, do):
    """Call `do` as soon as `true` returns something true. Returns the future of its result."""
    future = Future()

    def work():
        try:
            wait_until(true)
            future.set_result(do())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


class TestWorker:
    def test_it_draws_a_picture_per_frame(self, start):
        worker = ServerSession(start().url, "run", LIMIT)
        assert worker.connect((), ["KSampler"], CHECKPOINT) == ready()
        drawn = worker.draw(a_job())
        assert [Image.open(io.BytesIO(file)).size for file in drawn.pictures] == [(8, 8)] * 2

    def test_a_server_without_the_pack_or_the_checkpoint_is_unfit(self, start):
        worker = ServerSession(start(missing=["StoryLoom_IPCA"]).url, "run", LIMIT)
        assert "no node StoryLoom_IPCA" in worker.connect((), ["KSampler", "StoryLoom_IPCA"], None).reason
        assert f'no checkpoint "x" (found: {CHECKPOINT})' in worker.connect((), [], "x").reason

    def test_a_refused_and_a_failed_workflow_are_the_job_s_fault(self, start):
        refused = ServerSession(start(refuses=lambda graph: "not valid").url, "run", LIMIT).draw(a_job())
        failed = ServerSession(start(fails=lambda graph: "out of memory").url, "run", LIMIT).draw(a_job())
        assert isinstance(refused, Failed) and "not valid" in refused.reason
        assert isinstance(failed, Failed) and "out of memory" in failed.reason

    def test_a_server_that_is_not_there_or_ends_is_lost(self, start):
        fake = start(limit=0)
        worker = ServerSession(fake.url, "run", LIMIT)
        when(lambda: fake.running, fake.end)
        assert isinstance(worker.draw(a_job()), Lost)
        assert isinstance(worker.connect((), [], None), Lost)

    def test_a_server_that_forgets_or_hangs_is_lost(self, start):
        forgetful, slow = start(limit=0), start(limit=0)
        worker = ServerSession(forgetful.url, "run", LIMIT)
        when(lambda: forgetful.running, lambda: setattr(forgetful, "running", None))
        assert "no longer has the workflow" in worker.draw(a_job()).reason
        assert "--patience" in ServerSession(slow.url, "run", 0).draw(a_job()).reason
        wait_until(lambda: slow.interrupted)

    def test_what_a_killed_run_left_is_taken_up_and_not_queued_again(self, start):
        fake = start(limit=0)
        jobs = [a_job(), a_job("ipca"), a_job("csa")]
        before = ServerSession(fake.url, "run", LIMIT)
        for each in jobs:
            before.client.submit(each.graph, {"storyloom": {"run": "run", "job": each.tag}})
        before.client.submit(jobs[0].graph, {"storyloom": {"run": "another", "job": jobs[0].tag}})
        before.client.submit(jobs[0].graph)
        worker = ServerSession(fake.url, "run", LIMIT)
        wanted = {jobs[0].tag, jobs[1].tag}
        assert worker.connect(wanted, [], None) == Ready(frozenset(wanted))
        fake.limit = math.inf
        for each in jobs[:2]:
            assert isinstance(worker.draw(each), Drawn)
        wait_until(lambda: len(fake.history) == 4)
        assert [entry["prompt"][3].get("storyloom", {}).get("job") for entry in fake.history.values()] == [
            jobs[0].tag,
            jobs[1].tag,
            jobs[0].tag,
            None,
        ]
        assert worker.connect(wanted, [], None) == Ready(frozenset(wanted)), "drawn ones are found in the history"
        worker.draw(jobs[0])
        assert len(fake.history) == 4

    def test_one_whose_pictures_are_gone_is_drawn_again(self, start, monkeypatch):
        fake = start()
        ServerSession(fake.url, "run", LIMIT).draw(a_job())
        picture_of, gone = fake.picture, list(fake.history)
        monkeypatch.setattr(fake, "picture", lambda name: picture_of(name) if len(fake.history) > len(gone) else 1 / 0)
        again = ServerSession(fake.url, "run", LIMIT)
        assert again.connect({a_job().tag}, [], None) == ready(a_job().tag)
        assert isinstance(again.draw(a_job()), Drawn)
        assert len(fake.history) == 2

    def test_one_that_failed_before_is_queued_again(self, start):
        fake = start(fails=lambda graph: "out of memory")
        ServerSession(fake.url, "run", LIMIT).draw(a_job())
        fake.fails = lambda graph: None
        again = ServerSession(fake.url, "run", LIMIT)
        assert again.connect({a_job().tag}, [], None) == ready()
        assert isinstance(again.draw(a_job()), Drawn)

    def test_cancelling_touches_this_run_only(self, start):
        fake = start(limit=0)
        worker = ServerSession(fake.url, "run", LIMIT)
        for name in ("run", "run", "another"):
            worker.client.submit(a_job().graph, {"storyloom": {"run": name, "job": "j"}})
        wait_until(lambda: fake.running)
        worker.cancel()
        wait_until(lambda: fake.running and fake.running[3]["storyloom"]["run"] == "another")
        assert len(fake.interrupted) == 1 and not fake.queue


# ---- whole runs ------------------------------------------------------------------------------------------------------


def tree(folder):
    """Relative path -> content of everything but the state."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in contents.items() if not name.startswith(STATE)}


def arguments(prompt_file, out, *fakes):
    servers = [text for fake in fakes for text in ("--server", fake.url)]
    methods = ["--method", "vanilla", "--method", "svr+ipca"]
    options = ["--prompts", prompt_file, "--out", out, *servers, *methods, "--checkpoint", CHECKPOINT, "--no-metrics"]
    return list(map(str, options))


@pytest.fixture
def whole(prompt_file, start, tmp_path):
    """The tree of an undisturbed run."""
    out = tmp_path / "whole"
    assert command.main(arguments(prompt_file, out, start())) == 0
    return tree(out)


def popen(arguments):
    """The command as in a terminal: Ctrl-C reaches it even if the tests run in the background."""
    line = [sys.executable, "-m", "storyloom.benchmarks.consistory", *arguments]
    preexec = None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=preexec)


class TestRuns:
    def test_files_have_names_that_stay_and_texts_beside_them(self, whole):
        assert {name.rpartition("/")[0] for name in whole} - {""} == {
            f"{method}/{name}"
            for method in ("vanilla", "svr+ipca")
            for name in ("001-animals-red-fox", "002-animals-bear", "003-technoledge-robot")
        }
        texts = json.loads(whole["vanilla/001-animals-red-fox/set.json"])
        assert texts["prompts"][2] == "A vivid drawing of A fox of A forest in a café"
        assert texts["frames"] == ["frame-01.png", "frame-02.png", "frame-03.png"]
        assert texts["seed"] == 42
        assert json.loads(whole["run.json"])["steps"] == 50

    @pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT] if os.name != "nt" else [])
    def test_a_run_that_is_ended_goes_on_and_gives_the_same_files(self, end, whole, prompt_file, start, tmp_path):
        out, fake = tmp_path / "ended", start(limit=2)
        line = arguments(prompt_file, out, fake)
        process = popen(line)
        wait_until(lambda: len(fake.drawn) == 2 and fake.running)
        process.send_signal(end)
        output, _ = process.communicate(timeout=LIMIT)
        half = tree(out)
        assert "run.json" in half and len(half) < len(whole)
        if end == signal.SIGINT:
            assert process.returncode == 130 and "Run the same command to resume" in output
            wait_until(lambda: fake.interrupted)
        fake.limit = math.inf
        assert command.main(line) == 0
        assert tree(out) == whole
        assert len(fake.drawn) == len(set(fake.drawn)) == 6, "nothing is drawn twice"
        assert command.main(line) == 0
        assert len(fake.history) == 6 + (end == signal.SIGINT), "a finished run draws nothing"

    def test_when_one_of_two_servers_dies_the_other_takes_over(self, whole, prompt_file, start, tmp_path):
        out, good, dying = tmp_path / "two", start(), start(limit=0)
        ended = when(lambda: dying.running and good.drawn, dying.end)
        assert command.main([*arguments(prompt_file, out, good, dying), "--no-ray", "--retries", "1"]) == 0
        ended.result(LIMIT)
        assert tree(out) == whole
        assert sorted(good.drawn) == sorted(set(good.drawn)) and len(good.drawn) == 6

    def test_without_servers_it_stops_with_a_sentence_and_goes_on_later(
        self, whole, prompt_file, start, tmp_path, capsys
    ):
        out, dead, good = tmp_path / "none", start(), start()
        dead.end()
        assert command.main([*arguments(prompt_file, out, dead), "--retries", "0"]) == 2
        assert "No server is left; 6 sets are not drawn" in capsys.readouterr().err
        assert command.main(arguments(prompt_file, out, good)) == 0
        assert tree(out) == whole

    def test_failed_sets_are_named_and_tried_again(self, whole, prompt_file, start, tmp_path, capsys):
        def fails(graph):
            return "out of memory" if "robot" in graph["story"]["inputs"]["identity"] else None

        out, fake = tmp_path / "failing", start(fails=fails)
        line = arguments(prompt_file, out, fake)
        assert command.main(line) == 1
        *_, first, second, last = capsys.readouterr().err.splitlines()
        assert "003-technoledge-robot" in first and "out of memory" in second
        assert last == "2 sets failed; run the same command to retry them."
        fake.fails = lambda graph: None
        assert command.main(line) == 0
        assert tree(out) == whole

    def test_other_settings_in_the_same_folder_are_refused(self, whole, prompt_file, start, tmp_path, capsys):
        line = arguments(prompt_file, tmp_path / "whole", start())
        assert command.main([*line, "--steps", "20"]) == 2
        assert "steps 50 there, 20 now" in capsys.readouterr().err

    def test_a_seed_for_all_stories_of_the_demo_is_another_setting_than_their_own(self):
        own, given = (plan_of(parse(["--prompts", "demo", *more])) for more in ((), ("--seed", "42")))
        assert own.run_settings != given.run_settings
        assert [plan.texts(Method(), plan.sets[1])["seed"] for plan in (own, given)] == [5001, 42]

    def test_the_list_says_what_is_there_and_starts_nothing(self, whole, prompt_file, start, tmp_path, capsys):
        line = [*arguments(prompt_file, tmp_path / "whole"), "--method", "csa", "--only", "animals", "--list"]
        assert command.main(line) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[2].split() == ["001-animals-red-fox", "3", "drawn", "drawn", "to", "draw"]
        assert lines[-1].startswith("2 sets, 5 frames; 2 to draw.")

    def test_several_servers_without_ray_say_what_to_install(self, prompt_file, start, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        assert command.main(arguments(prompt_file, tmp_path / "out", start(), start())) == 2
        assert "pip install ray" in capsys.readouterr().err


@pytest.fixture(scope="class")
def ray():
    pytest.importorskip("ray", reason="Ray is not installed")
    start_ray(None)
    yield
    stop_ray()


class TestRay:
    def test_a_run_gives_the_same_files_when_a_server_dies(self, ray, whole, prompt_file, start, tmp_path, monkeypatch):
        addresses = []
        monkeypatch.setattr(servers, "start_ray", addresses.append)
        monkeypatch.setattr(servers, "stop_ray", lambda: None)
        out, good, dying = tmp_path / "ray", start(), start(limit=0)
        ended = when(lambda: dying.running and good.drawn, dying.end)
        assert command.main([*arguments(prompt_file, out, good, dying), "--retries", "1"]) == 0
        ended.result(LIMIT)
        assert addresses == [None]
        assert tree(out) == whole
        assert len(good.drawn) == len(set(good.drawn)) == 6

    def test_work_is_done_in_another_process_which_comes_back_when_it_ends(self, ray):
        worker = RayWorker(importlib.import_module, "os", here=True)
        first = worker.call("getpid").result(LIMIT)
        assert first != os.getpid()
        error = worker.call("_exit", 1).exception(LIMIT)
        assert worker.lost(error) and not worker.lost(ValueError())
        wait_until(lambda: worker.call("getpid").exception(LIMIT) is None)
        assert worker.call("getpid").result(LIMIT) != first
        worker.close()


# ---- tables ----------------------------------------------------------------------------------------------------------

CLIP_LABELS = {"clip_i": "CLIP-I", "clip_t": "CLIP-T"}


def measured(clip_i, clip_t=None):
    means = {"clip_i": clip_i} | ({} if clip_t is None else {"clip_t_clip_score_file_name": clip_t})
    encoders = {"clip_i": "B/16"} | ({} if clip_t is None else {"clip_t": "B/32"})
    consistency = {"means": means, "encoders": encoders, "labels": {kind: CLIP_LABELS[kind] for kind in encoders}}
    return MeasuredSet({"seed": 42}, {"consistency": consistency})


class TestTables:
    def test_set_means_beside_the_published_ones(self):
        text = report({"vanilla": [measured(0.8, 0.9), measured(0.9, 0.7)]}, Settings(), "sets.yaml")
        (row,) = [line for line in text.splitlines() if line.startswith("| vanilla")]
        assert "0.8500 [0.8000, 0.9000]" in row and "0.8000 [0.7000, 0.9000]" in row
        (theirs,) = [line for line in text.splitlines() if line.startswith("| 1Prompt1Story")]
        assert "0.8942" in theirs and "0.9117" in theirs and "published" in theirs
        assert "0.1993" not in text, "DreamSim was not measured, so there is nothing to compare it with"
        assert "with their background" in text
        assert "1024 x 1024, 50 steps of euler" in text

    def test_nothing_that_was_not_measured_is_a_number(self):
        assert cell([measured(None)], "clip_i") == "not measured"
        assert cell([measured(float("nan")), measured(0.5)], "clip_i") == "0.5000 [0.5000, 0.5000] (1 sets)"
        assert "Nothing is measured." in report({"svr": [MeasuredSet({"seed": 42}, None)]}, Settings(), "x")

    def test_the_demo_s_measures_are_not_set_beside_those_of_clip(self):
        one = measured(0.5)
        one.metrics["consistency"]["labels"]["clip_i"] = "Same figures"
        text = report({"svr": [one]}, DEMO_SETTINGS, "demo")
        assert "the two tables cannot be compared" in text
        assert [line.split("|")[4].strip() for line in text.splitlines() if line.startswith("| method")][
            0
        ] == "Same figures"


class TestMeasuring:
    """With the demo's reader, on pictures of the demo's world."""

    @pytest.fixture
    def drawn(self, tmp_path):
        """A folder with two stories whose pictures match their text, and its plan."""
        from storyloom.world.draw import draw
        from storyloom.world.stereotypes import imagine
        from storyloom.world.stories import random_story

        random = np.random.default_rng(0)
        options = parse(["--prompts", "demo", "--limit", "2", "--method", "svr", "--out", str(tmp_path)])
        plan, store = plan_of(options), Store(tmp_path)
        with store.locked(plan.run_settings):
            for number, one in enumerate(plan.sets):
                story = random_story(20_000 + number)
                scenes = [imagine(story.frames, i, story.identities_in(i), random, stereotypes=False) for i in range(4)]
                files = []
                for scene in scenes:
                    written = io.BytesIO()
                    Image.fromarray(draw(scene, random).astype(np.uint8)).save(written, "PNG")
                    files.append(written.getvalue())
                store.save_set(f"svr/{one.name}", set_files(files, plan.texts(plan.methods[0], one)))
        return store, plan, options

    def test_pictures_without_measures_are_measured_later_once(self, drawn):
        store, plan, options = drawn
        with store.locked(plan.run_settings):
            failed, reasons = run(plan, store, options)
            first = [store.folder / key / "metrics.json" for key in plan.keys(plan.methods[0])]
            written = [file.stat().st_mtime_ns for file in first]
            run(plan, store, options)
            assert [file.stat().st_mtime_ns for file in first] == written
            options.metrics_only = True
            run(plan, store, options)
            assert [file.stat().st_mtime_ns for file in first] != written
        assert not failed and not reasons
        text = results(plan, store)
        lines = [" ".join(line.split()) for line in text.splitlines()]
        assert any(line.startswith("| SVR | same | 100 % [100, 100] |") for line in lines)

    def test_clip_measures_pairs_and_prompts(self, drawn, monkeypatch):
        import torch

        from storyloom.measures import clip as similarity

        class Clip:
            """Features: mean colours of pictures, lengths of texts."""

            def __init__(self, architecture, weights, **how):
                self.name = f"{architecture} ({weights})"

            def images(self, pictures):
                return pictures.mean((1, 2))

            def texts(self, texts):
                assert all(text.startswith("A photo depicts a ") or text.startswith("a ") for text in texts)
                return torch.tensor([[1.0, len(text), 0.0] for text in texts])

        monkeypatch.setattr(similarity, "load_open_clip", Clip)
        store, plan, options = drawn
        measuring = MeasureQueue(store, ThreadWorker(Measurer, measure_options(options, demo=False)))
        with store.locked(plan.run_settings):
            measuring.add(plan.keys(plan.methods[0]))
            assert finish(measuring) == [] and not measuring.faults
        metrics = store.read(plan.keys(plan.methods[0])[0], "metrics.json")
        assert metrics["encoders"] == {"clip_i": "ViT-B-16-quickgelu (openai)", "clip_t": "ViT-B-32-quickgelu (openai)"}
        lines = results(plan, store).splitlines()
        head = next(line for line in lines if line.startswith("| method"))
        assert [cell.strip() for cell in head.split("|")[4:6]] == ["CLIP-T", "CLIP-I"]
        ours = next(line for line in lines if line.startswith("| svr"))
        means = [store.read(key, "metrics.json")["consistency"]["means"] for key in plan.keys(plan.methods[0])]
        names = ("clip_t_clip_score_file_name", "clip_i")
        for name, cell_ in zip(names, ours.split("|")[4:6], strict=True):
            assert cell_.split()[0] == f"{np.mean([each[name] for each in means]):.4f}"

    def test_missing_weights_lose_no_pictures_and_are_reported(self, drawn, tmp_path):
        store, plan, options = drawn
        line = ["--prompts", "demo", "--limit", "2", "--method", "svr", "--out", str(tmp_path)]
        options = parse([*line, "--clip-i", str(tmp_path / "none"), "--clip-t", str(tmp_path / "none")])
        pytest.importorskip("open_clip")
        worker = ThreadWorker(Measurer, measure_options(options, demo=False))
        measuring = MeasureQueue(store, worker)
        measuring.add(plan.keys(plan.methods[0]))
        reasons = finish(measuring)
        assert [reason.partition(":")[0] for reason in reasons] == ["CLIP-I is not measured", "CLIP-T is not measured"]
        assert store.read(plan.keys(plan.methods[0])[0], "metrics.json") is None

    def test_pictures_that_cannot_be_measured_are_named(self, drawn):
        store, plan, options = drawn
        key = plan.keys(plan.methods[0])[1]
        (store.folder / key / "frame-01.png").write_bytes(picture())
        with store.locked(plan.run_settings):
            failed, reasons = run(plan, store, options)
        assert not reasons and list(failed) == [key] and failed[key].startswith("not measured: ")
        assert store.read(plan.keys(plan.methods[0])[0], "metrics.json")
