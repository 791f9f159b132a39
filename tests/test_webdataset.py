"""Shards: what the packer writes, and the loader's order, resumption, streaming and refusals."""

import http.server
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import BetonReader
from pipeline.fetch import public_url
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from pipeline.manifest import manifest_path, read_manifest
from pipeline.sampling import sharded_order
from pipeline.shard_store import split_location
from pipeline.shards import parse_index
from pipeline.wds_loader import WebDatasetPipeline
from tools import make_ffcv_dataset, make_webdataset
from tools.support.cli import call

VIEWS = (ViewSpec("view1", 24, draw_id=0), ViewSpec("view2", 16, draw_id=1))
COUNT, CLASSES = 48, 3


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / f"class{number % CLASSES}" / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        pixels = np.kron(rng.integers(0, 255, (6, 7, 3)), np.ones((9, 9, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def shards(source) -> Path:
    dest = source.parent / "shards"
    assert make_webdataset.main([str(source), str(dest), "--shard-size-mib", "0.02"]) == 0
    return dest


@pytest.fixture
def server(shards):
    """A plain server, without byte ranges; yields its address and the list of requested paths."""
    requested: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(shards.parent))

        def do_GET(self):
            requested.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/{shards.name}", requested
        running.shutdown()


def index_of(shards: Path):
    return parse_index((shards / "index.json").read_text(), "index")


def config(data: object, **changes) -> PipelineConfig:
    settings = {"global_batch": 8, "seed": 3, "order": "sharded", "shard_window": 3, "workers": 1} | changes
    return PipelineConfig(data=str(data), views=VIEWS, **settings)


def epoch_of(pipeline, epoch: int = 0, first_step: int = 0):
    pipeline.set_epoch(epoch, first_step)
    return [(b.index.tolist(), {n: v.clone() for n, v in b.views.items()}, b.label.tolist()) for b in pipeline]


def samples(batches) -> list[int]:
    return [sample for index, _, _ in batches for sample in index]


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        a[0] == b[0] and a[2] == b[2] and all((a[1][name] == b[1][name]).all() for name in a[1])
        for a, b in zip(first, second, strict=True)
    )


def test_shards_hold_what_the_packed_file_holds(source, shards, tmp_path):
    dest = tmp_path / "a.beton"
    assert make_ffcv_dataset.main([str(source), str(dest)]) == 0
    reader, index = BetonReader(dest), index_of(shards)
    assert index.data_hash == read_manifest(manifest_path(dest)).data_hash
    assert index.labels.tolist() == reader.labels.tolist() and index.classes == ("class0", "class1", "class2")
    assert index.samples.sum() == COUNT and len(index.names) > 6
    shard_of = index.shard_of()
    for number in range(COUNT):
        data = (shards / index.names[shard_of[number]]).read_bytes()
        start = index.offsets[number]
        assert data[start : start + index.sizes[number]] == reader.record(number).tobytes()
    for name, size in zip(index.names, index.shard_bytes, strict=True):
        assert (shards / name).stat().st_size == size <= 0.02 * 2**20


def test_stock_webdataset_reads_the_shards(shards):
    webdataset = pytest.importorskip("webdataset")
    index = index_of(shards)
    urls = [str(shards / name) for name in index.names]
    stock = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    found = list(stock.decode("pil").to_tuple("jpg", "cls"))
    assert [label for _, label in found] == index.labels.tolist()
    assert all(isinstance(image, Image.Image) for image, _ in found)


def test_bytes_do_not_depend_on_workers(source, shards, tmp_path):
    other = tmp_path / "shards"
    assert make_webdataset.main([str(source), str(other), "--shard-size-mib", "0.02", "--workers", "3"]) == 0
    assert sorted(p.name for p in other.iterdir()) == sorted(p.name for p in shards.iterdir())
    assert all((shards / path.name).read_bytes() == path.read_bytes() for path in other.iterdir())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_order_is_the_contracts_for_any_number_of_ranks(shards, world):
    index = index_of(shards)
    for epoch in (0, 1):
        want = sharded_order(np.arange(COUNT), 3, epoch, index.samples, 3)
        ranks = []
        for rank in range(world):
            pipeline = WebDatasetPipeline(config(shards, rank=rank, world_size=world))
            assert len(pipeline) == COUNT // 8
            ranks.append(epoch_of(pipeline, epoch))
            pipeline.close()
        steps = [[sample for rank in ranks for sample in rank[step][0]] for step in range(COUNT // 8)]
        assert np.concatenate(steps).tolist() == want.tolist()


def test_pixels_labels_and_order_agree_with_the_folder_loader(source, shards):
    pipeline = WebDatasetPipeline(config(shards, order="global"))
    reference = build_pipeline("folder", config(source, order="global"))
    assert same(epoch_of(pipeline, 2), epoch_of(reference, 2))
    pipeline.close()
    reference.close()


def test_resumes_in_mid_epoch_after_an_early_break(shards):
    pipeline = WebDatasetPipeline(config(shards))
    whole = epoch_of(pipeline, 5)
    pipeline.set_epoch(6)
    for _ in pipeline:
        break
    assert same(epoch_of(pipeline, 5, first_step=4), whole[4:])
    assert not same(epoch_of(pipeline, 6), whole)
    pipeline.close()
    pipeline.close()


def test_streaming_gives_the_same_and_keeps_few_shards(shards, server):
    address, requested = server
    local = WebDatasetPipeline(config(shards))
    streamed = WebDatasetPipeline(config(address))
    assert requested == [f"/{shards.name}/index.json"]
    for epoch in (0, 1):
        assert same(epoch_of(local, epoch), epoch_of(streamed, epoch))
    assert same(epoch_of(local, 1, 3), epoch_of(streamed, 1, 3))
    files = streamed.store.files
    assert len(files._maps) <= 6 < len(index_of(shards).names)
    # Each shard once an epoch, and again in the resumed one at most.
    assert files.fetched <= 3 * len(index_of(shards).names)
    folder = Path(files._folder.name)
    streamed.close()
    local.close()
    assert not folder.exists()


def test_a_rank_fetches_no_shard_it_does_not_need(shards, server):
    address, requested = server
    index = index_of(shards)
    population = np.arange(int(index.samples[:4].sum()))
    pipeline = WebDatasetPipeline(config(address, population=population, shard_window=2))
    epoch_of(pipeline)
    pipeline.close()
    assert {path.rpartition("/")[2] for path in requested} <= {"index.json", *index.names[:4]}


def test_a_server_that_fails_for_a_moment(shards, server, monkeypatch):
    from pipeline import fetch

    address, _ = server
    once, failed = fetch._receive, []

    def sometimes(url, file, expected):
        if url.endswith("0.tar") and url not in failed:
            failed.append(url)
            raise OSError("connection reset")
        once(url, file, expected)

    monkeypatch.setattr(fetch, "_receive", sometimes)
    pipeline = WebDatasetPipeline(config(address))
    assert sorted(samples(epoch_of(pipeline))) == list(range(COUNT)) and failed
    monkeypatch.setattr(fetch, "PATIENCE_S", 0)
    monkeypatch.setattr(fetch, "_receive", lambda *_: (_ for _ in ()).throw(OSError("connection reset")))
    with pytest.raises(OSError, match="connection reset"):
        epoch_of(pipeline, 7)
        epoch_of(pipeline, 8)
        epoch_of(pipeline, 9)
    pipeline.close()


def test_damage_after_packing_is_named_and_its_place_filled(source, tmp_path):
    dest = tmp_path / "shards"
    assert make_webdataset.main([str(source), str(dest), "--shard-size-mib", "0.02"]) == 0
    index = index_of(dest)
    good = WebDatasetPipeline(config(dest))
    before = epoch_of(good)
    good.close()
    damaged = 20
    path = dest / index.names[index.shard_of()[damaged]]
    data = bytearray(path.read_bytes())
    data[index.offsets[damaged] + index.sizes[damaged] // 2] ^= 0x10
    path.write_bytes(data)
    pipeline = WebDatasetPipeline(config(dest))
    after = epoch_of(pipeline)
    assert list(pipeline.stats().bad_records) == [damaged]
    assert "checksum" in pipeline.stats().bad_records[damaged] and path.name in pipeline.stats().bad_records[damaged]
    assert samples(after) == samples(before) and same(after, epoch_of(pipeline))
    differing = [
        sample
        for (index_a, views_a, _), (_, views_b, _) in zip(before, after, strict=True)
        for row, sample in enumerate(index_a)
        if not (views_a["view1"][row] == views_b["view1"][row]).all()
    ]
    assert differing == [damaged]
    pipeline.close()


def test_a_pattern_takes_some_of_the_shards(shards, server):
    index = index_of(shards)
    some = WebDatasetPipeline(config(shards / "shard-{000001..000003}.tar", global_batch=2))
    assert some.num_samples == index.samples[1:4].sum() and some.data_hash != index.data_hash
    first = int(index.samples[0])
    labels = index.labels[first : first + some.num_samples]
    assert some.labels.tolist() == labels.tolist()
    some.close()
    everything = WebDatasetPipeline(config(f"{server[0]}/shard-{{000000..{len(index.names) - 1:06d}}}.tar"))
    assert everything.data_hash == index.data_hash
    everything.close()


def test_refusals_are_one_line(source, shards, server, tmp_path):
    address, _ = server
    count = len(index_of(shards).names)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "index.json").write_text((shards / "index.json").read_text()[:-400])
    partial = tmp_path / "partial"
    partial.mkdir()
    for path in shards.iterdir():
        (partial / path.name).write_bytes(path.read_bytes()[: None if path.suffix == ".json" else -1024])
    for data, changes, words in [
        (shards, {"global_batch": 64, "world_size": 64}, f"{count} shards, fewer than the 64"),
        (source, {}, "make_webdataset"),
        (tmp_path / "none-{0..3}.tar", {}, "no file matches"),
        (shards / "shard-900000.tar", {}, "not in the index"),
        (broken, {}, "damaged"),
        (partial, {}, "copy it again"),
        (address, {"order": "global"}, "--order sharded"),
        (address + "/nothing", {}, "404"),
        ("ftp://host/shards", {}, "cannot read from"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            WebDatasetPipeline(config(data, **changes))
        assert "\n" not in str(caught.value)


def test_addresses_as_users_write_them():
    assert public_url("s3://bucket/a/b.tar") == "https://bucket.s3.amazonaws.com/a/b.tar"
    assert public_url("gs://bucket/a") == "https://storage.googleapis.com/bucket/a"
    assert public_url("hf://datasets/me/photos/train") == "https://huggingface.co/datasets/me/photos/resolve/main/train"
    assert split_location("s3://b/x/s-{08..10}.tar") == ("s3://b/x", ["s-08.tar", "s-09.tar", "s-10.tar"])
    assert split_location("/data/shards/index.json") == ("/data/shards", None)


def test_packer_refuses_and_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def pack(*arguments: object) -> int:
        return call(make_webdataset.main, [str(argument) for argument in arguments])

    other = tmp_path / "photos"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    for arguments, words in [
        ((source, other), "--overwrite"),
        ((source, other, "--overwrite"), "other things"),
        ((source, tmp_path / "d", "--shard-size-mib", 0), "out of range"),
        ((source, tmp_path / "d", "--shard-size", 1), "--shard-size-mib"),
    ]:
        assert pack(*arguments) == 2
        line = capsys.readouterr().err.strip()
        assert words in line and "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["photos"] and (other / "mine.txt").exists()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jpg").write_bytes(b"text")
    (bad / "b.png").write_bytes(io.BytesIO().getvalue())
    assert pack(bad, tmp_path / "d") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "d.refused", "d.rejected.jsonl", "photos"]
    lines = (tmp_path / "d.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines][1] == "empty file"
    assert pack(source, tmp_path / "d", "--overwrite") == 0
    kept = (tmp_path / "d" / "index.json").read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_webdataset, "make_records", interrupted)
    assert pack(source, tmp_path / "d", "--overwrite") == 130
    assert (tmp_path / "d" / "index.json").read_bytes() == kept
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
