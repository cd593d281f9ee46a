"""POST /storyloom/script: what the editor of a story script asks the server, through aiohttp as ComfyUI runs it."""

import asyncio
import gzip
import json
from types import SimpleNamespace

import pytest
from hypothesis import strategies as some
from story_graphs import SVR
from test_fuzz import FLOATS, TEXT, clear, fuzz, tried  # noqa: F401, tried is a fixture
from waiting import LIMIT

from storyloom.prompts.script import StoryScriptError, parse_story

JSON = {"Content-Type": "application/json"}
BOXES = ("identity", "frames", "style")


@pytest.fixture(scope="module")
def routes(host):
    """The module, with time limits that no busy machine reaches; tests of the limits set their own."""
    routes = host.pack("nodes.routes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "SECONDS", LIMIT)
        patch.setattr(routes, "ARRIVAL", LIMIT)
        yield routes


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
def run(registered):
    """Await what a function makes of a client of a server with the route."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    loop = asyncio.new_event_loop()
    app = web.Application(client_max_size=1 << 30)
    app.add_routes(registered)
    client = TestClient(TestServer(app, loop=loop), loop=loop)
    loop.run_until_complete(client.start_server())
    yield lambda function: loop.run_until_complete(function(client))
    loop.run_until_complete(client.close())
    loop.close()


@pytest.fixture
def post(run):
    """Send bodies at once; returns (status, answer) of each."""

    def post(*bodies, headers=JSON):
        async def one(client, body):
            body = body if isinstance(body, (str, bytes)) or hasattr(body, "__aiter__") else json.dumps(body)
            async with client.post("/storyloom/script", data=body, headers=headers) as response:
                return response.status, await response.json()

        async def send(client):
            return await asyncio.gather(*(one(client, body) for body in bodies))

        return run(send)

    return post


def script(identity="a red fox", frames="asleep in the snow", style=""):
    return {"identity": identity, "frames": frames, "style": style}


def test_the_pack_adds_its_route_once(registered):
    assert [(route.method, route.path) for route in registered] == [("POST", "/storyloom/script")]


def test_a_story_has_the_tokens_that_the_encode_node_reports(host, graph, models, post):
    texts = script(
        "[Fox] a red fox, smiling\n[Owl] an owl", "[Fox] naïve café 🦊\n[Owl] and [Fox] talk\n[Fox] (asleep:1.2)"
    )
    ((status, answer),) = post(texts)
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


def test_faults_come_with_their_lines(post):
    ((status, answer),) = post(script(frames="asleep\n[Wolf] runs\n# x\nembedding:\nawake", style="nothing"))
    assert status == 200
    assert [bool(line["fault"]) for line in answer["lines"]] == [False, True, True, False, False]
    assert "without a name" in answer["lines"][3]["warning"]
    assert [(fault["box"], fault["line"]) for fault in answer["faults"]] == [("style", None)]


def test_what_is_no_script_is_refused_in_a_sentence(post, routes):
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
    for status, answer in post(*bodies[:4]) + post(*bodies[4:]):
        assert status == 400 and answer["error"].startswith("The body")
    assert post("identity=x", headers={"Content-Type": "text/plain"})[0][0] == 415
    status, answer = post(script(frames="a" * (routes.BODY + 1)))[0]
    assert status == 413 and "longer than 100 kB" in answer["error"]
    assert post({})[0] == (200, {"room": 75, "lines": [], "totals": [], "faults": []}), "nothing is known yet"


def test_many_requests_at_once_are_answered_or_put_off(post, routes):
    answers = post(*[script(frames=f"frame {number}") for number in range(40)])
    assert {status for status, _ in answers} <= {200, 503}
    assert sum(status == 200 for status, _ in answers) >= routes.WAITING
    assert all(answer["lines"][0]["caption"].startswith("frame") for status, answer in answers if status == 200)
    assert post(script())[0][0] == 200 and routes.measurer().waiting == 0


def test_only_computing_counts_as_time(post, routes, monkeypatch):
    """A thread that waits for a processor, or sleeps, does not use up its time."""
    monkeypatch.setattr(routes, "time", SimpleNamespace(thread_time=lambda: 0.0))
    monkeypatch.setattr(routes, "SECONDS", 0)
    assert post(script())[0][0] == 200


def test_a_script_that_takes_too_long_is_put_off(post, routes, monkeypatch):
    monkeypatch.setattr(routes, "SECONDS", -1)
    status, answer = post(script())[0]
    assert status == 503 and "It can still be run" in answer["error"]
    monkeypatch.undo()
    assert routes.measurer().waiting == 0


# ---- whatever is sent ------------------------------------------------------------------------------------------------

NUMBERS = some.integers() | FLOATS | some.integers(0, 20_000).map(lambda digits: 10**digits)
VALUES = some.recursive(
    some.none() | some.booleans() | NUMBERS | TEXT,
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.sampled_from(BOXES) | TEXT, inner, max_size=4),
    max_leaves=12,
)
SCRIPTS = some.fixed_dictionaries({}, optional=dict.fromkeys(BOXES, TEXT | some.none() | VALUES))
DEPTHS = some.integers(1, 40_000)
BODIES = some.one_of(
    some.binary(max_size=300),
    SCRIPTS,
    VALUES,
    some.tuples(some.sampled_from(["[", "{", '{"frames":', "[[],"]), DEPTHS).map(lambda deep: deep[0] * deep[1]),
    DEPTHS.map(lambda depth: "[" * depth + "]" * depth),
    DEPTHS.map(lambda depth: {"identity": "a", "frames": "(" * depth + "a" + ")" * depth, "style": ""}),
    some.sampled_from(
        ["[", "]", "(", ")", "\\", "漢", "\0", "[A]", "a\n", "a b ", "embedding:", "(a:1)", "\ufeff"]
    ).flatmap(lambda piece: some.sampled_from(BOXES).map(lambda box: {box: piece * (9000 // len(piece))})),
)
TYPES = some.sampled_from(["application/json", "application/json; charset=x", "APPLICATION/JSON"]) | some.text(
    some.characters(min_codepoint=32, max_codepoint=126), max_size=40
)


def as_sent(body, encoding="utf-8"):
    """A body's bytes; half characters and numbers without end go as they are, as no browser sends them."""
    if isinstance(body, bytes):
        return body
    try:
        text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    except ValueError:  # Python writes no number of so many digits
        text = "[" + "9" * 20_000 + "]"
    return text.encode(encoding, "surrogatepass")


def answered(status, answer):
    """Assert that an answer is a measured script, or one sentence that says why not; returns whether it is measured."""
    if status == 200:
        assert answer.keys() == {"room", "lines", "totals", "faults"}
        return True
    assert status in (400, 413, 415) and answer.keys() == {"error"}, (status, answer)
    clear(answer["error"])
    assert answer["error"].endswith(".")
    return False


@fuzz(300, body=BODIES, encoding=some.sampled_from(["utf-8", "utf-8", "utf-16", "utf-32-be"]), kind=TYPES)
def test_whatever_is_sent_is_measured_or_refused_in_a_sentence(post, body, encoding, kind):
    sent = as_sent(body, encoding)
    ((status, answer),) = post(sent, headers={"Content-Type": kind})
    measured = answered(status, answer)
    if kind.lower().startswith("application/json") and isinstance(body, dict) and encoding == "utf-8":
        texts = [body.get(box) for box in BOXES]
        if all(text is None or isinstance(text, str) for text in texts) and len(sent) < 100_000:
            assert measured or b"9" * 20_000 in sent


@fuzz(150, identity=TEXT, frames=TEXT, style=TEXT)
def test_a_script_has_faults_where_the_node_refuses_it(post, identity, frames, style):
    ((status, answer),) = post(as_sent(script(identity, frames, style)))
    assert answered(status, answer)
    faults = answer["faults"] + [line for line in answer["lines"] if line["fault"]]
    try:
        parse_story(identity, frames, style)
    except StoryScriptError:
        assert faults
    else:
        assert not faults


@fuzz(40, sizes=some.lists(some.integers(0, 40_000), max_size=8), letter=some.sampled_from(["a", " ", "(", "\\n"]))
def test_a_body_without_a_length_is_read_up_to_the_bound(post, routes, sizes, letter):
    sent = 0

    async def pieces():
        nonlocal sent
        yield b'{"frames": "'
        for size in sizes:
            sent += size
            yield letter.encode() * size
        yield b'"}'

    ((status, answer),) = post(pieces())
    measured = answered(status, answer)
    assert measured == (sent * len(letter) + 14 <= routes.BODY)


def test_a_body_that_comes_too_slowly_is_not_waited_for(run, post, routes, monkeypatch):
    monkeypatch.setattr(routes, "ARRIVAL", 0.1)

    async def crawl(client):
        async def pieces():
            yield b'{"frames": '
            await asyncio.Event().wait()

        async with client.post("/storyloom/script", data=pieces(), headers=JSON) as response:
            return response.status, await response.json()

    status, answer = run(crawl)
    assert status == 408 and "was not received within" in answer["error"]
    monkeypatch.undo()
    assert post(script())[0][0] == 200


def test_a_compressed_body_is_refused(post):
    bomb = gzip.compress(b" " * (64 << 20))
    ((status, answer),) = post(bomb, headers=JSON | {"Content-Encoding": "gzip"})
    assert status == 415 and "compressed" in answer["error"]
    assert post(b"no gzip", headers=JSON | {"Content-Encoding": "gzip"})[0][0] == 415


@pytest.mark.parametrize(
    "head, body, ends, status",
    [("Content-Length: 50", b"{", True, []), ("Transfer-Encoding: chunked", b"zz\r\n", False, [b"408"])],
    ids=["half a body", "no chunk, of which aiohttp says nothing"],
)
def test_a_body_that_breaks_off_is_no_fault_of_the_server(
    run, post, routes, monkeypatch, caplog, head, body, ends, status
):
    reads, body_of = asyncio.Event(), routes.body_of

    async def read(request):
        reads.set()
        return await body_of(request)

    async def broken(client):
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(f"POST /storyloom/script HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
        writer.write(b"Content-Type: application/json\r\n\r\n")
        await writer.drain()
        await reads.wait()
        writer.write(body)
        if ends:
            writer.write_eof()
        status_line = await reader.readline()
        writer.close()
        return status_line

    monkeypatch.setattr(routes, "body_of", read)
    monkeypatch.setattr(routes, "ARRIVAL", LIMIT if ends else 0.3)
    assert run(broken).split(b" ")[1:2] == status
    monkeypatch.undo()
    assert post(script())[0][0] == 200
    assert "routes.py" not in caplog.text


def test_a_body_that_aiohttp_cannot_read_is_refused(routes):
    """What its reader in Python says of a broken chunk, and the one in C does not."""
    from aiohttp import web

    async def unread(size):
        raise web.RequestPayloadError("no chunk")
        yield

    request = SimpleNamespace(content_type="application/json", headers={}, content=SimpleNamespace(iter_chunked=unread))
    with pytest.raises(routes.RequestError, match="The body is incomplete") as refused:
        asyncio.run(routes.texts_of(request))
    assert refused.value.status == 400


def test_what_all_frames_repeat_is_bounded(post, routes, monkeypatch):
    """A style of 50 kB around 5,000 frames would otherwise be tokens of gigabytes."""
    monkeypatch.setattr(routes, "CHARACTERS", 200_000)
    texts = script(frames="\n".join(f"[NC] a{number}" for number in range(60)), style="x " * 3000 + "{prompt}")
    assert post(texts | {"frames": "[NC] a"})[0][0] == 200
    ((status, answer),) = post(texts)
    assert status == 413 and "With identity and style in every frame" in answer["error"]


@pytest.mark.parametrize("depth, warned", [(100, False), (101, True), (20_000, True)])
def test_parentheses_in_each_other_are_measured_or_told_at_their_line(post, depth, warned):
    ((status, answer),) = post(script(frames="asleep\n" + "(" * depth + "awake" + ")" * depth))
    assert status == 200 and not answer["faults"]
    assert ["more than 100 deep" in line["warning"] for line in answer["lines"]] == [False, warned]
