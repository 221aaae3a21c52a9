"""A stand-in for the server of W&B: it speaks what wandb 0.31 says, and fails when it is told to.

It is a model of the server, made from what the client sends and needs; the real one was never asked.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Run:
    """What arrived of one run."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    endings: list[dict[str, Any]] = field(default_factory=list)


class StandIn:
    """The server; *fault* is None, "refused" (key), "errors" (500), "busy" (429) or "silent" (no answer)."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.used: list[str] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.asked: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.fault: str | None = None
        self.rows_before_fault: tuple[int, str] | None = None  # so many arrive, then this fault begins
        self.is_stopped = False
        self.lock = threading.Lock()
        self._released = threading.Event()
        self._server = _Quiet(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """End the server, and the requests that it left without an answer."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def variables(self) -> dict[str, str]:
        """Return the variables of a client that has a key and a route."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def wait(self, limit_s: float = 60) -> None:
        """Leave a request without an answer."""
        self._released.wait(limit_s)

    def graphql(self, name: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer one operation."""
        self.asked[name] += 1
        answer = getattr(self, f"_{name}", None)
        if answer is None:
            self.unknown.append(query)
            return {}
        found: dict[str, Any] = answer(variables)
        return found

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "team", "username": "u", "flags": "{}", "teams": {"edges": []}}}

    def _ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        bucket = run and {
            "id": given["name"],
            "name": given["name"],
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.given.get("displayName"),
            "logLineCount": 0,
            "historyLineCount": len(run.rows),
            "eventsLineCount": len(run.events),
            "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]),
            "eventsTail": json.dumps([json.dumps(row) for row in run.events[-1:]]),
            "config": json.dumps(run.config),
            "tags": run.given.get("tags") or [],
            "notes": run.given.get("notes"),
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "team"}, "bucket": bucket}}

    def _RunRows(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        bucket = {"historyLineCount": len(run.rows)} if run else None
        model = {"entity": {"name": "team"}, "bucket": bucket}
        return {"viewer": {"id": "u"}, "model": model if self.runs else None}

    def _ViewerEntity(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"entity": "team"}}

    def _SavedViews(self, given: dict[str, Any]) -> dict[str, Any]:
        keys = ("id", "displayName", "spec")
        wanted = [given[key] for key in ("entity", "project", "view")]
        names = ("entityName", "projectName", "name")
        found = [view for view in self.views.values() if [view[name] for name in names] == wanted]
        edges = [{"node": {key: view[key] for key in keys}} for view in found]
        return {"viewer": {"id": "u"}, "project": {"allViews": {"edges": edges}} if self.runs else None}

    def _UpsertView2(self, given: dict[str, Any]) -> dict[str, Any]:
        id = given.get("id") or f"view-{len(self.views)}"
        is_new = id not in self.views
        self.views[id] = given | {"id": id}
        return {"upsertView": {"view": {"id": id, "name": given["name"]}, "inserted": is_new}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name") or given["id"]
        is_new = name not in self.runs
        run = self.runs.setdefault(name, Run())
        run.given |= {key: value for key, value in given.items() if value is not None}
        if given.get("config"):
            run.config |= json.loads(given["config"])
        if given.get("summaryMetrics"):
            run.summary |= json.loads(given["summaryMetrics"])
        project = {"id": "p", "name": given.get("project") or "p", "entity": {"id": "e", "name": "team"}}
        bucket = {"id": name, "name": name, "displayName": run.given.get("displayName") or name}
        bucket |= {"description": "", "config": "{}", "sweepName": None, "project": project}
        bucket["historyLineCount"] = len(run.rows)
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _NotifyScriptableRunAlert(self, given: dict[str, Any]) -> dict[str, Any]:
        self.runs[given["runName"]].alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(given["input"] | {"id": str(len(self.artifacts))})
        made = {"id": self.artifacts[-1]["id"], "state": "PENDING", "artifactSequence": {"id": "s"}}
        made["artifactSequence"] |= {"latestArtifact": None}
        return {"createArtifact": {"artifact": made}}

    def _ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/put/artifact/{given['artifactID']}"
        file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for spec in given["input"]["artifactFiles"]:
            url = f"{self.url}/put/artifact-file/{spec['name']}"
            node = {"storagePath": spec["name"], "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            nodes.append({"node": node | {"artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}

    def _UseArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.used.append(given["input"]["artifactID"])
        return {"useArtifact": {"artifact": {"id": given["input"]["artifactID"]}}}

    def stream(self, name: str, sent: dict[str, Any]) -> dict[str, Any]:
        """Take rows of a run: each file's lines stand at an offset."""
        self.asked["file_stream"] += 1
        with self.lock:
            run = self.runs.setdefault(name, Run())
            for file, chunk in (sent.get("files") or {}).items():
                lines = [json.loads(line) for line in chunk["content"]] if "output" not in file else []
                if file == "wandb-summary.json":
                    for line in lines:
                        run.summary |= line
                elif file == "wandb-history.jsonl":
                    del run.rows[chunk["offset"] :]
                    run.rows += lines
                elif file == "wandb-events.jsonl":  # of several nodes, each with offsets of its own
                    run.events += lines
            if sent.get("complete") or sent.get("preempting"):
                run.endings.append({key: sent.get(key) for key in ("complete", "exitcode", "preempting")})
            if self.rows_before_fault and len(run.rows) >= self.rows_before_fault[0]:
                self.fault, self.rows_before_fault = self.rows_before_fault[1], None
        return {"stopped": True} if self.is_stopped else {}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were killed."""


def _handler(server: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            body = self._body()
            parts = self.path.split("/")[2:]
            if parts[0] in server.runs:
                server.runs[parts[0]].files["/".join(parts[1:])] = body
            elif parts[0] == "artifact":
                server.artifacts[int(parts[1])]["manifest"] = json.loads(body)
            self._answer({})

        def do_POST(self) -> None:
            body = self._body()
            if self.path != "/oidc/token" and self._is_failing():
                return
            if self.path == "/oidc/token":
                return self._answer({"access_token": "from-the-file", "expires_in": 3600})
            sent = json.loads(body or b"{}")
            if self.path == "/graphql":
                words = sent["query"].replace("(", " ").replace("{", " ").split()
                data = server.graphql(words[1], sent["query"], sent.get("variables") or {})
                self._answer({"data": data})
            elif self.path.endswith("/file_stream"):
                self._answer(server.stream(self.path.split("/")[-2], sent))
            else:
                self._answer({})

        def _is_failing(self) -> bool:
            if server.fault == "silent":
                server.wait()
                self.close_connection = True
                return True
            has_key = "Authorization" in self.headers and server.fault != "refused"
            code = {"errors": 500, "busy": 429}.get(server.fault or "", 0 if has_key else 401)
            if code:
                server.asked[f"{code}"] += 1
                self._answer({"errors": [{"message": "told to fail"}]}, code)
            return bool(code)

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _answer(self, value: Any, code: int = 200) -> None:
            text = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


if __name__ == "__main__":  # by hand
    server = StandIn()
    print(" ".join(f"{name}={value}" for name, value in server.variables().items()), flush=True)
    while True:
        time.sleep(1)
