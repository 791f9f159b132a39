"""Servers as object stores are: rate limits, signatures, redirects, cuts and pauses; and stores that fsspec reads."""

from __future__ import annotations

import email.utils
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import fetch
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.refusal import SourceBusy, SourceClosed
from pipeline.wds_loader import WebDatasetPipeline
from tools import make_webdataset
from train.errors import EXIT_REQUEUE, run_to_exit_code
from train.main import main as train

COUNT = 48


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = np.kron(rng.integers(0, 255, (6, 7, 3)), np.ones((9, 9, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg")
    dest = folder.parent / "shards"
    assert make_webdataset.main([str(folder), str(dest), "--shard-size-mib", "0.02"]) == 0
    return dest


class Server:
    """Serves a folder; `answer(handler, file name, number of the request)` may answer instead, returning True."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answer: Callable[[http.server.BaseHTTPRequestHandler, str, int], bool] = lambda *_: False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.asked.append((self.path, dict(self.headers)))
                name = urllib.parse.urlsplit(self.path).path.rsplit("/", 1)[-1]
                if outer.answer(self, name, len(outer.asked)):
                    return
                file = folder / name
                reply(self, 200, file.read_bytes()) if file.is_file() else reply(self, 404)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}/s"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def reply(handler: http.server.BaseHTTPRequestHandler, code: int, data: bytes = b"", **headers: str) -> bool:
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
    return True


@pytest.fixture
def server(shards, monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "_not_before", {})
    monkeypatch.setattr(fetch, "_FIRST_PAUSE_S", 0.1)
    # A run that another test stopped in this process has left it set.
    monkeypatch.setattr(fetch, "_stopping", False)
    made = Server(shards)
    yield made
    made.close()


def samples(data: str) -> list[int]:
    config = PipelineConfig(data, (ViewSpec("v", 16),), 4, order="sharded", drop_last=False, shard_window=2)
    pipeline = WebDatasetPipeline(config)
    try:
        return sorted(int(index) for batch in pipeline for index in batch.index)
    finally:
        pipeline.close()


@pytest.mark.parametrize("form", ["seconds", "date", "no header", "gateway"])
def test_a_busy_server_is_left_alone_as_long_as_it_asks(server, form) -> None:
    until: list[float] = []
    early: list[float] = []

    def answer(handler, name, number) -> bool:
        if not name.endswith(".tar"):
            return False
        if not until:
            until.append(time.time() + 1.2)
        left = until[0] - time.time()
        if left <= 0:
            return False
        early.append(left)
        if form == "date":
            return reply(handler, 429, Retry_After=email.utils.formatdate(time.time() + 2, usegmt=True))
        return reply(
            handler,
            {"gateway": 502, "no header": 503}.get(form, 429),
            **({"Retry_After": "1.3"} if form == "seconds" else {}),
        )

    server.answer = answer
    assert samples(server.address) == list(range(COUNT))
    if form in ("seconds", "date"):
        # Only what was asked before the first answer came: four threads, not one request each second of all.
        assert len(early) <= 8


def test_patience_has_an_end_and_says_so(server, tmp_path, monkeypatch, capsys) -> None:
    server.answer = lambda handler, name, number: reply(handler, 429, Retry_After="3600")
    monkeypatch.setattr(fetch, "PATIENCE_S", 5)
    started = time.monotonic()
    assert run_to_exit_code(lambda: len(samples(server.address))) == EXIT_REQUEUE
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "HTTP Error 429" in line and "the 5 s that REGATTA_HTTP_PATIENCE allows" in line
    assert time.monotonic() - started < 4, "an hour is more than it may wait, so it need not wait at all"
    monkeypatch.setattr(fetch, "_stopping", True)
    server.answer = lambda handler, name, number: reply(handler, 503)
    with pytest.raises(SourceBusy, match="stopped while"):
        fetch.fetch(server.address, tmp_path / "x")


def test_signed_addresses_keep_their_query(server, capsys) -> None:
    secret = "X-Amz-Signature=a%2Fb&e=1"
    server.answer = lambda handler, name, number: secret not in handler.path and reply(handler, 403)
    names = sorted(json.loads((fetch_index(server, secret)).decode())["shards"], key=lambda shard: shard["name"])
    last = len(names) - 1
    for data in ("", "/", "/index.json", f"/shard-{{000000..{last:06d}}}.tar"):
        assert samples(f"{server.address}{data}?{secret}") == list(range(COUNT))
    assert all(path.endswith("?" + secret) for path, _ in server.asked)
    with pytest.raises(SourceClosed, match="403") as caught:
        samples(f"{server.address}?wrong=signature")
    assert "signature" not in str(caught.value).partition("cannot")[0], "a key does not belong into a log"


def fetch_index(server: Server, query: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(f"{server.address}/index.json?{query}") as answer:
        return answer.read()


def test_names_are_quoted(server, shards, tmp_path) -> None:
    assert fetch.member_url("http://h/a b?x=%20", "c d#1.tar") == "http://h/a b/c%20d%231.tar?x=%20"
    assert fetch.member_url("memory://h/a", "c d.tar") == "memory://h/a/c d.tar"


def test_redirects_and_headers(server, shards, monkeypatch) -> None:
    monkeypatch.setenv(fetch.HEADERS, "Authorization: Bearer key\nX-Team: a: b")
    other = Server(shards)

    def answer(handler, name, number) -> bool:
        if handler.headers.get("Authorization") != "Bearer key":
            return reply(handler, 401)
        if "/near/" in handler.path:
            return False
        if name == "index.json":
            return reply(handler, 302, Location=f"/near/{name}")
        return reply(handler, 307, Location=f"http://localhost:{other.port}/far/{name}?signed=1")

    server.answer = answer
    assert samples(server.address) == list(range(COUNT))
    assert all(headers["X-Team"] == "a: b" and headers["User-Agent"] == "regatta" for _, headers in server.asked)
    assert other.asked and all("?signed=1" in path for path, _ in other.asked)
    assert not any("Authorization" in headers or "X-Team" in headers for _, headers in other.asked)
    other.close()


@pytest.mark.parametrize("ranges", [True, False])
def test_what_has_arrived_is_not_fetched_again(server, shards, tmp_path, ranges) -> None:
    data = (shards / "shard-000000.tar").read_bytes()
    piece = len(data) // 6
    sent: list[int] = []

    def answer(handler, name, number) -> bool:
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        # The connection ends after a part, more often than a file may fail without progress.
        part = data[start : start + piece] if ranges or len(sent) < 2 else data
        sent.append(len(part))
        handler.wfile.write(part)
        handler.close_connection = True
        return True

    server.answer = answer
    original, fetch._TIMEOUT_S = fetch._TIMEOUT_S, 5
    try:
        fetch.fetch(server.address, tmp_path / "x", len(data), persistent=True)
    finally:
        fetch._TIMEOUT_S = original
    assert (tmp_path / "x").read_bytes() == data
    assert (sum(sent) == len(data) and len(sent) >= 6) if ranges else len(sent) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_another_file_than_the_index_says_ends_soon(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fetch._Waiting, "_sleep", lambda *_: None)
    server.answer = lambda handler, name, number: reply(handler, 200, b"abc")
    with pytest.raises(SourceClosed, match="it has 3 bytes, the index says 7"):
        fetch.fetch(server.address, tmp_path / "x", 7, persistent=True)
    assert len(server.asked) == fetch._ATTEMPTS


@pytest.mark.slow
def test_a_run_whose_server_goes_away_saves_and_goes_on_later(shards, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_S", 1)
    # More shards than two windows hold, so that the second epoch fetches again.
    assert make_webdataset.main([str(shards.parent / "source"), str(tmp_path / "s"), "--shard-size-mib", "0.001"]) == 0
    server = Server(tmp_path / "s")
    flags = "--method moco-v2 --recipe moco-v2-small --bn.group-size 4 --queue-size 16 --image-size 32 --no-report"
    where = ["--data", server.address, "--order", "sharded", "--run-dir", str(tmp_path / "run"), "--global-batch", "8"]
    command = [*flags.split(), *where, "--max-steps", "12"]
    gone = threading.Event()

    def answer(handler, name, number) -> bool:
        # The shards of the first epoch are there; the run is to lose them in the second.
        if name.endswith(".tar") and (tmp_path / "run" / "metrics.jsonl").is_file():
            if '"step": 5,' in (tmp_path / "run" / "metrics.jsonl").read_text():
                gone.set()
        return gone.is_set() and reply(handler, 429, Retry_After="60")

    server.answer = answer
    assert train([*command, "--log-every", "1"]) == EXIT_REQUEUE
    assert gone.is_set()
    newest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert "step_00000005" <= newest < "step_00000012"
    assert "429" in capfd.readouterr().err.splitlines()[-1]
    gone.clear()
    server.answer = lambda *_: False
    monkeypatch.setattr(fetch, "_not_before", {})
    assert train([*command, "--log-every", "1"]) == 0
    assert "step_00000012" in (tmp_path / "run" / "checkpoints" / "latest").read_text()
    server.close()


def test_shards_of_a_store_that_fsspec_reads(shards, tmp_path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for file in shards.iterdir():
        store.pipe(f"/bucket/set/{file.name}", file.read_bytes())
    assert samples("memory://bucket/set") == list(range(COUNT))
    assert len(samples("memory://bucket/set/shard-{000000..000001}.tar")) < COUNT
    store.rm("/bucket/set/shard-000000.tar")
    with pytest.raises(SourceClosed, match="credentials"):
        fetch.fetch("memory://bucket/set/shard-000000.tar", tmp_path / "x")
