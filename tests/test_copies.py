"""One file behind an address: copied once, asked for again only when it changed, resumed, checked, and shared."""

from __future__ import annotations

import errno
import http.server
import re
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import copies, fetch
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from pipeline.manifest import manifest_path, read_manifest
from pipeline.refusal import SourceBusy, SourceClosed
from pipeline.stores import count_images, data_parts, is_shard_pattern
from tools import make_ffcv_dataset
from train.errors import run_to_exit_code
from train.eval.splits import class_names
from train.main import main

COUNT = 24


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed file of two classes with its manifest."""
    here = tmp_path_factory.mktemp("packed")
    for number in range(COUNT):
        path = here / "photos" / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(path)
    (here / "store").mkdir()
    assert make_ffcv_dataset.main([str(here / "photos"), str(here / "store" / "p.beton"), "--workers", "1"]) == 0
    return here / "store" / "p.beton"


class Server:
    """Serves a folder with ranges and versions; `cut` bytes of a long answer are sent before it stops, if it is set."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[tuple[str, str]] = []
        self.cut: int | None = None
        self.version = "one"
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                name = urllib.parse.urlsplit(self.path).path.rsplit("/", 1)[-1]
                outer.asked.append((name, self.headers.get("Range", "")))
                if not (folder / name).is_file():
                    self.send_error(404)
                    return
                data = (folder / name).read_bytes()
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                part = data[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None] if wanted else data
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(part)))
                self.send_header("ETag", f'"{outer.version}"')
                self.end_headers()
                self.wfile.write(part[: outer.cut] if len(part) > 24 else part)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/set/p.beton"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[tuple[str, str]]:
        """The requests for data but those that only ask for the first bytes; forgets all requests."""
        asked, self.asked = self.asked, []
        return [each for each in asked if each[0].endswith((".beton", ".parquet")) and each[1] != "bytes=0-23"]


