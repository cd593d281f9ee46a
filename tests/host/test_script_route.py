"""POST /storyloom/script: what the editor of a story script asks the server, through aiohttp as ComfyUI runs it."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from story_graphs import SVR

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def routes(host):
    return host.pack("nodes.routes")


@pytest.fixture
def registered(routes, monkeypatch):
    """ComfyUI's table of routes after the pack was loaded twice."""
    from aiohttp import web

    table = web.RouteTableDef()
    monkeypatch.setitem(routes.sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=None)))
    routes.register()
    routes.sys.modules["server"].PromptServer.instance = SimpleNamespace(routes=table)
    routes.register()
    routes.register()
    return table


@pytest.fixture
def ask(registered):
    """Send bodies at once; returns (status, answer) of each."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    async def send(bodies, headers):
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(registered)
        async with TestClient(TestServer(app)) as client:

            async def one(body):
                async with client.post("/storyloom/script", data=body, headers=headers) as response:
                    return response.status, await response.json()

            return await asyncio.gather(*map(one, bodies))

    def ask(*bodies, headers=JSON):
        texts = [body if isinstance(body, (str, bytes)) else json.dumps(body) for body in bodies]
        return asyncio.run(send(texts, headers))

    return ask


def script(identity="a red fox", frames="asleep in the snow", style=""):
    return {"identity": identity, "frames": frames, "style": style}


def test_the_pack_adds_its_route_once(registered):
    assert [(route.method, route.path) for route in registered] == [("POST", "/storyloom/script")]


def test_a_story_has_the_tokens_that_the_encode_node_reports(host, graph, models, ask):
    texts = script(
        "[Fox] a red fox, smiling\n[Owl] an owl", "[Fox] naïve café 🦊\n[Owl] and [Fox] talk\n[Fox] (asleep:1.2)"
    )
    ((status, answer),) = ask(texts)
    story = graph.add("StoryLoom_Script", **texts)
    words = graph.add("StoryLoom_EncodeOnePrompt", clip=graph.add("TestTiny")(1), story=story(), **SVR)
    graph.capture(report=words(1), cond=words(0))
    report = host.run(graph).report
    assert status == 200 and answer["room"] == 75 and not answer["faults"]
    for line in answer["lines"]:
        assert f"Frame {line['number']}: {line['own']} token" in report and not line["warning"]
    by_cast = {tuple(total["characters"]): total["tokens"] for total in answer["totals"]}
    assert f"window: frames 1, 3; {by_cast[('Fox',)]} of 75 tokens" in report
    assert f"window: frame 2; {by_cast[('Owl', 'Fox')]} of 75 tokens" in report


def test_faults_come_with_their_lines(ask):
    ((status, answer),) = ask(script(frames="asleep\n[Wolf] runs\n# x\nembedding:\nawake", style="nothing"))
    assert status == 200
    assert [bool(line["fault"]) for line in answer["lines"]] == [False, True, True, False, False]
    assert "without a name" in answer["lines"][3]["warning"]
    assert [(fault["box"], fault["line"]) for fault in answer["faults"]] == [("style", None)]


def test_what_is_no_script_is_refused_in_a_sentence(ask, routes):
    bodies = [
        "",
        "{",
        "[]",
        "7",
        json.dumps(script(frames=3)),
        json.dumps(script(style=["x"])),
        "[" * 90_000,
        b"\xff{}",
    ]
    for status, answer in ask(*bodies[:4]) + ask(*bodies[4:]):
        assert status == 400 and answer["error"].startswith("The body")
    assert ask("identity=x", headers={"Content-Type": "text/plain"})[0][0] == 415
    status, answer = ask(script(frames="a" * (routes.BODY + 1)))[0]
    assert status == 413 and "longer than 100 kB" in answer["error"]
    assert ask({})[0] == (200, {"room": 75, "lines": [], "totals": [], "faults": []}), "nothing is known yet"


def test_many_requests_at_once_are_answered_or_put_off(ask, routes):
    answers = ask(*[script(frames=f"frame {number}") for number in range(40)])
    assert {status for status, _ in answers} <= {200, 503}
    assert sum(status == 200 for status, _ in answers) >= routes.WAITING
    assert all(answer["lines"][0]["caption"].startswith("frame") for status, answer in answers if status == 200)
    assert ask(script())[0][0] == 200 and routes.desk().waiting == 0


def test_a_script_that_takes_too_long_is_put_off(ask, routes, monkeypatch):
    monkeypatch.setattr(routes, "SECONDS", -1)
    status, answer = ask(script())[0]
    assert status == 503 and "It still runs" in answer["error"]
    monkeypatch.undo()
    assert routes.desk().waiting == 0
