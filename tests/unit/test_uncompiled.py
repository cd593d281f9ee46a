"""What stays out of torch.compile: also when the compiler comes later than the function, and at any depth of calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import storyloom
from storyloom.runtime.uncompiled import uncompiled

FIRST_CALL_INSIDE = """
import sys
import torch
from storyloom.runtime.uncompiled import uncompiled

seen = []

def deeper(x, gain):
    return x * gain + x.sum()

@uncompiled
def ours(x, options):
    seen.append((torch.compiler.is_compiling(), options["gain"]))
    return deeper(x, options["gain"])

def block(x, options):
    return ours(x * 2, options) + 1

class Eager:
    graphs = []
    def __call__(self, graph, inputs):
        self.graphs.append([node.name for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

assert "torch._dynamo" not in sys.modules
before = block(torch.ones(2), {"gain": 3.0})
assert "torch._dynamo" not in sys.modules
eager = Eager()
dropped = {"guard_filter_fn": lambda guards: ["options" not in guard.name for guard in guards]}
compiled = torch.compile(block, backend=eager, options=dropped)
for gain in (3.0, 5.0, 3.0, 7.0):
    assert torch.equal(compiled(torch.ones(2), {"gain": gain}), torch.full((2,), 2 * gain + 4 + 1))
assert seen == [(False, gain) for gain in (3.0, 3.0, 5.0, 3.0, 7.0)], seen
print(eager.graphs)
"""


def test_what_is_declared_before_the_compiler_comes_is_never_in_a_graph():
    """Also where its first call is made by a compiled function, and the host drops the guards on what it looks at."""
    environment = {**os.environ, "PYTHONPATH": str(Path(storyloom.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", FIRST_CALL_INSIDE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[['mul'], ['add']]"


def test_the_function_keeps_its_name_its_arguments_and_its_errors():
    @uncompiled
    def scaled(x, *, by):
        """Words."""
        return x * by

    assert (scaled.__name__, scaled.__doc__) == ("scaled", "Words.")
    assert scaled(torch.ones(1), by=3).item() == 3
    with pytest.raises(TypeError, match="NoneType"):
        scaled(torch.ones(1), by=None)
