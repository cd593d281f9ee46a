"""A real ComfyUI in this process, with the pack loaded as ComfyUI loads it, and graphs run by its own executor."""

import asyncio
import gc
import importlib
import inspect
import os
import sys
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from precision import kept_double
from story_makers import maker_of, weights_of
from tiny_models import SDXL, tiny_clip, tiny_model

PACK = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)
"""Of ComfyUI in this process and of its servers, for sums depend on it in the last digits: the tiny models gain nothing
from more, and `make test SETTING=two-threads` asks for two."""
ON_A_CARD = os.environ.get("STORYLOOM_DEVICE") == "cuda"
"""ComfyUI may use the graphics card, which `pytest -m gpu` is for; everything else is compared on the CPU."""
EXTRAS = [
    "nodes_pag",
    "nodes_sag",
    "nodes_perpneg",
    "nodes_custom_sampler",
    "nodes_context_windows",
    "nodes_hooks",
    "nodes_hypertile",
    "nodes_tomesd",
    "nodes_torch_compile",
    "nodes_model_advanced",
    "nodes_freelunch",
    "nodes_rebatch",
]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.host)
            if not COMFYUI:
                item.add_marker(pytest.mark.skip(reason="no ComfyUI: set COMFYUI_PATH or run make test"))


class Graph(dict):
    """An API-format prompt that is written node by node."""

    def add(self, class_type, **inputs):
        """Add a node and return a function that links to its outputs."""
        number = str(len(self) + 1)
        self[number] = {"class_type": class_type, "inputs": inputs}
        return lambda output=0: [number, output]

    def capture(self, **links):
        """Keep what arrives at these links under these names."""
        for name, link in links.items():
            self.add("TestCapture", value=link, name=name)


class AnyNode:
    """A node that takes any value and a name, and never comes from the cache."""

    RETURN_TYPES = ("*",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",), "name": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    @classmethod
    def IS_CHANGED(cls, **kwargs):
        return float("nan")


class Capture(AnyNode):
    """Keeps what arrives."""

    OUTPUT_NODE = True
    captured = {}

    def work(self, value, name):
        self.captured[name] = value
        return (value,)


class Call(AnyNode):
    """Calls a function that a test hands over, in the middle of a graph: value -> function(value)."""

    functions = {}

    def work(self, value, name):
        return (self.functions[name](value),)


class Server:
    """The members of PromptServer that the executor touches."""

    client_id = None
    last_node_id = None
    sockets_metadata = {}

    def __init__(self):
        self.messages = []

    def send_sync(self, event, data, sid=None):
        self.messages.append((event, data))

    def queue_updated(self):
        pass


class PromptFailed(Exception):
    """A graph stopped with an exception in one of its nodes. `node` is its class."""

    def __init__(self, node, message):
        super().__init__(message)
        self.node = node


class PromptRefused(Exception):
    """A graph did not pass ComfyUI's validation. `errors` are the errors of each node, by class."""

    def __init__(self, errors):
        super().__init__(str(errors))
        self.errors = errors


class Host:
    """ComfyUI: `run` graphs, reach its modules and the pack's. modules: what was imported once the pack was loaded."""

    def __init__(self, pack_name, execution, base):
        self.pack_name, self.execution, self.base = pack_name, execution, base
        self.modules = frozenset(sys.modules)
        self.executor = self.new_executor()

    def new_executor(self):
        options = {}
        if "cache_args" in inspect.signature(self.execution.PromptExecutor.__init__).parameters:
            options = {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}}
        return self.execution.PromptExecutor(Server(), **options)

    def pack(self, name):
        """A module of the pack as ComfyUI has loaded it."""
        return importlib.import_module(f"{self.pack_name}.{name}")

    def function(self, function):
        """A name by which a TestCall node finds this function."""
        name = f"{function.__name__}-{len(Call.functions)}"
        Call.functions[name] = function
        return name

    def validate(self, graph):
        valid, error, outputs, node_errors = asyncio.run(self.execution.validate_prompt("test", dict(graph), None))
        if not valid:
            raise PromptRefused({e["class_type"]: e["errors"] for e in node_errors.values()} or {"": [error]})
        return outputs

    def run(self, graph, fresh=False):
        """Run a graph and return what it captured. `fresh`: with an executor that has nothing cached."""
        outputs = self.validate(graph)
        executor = self.new_executor() if fresh else self.executor
        Capture.captured = {}
        with kept_double():
            executor.execute(dict(graph), "test", {}, outputs)
        if not executor.success:
            error = next(data for event, data in executor.status_messages if event == "execution_error")
            raise PromptFailed(error["node_type"], error["exception_message"].strip())
        return SimpleNamespace(**Capture.captured)


