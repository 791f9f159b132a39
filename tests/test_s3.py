"""An S3 server on this machine: files, lists and shards behind s3:// addresses, with credentials of the environment."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from pipeline.manifest import manifest_path, read_manifest
from pipeline.refusal import SourceClosed
from tests.test_data_sources import folder, table
from tools import make_ffcv_dataset, make_webdataset
from tools.support.cli import call


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A function that uploads a folder into a bucket and gives its s3:// address."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (pip install s3fs)")
    server_of = pytest.importorskip("moto.server", reason="moto is not installed (pip install 'moto[server,s3]')")
    server = server_of.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "HOME": str(tmp_path),  # no credentials of whoever runs the tests
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    # The server keeps its buckets for as long as the process lives.
    name_of_bucket = f"photos-{secrets.token_hex(4)}"
    store.mkdir(name_of_bucket)

    def upload(local: Path, name: str) -> str:
        store.put(str(local), f"{name_of_bucket}/{name}", recursive=True)
        return f"s3://{name_of_bucket}/{name}"

    yield upload
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def pack(packer, source: object, dest: Path) -> int:
    return call(packer.main, [str(source), str(dest)])


def epoch(data: str, order: str) -> list[tuple[list[int], list[int], bytes]]:
    config = PipelineConfig(data, (ViewSpec("v", 16),), 3, seed=1, order=order, shard_window=2)
    pipeline = build_pipeline("auto", config, quiet=True)
    pipeline.set_epoch(1)
    seen = [(each.index.tolist(), each.label.tolist(), each.views["v"].numpy().tobytes()) for each in pipeline]
    pipeline.close()
    return seen


def test_a_folder_and_lists_are_packed_from_a_bucket(bucket, tmp_path):
    local = folder(tmp_path / "f", "xy")
    names = sorted(file.relative_to(local).as_posix() for file in local.rglob("*.jpg"))
    (local / "list.txt").write_text("\n".join(names))
    address = bucket(local, "set")
    (tmp_path / "own.txt").write_text("\n".join(f"{address}/{name}" for name in names))
    assert pack(make_ffcv_dataset, local, tmp_path / "local.beton") == 0
    wanted = read_manifest(manifest_path(tmp_path / "local.beton"))
    for number, source in enumerate((address, f"{address}/list.txt", tmp_path / "own.txt")):
        assert pack(make_ffcv_dataset, source, tmp_path / f"{number}.beton") == 0
        got = read_manifest(manifest_path(tmp_path / f"{number}.beton"))
        assert got.data_hash == wanted.data_hash and got.classes == ("x", "y")


def test_parts_are_packed_from_a_bucket(bucket, tmp_path):
    address = bucket(folder(tmp_path / "f", "xy"), "set")
    for part in ("1/2", "2/2"):
        assert call(make_ffcv_dataset.main, [address, str(tmp_path / "p.beton"), "--part", part]) == 0
    assert pack(make_ffcv_dataset, tmp_path / "f", tmp_path / "one.beton") == 0
    whole, one = (read_manifest(manifest_path(tmp_path / name)) for name in ("p.beton", "one.beton"))
    assert whole.data_hash == one.data_hash and whole.sources == one.sources


@pytest.mark.parametrize("parts", [0, 2])
def test_shards_are_streamed_from_a_bucket(bucket, tmp_path, parts):
    local = folder(tmp_path / "f", "xyz")
    flags = ["--shard-size-mib", "0.006"]
    for number in range(max(parts, 1)):
        more = ["--part", f"{number + 1}/{parts}"] if parts else []
        assert call(make_webdataset.main, [str(local), str(tmp_path / "shards"), *flags, *more]) == 0
    address = bucket(tmp_path / "shards", "shards")
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 2
    assert epoch(address, "sharded") == epoch(str(tmp_path / "shards"), "sharded")


def test_what_is_not_there_or_not_allowed_is_one_line(bucket, tmp_path, capsys, monkeypatch):
    address = bucket(folder(tmp_path / "f", "xy"), "set")
    for source in (f"{address}/nothing", "s3://no-such-bucket/set", f"{address}/none.txt"):
        assert pack(make_ffcv_dataset, source, tmp_path / "o.beton") == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and source.rpartition("/")[0] in said


def test_one_file_in_a_bucket_is_copied_once(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("REGATTA_CACHE", str(tmp_path / "cache"))
    local = folder(tmp_path / "f", "xy")
    (tmp_path / "set").mkdir()
    packed = tmp_path / "set" / "photos.beton"
    assert pack(make_ffcv_dataset, local, packed) == 0
    address = bucket(tmp_path / "set", "set")
    assert epoch(f"{address}/photos.beton", "global") == epoch(str(packed), "global")
    rows = table(tmp_path / "set" / "t.parquet", [1, 2, 3, 4], [0, 1, 0, 1])
    address = bucket(tmp_path / "set", "tables")
    assert epoch(f"{address}/t.parquet", "global") == epoch(str(rows), "global")
    with pytest.raises(SourceClosed, match="none.beton"):
        epoch(f"{address}/none.beton", "global")
