"""As much of W&B's server as online runs need, on this machine, with faults: calls that fail or stall, or no server."""

import gzip
import json
import random
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


class Loopback:
    """What the server was given, by run; rows lie at the offset that came with them, as on the real one.

    failing: share of the calls that get error 500, half of them after the server has kept what they brought.
    """

    def __init__(self, port: int = 0, failing: float = 0.0):
        self.files: dict[str, dict[str, dict[int, str]]] = {}
        self.run_ids: set[str] = set()
        self.calls: list[str] = []
        self.overwritten_differently = 0
        self.failing, self.stalled, self.refuses_key = failing, threading.Event(), False
        self.finished: list[int] = []
        self._chance = random.Random(7)
        self._server = Server(("127.0.0.1", port), type("Handler", (Handler,), {"owner": self}))
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Loopback":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """The history of a run; no line may be missing."""
        lines = self.files.get(run_id, {}).get(HISTORY, {})
        assert sorted(lines) == list(range(len(lines)))
        return [json.loads(lines[offset]) for offset in sorted(lines)]

    def wait_for_rows(self, run_id: str, count: int, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while len(self.files.get(run_id, {}).get(HISTORY, {})) < count:
            assert time.monotonic() < until, f"{len(self.files.get(run_id, {}).get(HISTORY, {}))} of {count} rows"
            time.sleep(0.05)

    def fails(self) -> bool:
        return self._chance.random() < self.failing

    def loses(self) -> bool:
        return self._chance.random() < 0.5

    def keep(self, run_id: str, posted: dict[str, Any]) -> None:
        for name, chunk in (posted.get("files") or {}).items():
            kept = self.files.setdefault(run_id, {}).setdefault(name, {})
            for offset, line in enumerate(chunk["content"], chunk["offset"]):
                if name == HISTORY and offset in kept:
                    self.overwritten_differently += json.loads(kept[offset])["_step"] != json.loads(line)["_step"]
                kept[offset] = line
        if posted.get("complete"):
            self.finished.append(posted["exitcode"])

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "mmtrain", "entity": {"id": "e", "name": "nobody"}}
        run_id = variables.get("name")
        if operation == "UpsertBucket":
            self.run_ids.add(run_id)
            bucket = {"id": "b", "name": run_id, "displayName": run_id, "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
        if operation == "RunResumeStatus" and run_id in self.run_ids:
            files = self.files.get(run_id, {})
            history, summary = files.get(HISTORY, {}), files.get(SUMMARY, {})
            bucket = {"id": "b", "name": run_id, "displayName": run_id, "config": "{}", "tags": [], "notes": None}
            bucket |= {"historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"}
            bucket |= {"historyTail": json.dumps([history[max(history)]] if history else []), "wandbConfig": '{"t": 1}'}
            bucket |= {"summaryMetrics": summary[max(summary)] if summary else "{}"}
            return {"model": project | {"bucket": bucket}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is none."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Loopback

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        owner, body = self.owner, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        while owner.stalled.is_set():
            time.sleep(0.05)
        if owner.refuses_key:
            return self.reply(401, {"errors": [{"message": "invalid api key"}]})
        fails = owner.fails()
        if fails and owner.loses():
            return self.reply(500, {})
        answer: dict[str, Any] = {}
        if self.path.endswith("/file_stream"):
            owner.keep(self.path.split("/")[-2], json.loads(body))
            answer = {"exitcode": None, "limits": {}}
        elif self.path == "/graphql":
            posted = json.loads(body)
            operation = posted["query"].partition("(")[0].partition("{")[0].split()[-1]
            owner.calls.append(operation)
            answer = {"data": owner.answer(operation, posted.get("variables") or {})}
        self.reply(500 if fails else 200, answer)

    do_PUT = do_GET = do_POST

    def reply(self, code: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        with suppress(OSError):
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