class Tiny:
    """The tiny SDXL in double precision, in which two ways to compute the same can be compared."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "give"
    dtype = torch.float64
    clip = cache(tiny_clip)
    model = cache(partial(tiny_model, "SDXL", SDXL))

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def give(self):
        return Tiny.model(self.dtype), Tiny.clip()


class Single(Tiny):
    """The same in the precision in which artists have it, and faster."""

    dtype = torch.float32


@pytest.fixture(scope="module", autouse=True)
def light_heap():
    """What earlier files have left is not searched again by every garbage collection of the host."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory):
    """Starts a ComfyUI of its own with the pack, as a process; a context manager."""
    from storyloom.scripts.comfyui import Server, pack_base

    @contextmanager
    def start_server():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", str(THREADS))
            server = Server(Path(COMFYUI), pack_base(tmp_path_factory.mktemp("server"), PACK), sys.executable)
            with server:
                patch.undo()
                yield server

    return start_server


@pytest.fixture(scope="session")
def server(start_server):
    """One that is left running."""
    with start_server() as running:
        yield running


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    (base / "models" / "photomaker").mkdir(parents=True)  # PhotoMaker's loader in 0.19 needs it
    folder = base / "custom_nodes" / "storyloom"
    folder.parent.mkdir()
    folder.symlink_to(PACK)
    (base / "models" / "embeddings").mkdir(parents=True)

    sys.path.insert(0, COMFYUI)
    argv, sys.argv = sys.argv, sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = not ON_A_CARD
    args.base_directory = str(base)
    import execution

    import nodes

    sys.argv = argv
    torch.set_num_threads(THREADS)

    async def load():
        for name in EXTRAS:
            path = os.path.join(COMFYUI, "comfy_extras", f"{name}.py")
            assert await nodes.load_custom_node(path, module_parent="comfy_extras"), f"{name} did not load"
        assert await nodes.load_custom_node(str(folder), module_parent="custom_nodes"), "the pack did not load"

    asyncio.run(load())
    nodes.NODE_CLASS_MAPPINGS |= {"TestCapture": Capture, "TestCall": Call, "TestTiny": Tiny, "TestSingle": Single}
    gc.collect()
    gc.freeze()  # ComfyUI collects after every prompt, and would look at all that was imported every time
    loaded = sys.modules[nodes.NODE_CLASS_MAPPINGS["StoryLoom_Script"].__module__].__name__
    return Host(loaded.removesuffix(".nodes.story"), execution, base)


@pytest.fixture(scope="session")
def new_graph():
    """Makes a graph, where a test runs several."""
    return Graph


@pytest.fixture
def graph(new_graph):
    return new_graph()


@pytest.fixture(scope="session")
def models(host):
    """(MODEL, CLIP) of the tiny SDXL that TestTiny gives."""
    return Tiny().give()


@pytest.fixture(scope="session")
def single(host):
    """(MODEL, CLIP) of the tiny SDXL that TestSingle gives."""
    return Single().give()


@pytest.fixture(scope="session")
def weights(host):
    """StoryMaker's weights for the tiny SDXL, in double precision."""
    return weights_of(host)


@pytest.fixture(scope="session")
def maker(host, weights):
    """What Load StoryMaker adapter gives for these; its network remembers, since its weights never change."""
    return maker_of(host, weights)
