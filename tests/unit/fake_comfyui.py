"""A ComfyUI server as far as a client sees it: queue, history and pictures, without a model."""

import io
import json
import math
import threading
import time
import uuid
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from PIL import Image

CHECKPOINT = "tiny.safetensors"


class FakeComfyUI:
    """A server on a free port. limit: how many workflows it ends, the next one runs until this is raised; missing: a
    node that it does not have.

    drawn: tags of the workflows that it has finished, in their order. `fails` maps a workflow to a message or None,
    `refuses` likewise before it is queued. `end` breaks all connections, as when the process is killed.
    """

    def __init__(self, limit=math.inf, missing=(), fails=lambda graph: None, refuses=lambda graph: None):
        self.limit, self.missing, self.fails, self.refuses = limit, missing, fails, refuses
        self.lock = threading.RLock()
        self.queue, self.history, self.running, self.interrupted = [], {}, None, set()
        self.ended = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                fake.answer(self, None)

            def do_POST(self):
                fake.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.name = f"127.0.0.1:{self.server.server_port}"
        for work in (lambda: self.server.serve_forever(0.02), self.work):
            threading.Thread(target=work, daemon=True).start()

    def end(self):
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def drawn(self):
        return [entry["prompt"][3]["storyloom"]["job"] for entry in self.history.values() if entry["outputs"]]

    def work(self):
        while not self.ended.is_set():
            with self.lock:
                item = self.running = self.queue.pop(0) if self.queue else None
            if item is None:
                time.sleep(0.005)
                continue
            _, prompt_id, graph, *_ = item
            while len(self.history) >= self.limit:
                if prompt_id in self.interrupted or self.ended.is_set():
                    break
                time.sleep(0.005)
            with self.lock:
                self.history[prompt_id] = self.entry(item, graph)
                self.running = None

    def entry(self, item, graph):
        prompt_id, fault = item[1], self.fails(graph)
        if prompt_id in self.interrupted:
            message = ["execution_interrupted", {"node_id": "sampler", "node_type": "KSampler"}]
        elif fault:
            message = ["execution_error", {"node_id": "sampler", "node_type": "KSampler", "exception_message": fault}]
        else:
            frames = graph["story"]["inputs"]["frames"].count("\n") + 1
            drawing = sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()
            images = [{"filename": f"{drawing}-{i}", "subfolder": "", "type": "temp"} for i in range(frames)]
            status = {"status_str": "success", "messages": []}
            return {"prompt": item, "outputs": {"frames": {"images": images}}, "status": status}
        return {"prompt": item, "outputs": {}, "status": {"status_str": "error", "messages": [message]}}

    def answer(self, request, body):
        if self.ended.is_set():
            request.connection.close()
            return
        url = urlsplit(request.path)
        status, content = 200, {}
        with self.lock:
            if url.path == "/prompt":
                fault = self.refuses(body["prompt"])
                if fault:
                    status, content = 400, {"error": {"message": fault, "details": ""}, "node_errors": {}}
                else:
                    content = {"prompt_id": str(uuid.uuid4())}
                    self.queue.append([0, content["prompt_id"], body["prompt"], body["extra_data"], []])
            elif url.path == "/queue" and body:
                self.queue = [item for item in self.queue if item[1] not in body["delete"]]
            elif url.path == "/queue":
                content = {"queue_running": [self.running] if self.running else [], "queue_pending": self.queue}
            elif url.path == "/interrupt":
                if self.running and self.running[1] == body["prompt_id"]:
                    self.interrupted.add(body["prompt_id"])
            elif url.path.startswith("/history"):
                wanted = url.path.removeprefix("/history").strip("/")
                content = {key: entry for key, entry in self.history.items() if wanted in ("", key)}
            elif url.path == "/object_info/CheckpointLoaderSimple":
                content = {"CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": [[CHECKPOINT]]}}}}
            elif url.path.startswith("/object_info/"):
                kind = url.path.rpartition("/")[2]
                content = {} if kind in self.missing else {kind: {}}
            elif url.path == "/view":
                content = self.picture(parse_qs(url.query)["filename"][0])
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def picture(self, name):
        colour = sha256(name.encode()).digest()[:3]
        written = io.BytesIO()
        Image.new("RGB", (8, 8), tuple(colour)).save(written, "PNG")
        return written.getvalue()