@pytest.fixture
def server(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "_not_before", {})
    monkeypatch.setattr(fetch, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(fetch, "_stopping", False)
    monkeypatch.setattr(copies, "_settled", {})
    monkeypatch.setenv(copies.CACHE, str(tmp_path / "cache"))
    made = Server(shutil.copytree(packed.parent, tmp_path / "served"))
    yield made
    made.close()


@pytest.fixture
def served(server: Server, tmp_path: Path) -> Path:
    """The packed file of the server, to be changed."""
    return tmp_path / "served" / "p.beton"


def another_process() -> None:
    copies._settled.clear()


def epoch(data: str) -> list[tuple[list[int], bytes]]:
    pipeline = build_pipeline("auto", PipelineConfig(data, (ViewSpec("v", 16),), 4, seed=1), quiet=True)
    pipeline.set_epoch(1)
    seen = [(batch.index.tolist(), batch.views["v"].numpy().tobytes()) for batch in pipeline]
    pipeline.close()
    return seen


def test_an_epoch_is_that_of_the_file_and_the_file_is_fetched_once(server: Server, packed: Path) -> None:
    assert not is_shard_pattern(server.address)
    assert epoch(server.address) == epoch(str(packed))
    assert class_names(server.address) == ["a", "b"]
    assert server.fetched() == [("p.beton", "")]
    another_process()
    # A new signature is not another file.
    assert epoch(f"{server.address}?signature=x,y") == epoch(str(packed))
    assert server.fetched() == []


def test_images_are_counted_without_fetching(server: Server) -> None:
    assert count_images(server.address, 1000) == COUNT and count_images(server.address, 5) == 5
    assert server.fetched() == []
    assert count_images(server.address.replace("p.beton", "none.beton"), 9) == 9, "whoever opens it says so"


def test_a_stopped_download_goes_on_where_it_was(server: Server, served: Path) -> None:
    server.cut = 1 << 20
    fetch.stop_waiting()
    with pytest.raises(SourceBusy, match="stopped while"):
        data_parts(server.address)
    fetch.stop_waiting(False)
    server.cut = None
    server.fetched()
    copies._settled.clear()
    # The first is stopped before it writes; now one that arrives in part.
    (folder,) = served.parents[1].glob("cache/copies/*")
    (folder / ".p.beton.partial").write_bytes(served.read_bytes()[:100_000])
    (copy,) = data_parts(server.address)
    assert server.fetched() == [("p.beton", "bytes=100000-")]
    assert Path(copy).read_bytes() == served.read_bytes()
    assert not list(folder.glob("*.partial")) and not list(folder.glob(".p.beton.begun*"))


def test_what_arrived_of_another_version_is_not_continued(server: Server, served: Path) -> None:
    server.cut = 0
    fetch.stop_waiting()
    with pytest.raises(SourceBusy):
        data_parts(server.address)
    fetch.stop_waiting(False)
    server.cut, server.version = None, "two"
    server.fetched()
    (folder,) = served.parents[1].glob("cache/copies/*")
    (folder / ".p.beton.partial").write_bytes(bytes(100_000))
    data_parts(server.address)
    assert server.fetched() == [("p.beton", "")]


def test_a_cut_connection_is_taken_up(server: Server, served: Path) -> None:
    server.cut = 3 << 20
    (copy,) = data_parts(server.address)
    assert Path(copy).read_bytes() == served.read_bytes()
    assert server.fetched()[:2] == [("p.beton", ""), ("p.beton", f"bytes={3 << 20}-")]


def test_a_new_version_is_fetched_and_a_server_that_is_gone_is_not_needed(
    server: Server, packed: Path, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_parts(server.address)
    another_process()
    server.version = "two"
    data_parts(server.address)
    assert server.fetched() == [("p.beton", "")] * 2
    another_process()
    served.unlink()
    capsys.readouterr()
    assert epoch(server.address) == epoch(str(packed))
    assert "takes the copy of it in" in capsys.readouterr().err
    with pytest.raises(SourceClosed, match=r"none.beton cannot be read \(HTTP 404"):
        data_parts(server.address.replace("p.beton", "none.beton"))


def test_ranks_of_a_machine_fetch_one_copy(server: Server) -> None:
    found: list[str] = []
    ranks = [threading.Thread(target=lambda: found.extend(data_parts(server.address))) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(found) == 3 and len(set(found)) == 1 and len(server.fetched()) == 1


def test_a_damaged_file_is_told_and_not_kept(server: Server, served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(served.read_bytes())
    data[int(copies.BetonReader(served).offsets[5]) + 60] ^= 1
    served.write_bytes(data)
    assert run_to_exit_code(lambda: len(data_parts(server.address))) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "is damaged (record 5 is not the one that was packed) and was removed" in line
    assert not list(served.parents[1].glob("cache/copies/*/p.beton"))


@pytest.mark.parametrize(("ending", "kind"), [(".beton", "packed"), (".parquet", "parquet")])
@pytest.mark.parametrize("page", [b"<!doctype html>" * 9, b"no"])
def test_a_page_is_refused_before_it_is_fetched(
    server: Server, served: Path, page: bytes, ending: str, kind: str
) -> None:
    served.with_suffix(ending).write_bytes(page)
    with pytest.raises(ValueError, match=rf"is not a {kind} file: its first bytes are b'(<!doctype|no)"):
        data_parts(server.address.replace(".beton", ending))
    assert server.fetched() == []


@pytest.fixture
def table(server: Server, packed: Path, tmp_path: Path) -> tuple[str, Path]:
    """The address of a parquet file with the photos and their class names, and the file itself."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    photos = sorted((packed.parents[1] / "photos").glob("*/*.jpg"))
    cells = [{"bytes": photo.read_bytes(), "path": photo.name} for photo in photos]
    columns = {"image": cells, "label": [photo.parent.name for photo in photos]}
    parquet.write_table(arrow.table(columns), tmp_path / "served" / "t.parquet")
    return server.address.replace("p.beton", "t.parquet"), tmp_path / "served" / "t.parquet"


def test_a_parquet_file_is_fetched_once_and_read_as_one_of_this_machine(
    server: Server, table: tuple[str, Path]
) -> None:
    address, local = table
    assert epoch(address) == epoch(str(local)) and count_images(address, 1000) == COUNT
    assert class_names(address) == ["a", "b"]
    another_process()
    assert epoch(address) == epoch(str(local)) and len(server.fetched()) == 1


def test_a_parquet_file_behind_an_address_is_packed(table: tuple[str, Path], packed: Path, tmp_path: Path) -> None:
    assert make_ffcv_dataset.main([table[0], str(tmp_path / "made.beton"), "--workers", "1"]) == 0
    made, wanted = read_manifest(manifest_path(tmp_path / "made.beton")), read_manifest(manifest_path(packed))
    assert made.data_hash == wanted.data_hash and made.classes == wanted.classes


def test_a_disk_without_room_is_told_with_the_variable(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"lacks 0.0\d+ GB of its copy.*REGATTA_CACHE"):
        data_parts(server.address)


def test_parts_of_a_data_set_are_one(server: Server, packed: Path, served: Path) -> None:
    photos = packed.parents[1] / "photos"
    for part in ("1/2", "2/2"):
        assert make_ffcv_dataset.main([str(photos), str(served.with_name("q.beton")), "--part", part]) == 0
    address = server.address.replace("p.beton", "q-{1..2}-of-2.beton")
    assert epoch(address) == epoch(str(packed))
    with pytest.raises(ValueError, match="part 2 is missing"):
        epoch(address.replace("{1..2}", "1"))


@pytest.mark.parametrize("kind", ["packed", "parquet"])
def test_training_on_an_address(
    server: Server, tmp_path: Path, kind: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    address = request.getfixturevalue("table")[0] if kind == "parquet" else server.address
    argv = ["--method", "moco-v2", "--data", address, "--arch", "resnet10-w16", "--image-size", "32"]
    argv += ["--device", "cpu", "--no-report", "--max-steps", "1", "--run-dir", str(tmp_path / "run")]
    assert main(argv) == 0
    assert f"{COUNT} images are few" in capfd.readouterr().out


def test_a_cache_on_a_disk_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(copies.fcntl, "flock", refuses)
    with pytest.raises(OSError, match=r"refuses locks \(No locks available\).* REGATTA_CACHE"):
        with copies._alone(tmp_path / "photos.beton", "http://example.org/photos.beton"):
            pass
