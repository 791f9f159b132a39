"""Tar shards with an index, from a folder or streamed from an address, in the order that every other loader has.

Local shards are mapped into memory, so any order can be served. Streamed shards are fetched whole, a window ahead, into
a temporary folder of bounded size; that suits the `sharded` order only, in which a shard is needed for the length of
one window. Every rank reads the index, so all know the same epoch; which of the shards a rank fetches follows from the
samples it is to deliver.
"""

from __future__ import annotations

import http.client
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from .atomic import replacing
from .decoder import CHECK_CRC, ViewDecoder
from .epoch import EpochPipeline
from .host_augment import HostAugmenter, augments_on_host
from .interface import Batch, PipelineConfig
from .prefetch import HostBatch, HostBuffers, decoding_threads, deliver_batches, prefetch
from .shards import INDEX_NAME, ShardIndex, expand_braces, parse_index

_ATTEMPTS = 4
_TIMEOUT_S = 30
_PIECE = 1 << 20
_FETCHERS = 4
_SCHEMES = ("http", "https", "s3", "gs", "hf")


def public_url(address: str) -> str:
    """The http(s) address of what users write as s3://, gs:// or hf:// (public objects; a signed https works as it is).

    Raises:
        ValueError: another kind of address.
    """
    scheme, _, rest = address.partition("://")
    if scheme in ("http", "https"):
        return address
    if scheme == "gs":
        return f"https://storage.googleapis.com/{rest}"
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        return f"https://{bucket}.s3.amazonaws.com/{key}"
    if scheme == "hf":
        parts = rest.split("/")
        if parts[0] == "datasets" and len(parts) > 3:
            return f"https://huggingface.co/{'/'.join(parts[:3])}/resolve/main/{'/'.join(parts[3:])}"
    raise ValueError(
        f"cannot read from {address}; write {', '.join(f'{name}://' for name in _SCHEMES)} (hf://datasets/USER/NAME/FILE)"
        " or copy the shards to a local folder"
    )


def split_location(data: str) -> tuple[str, list[str] | None]:
    """(folder or address of the shards, the shard names chosen or None for all of them)."""
    data = data.removesuffix("/" + INDEX_NAME)
    if not data.endswith(".tar"):
        return data.rstrip("/") or "/", None
    paths = expand_braces(data)
    folders = {path.rpartition("/")[0] for path in paths}
    if len(folders) > 1:
        raise ValueError(f"the shards of {data} lie in {len(folders)} folders; they must share one, with its index")
    return folders.pop() or ".", [path.rpartition("/")[2] for path in paths]


def fetch(url: str, into: Path, expected_bytes: int | None = None) -> None:
    """Copy an address into a file, which appears under its name when it is whole.

    Raises:
        ValueError: it does not exist or may not be read.
        OSError: it could not be fetched after several attempts, or has another size than expected.
    """
    problem: Exception = OSError("nothing was tried")
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(0.2 * 4**attempt)
        try:
            _fetch_once(url, into, expected_bytes)
            return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404, 410):
                raise ValueError(
                    f"{url} cannot be read (HTTP {error.code} {error.reason}); check the address, make it public or "
                    "sign it, and make shards with tools/make_webdataset.py, which writes their index"
                ) from error
            problem = error
        except (OSError, http.client.HTTPException) as error:
            problem = error
    raise OSError(f"{url} could not be fetched in {_ATTEMPTS} attempts: {problem}; check the network and the server")


def _fetch_once(url: str, into: Path, expected_bytes: int | None) -> None:
    with replacing(into, durable=False) as partial:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, open(partial, "wb") as file:
            while piece := answer.read(_PIECE):
                file.write(piece)
            size = file.tell()
        if expected_bytes is not None and size != expected_bytes:
            raise OSError(f"it has {size} bytes, the index says {expected_bytes}")


class ShardFiles(Protocol):
    """Where the bytes of the shards are."""

    def open(self, shard: int) -> np.ndarray:
        """The bytes of a shard, uint8; raises OSError."""

    def plan(self, sequence: list[int]) -> None:
        """Which shards will be opened next, in this order."""

    def close(self) -> None:
        """Release everything."""


class LocalShards:
    """Shards in a folder, mapped on first use.

    Raises:
        ValueError: a shard is missing or has another size than the index says.
    """

    def __init__(self, folder: Path, index: ShardIndex):
        self._paths = [folder / name for name in index.names]
        self._maps: dict[int, np.ndarray] = {}
        for path, expected in zip(self._paths, index.shard_bytes.tolist(), strict=True):
            if not path.exists():
                raise ValueError(f"shard {path} is missing; copy it again or name the shards that are there")
            if path.stat().st_size != expected:
                raise ValueError(
                    f"shard {path} has {path.stat().st_size} bytes, the index says {expected}; copy it again"
                )

    def open(self, shard: int) -> np.ndarray:
        """The bytes of a shard, uint8."""
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._paths[shard], dtype=np.uint8, mode="r")
        return self._maps[shard]

    def plan(self, sequence: list[int]) -> None:
        """Local shards need no preparation."""

    def close(self) -> None:
        """Release the mappings."""
        self._maps = {}


class StreamedShards:
    """Shards behind an address, fetched whole into a temporary folder, at most `capacity` of them at a time.

    A few threads fetch ahead along the plan, up to `ahead` shards beyond the one that was opened last for the first
    time, so that what is still in use is not pushed out. Whoever needs a shard that is not there fetches it itself.
    """

    def __init__(self, base: str, index: ShardIndex, ahead: int, capacity: int):
        self._base, self._index, self._ahead, self._capacity = base, index, ahead, capacity
        # Closing must not fail where a thread writes its last file into the folder meanwhile.
        self._folder = tempfile.TemporaryDirectory(prefix="regatta-shards-", ignore_cleanup_errors=True)
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._plan: list[int] = []
        self._reached = 0
        self._generation = 0
        self._changed = threading.Condition()
        self._fetching: set[int] = set()
        self._errors: dict[int, Exception] = {}
        self._closed = False
        self.fetched = 0
        for _ in range(_FETCHERS):
            threading.Thread(target=self._run, name="regatta-shards", daemon=True).start()

    def plan(self, sequence: list[int]) -> None:
        """Fetch these shards next, in this order."""
        with self._changed:
            self._plan, self._reached, self._generation = list(sequence), 0, self._generation + 1
            self._errors = {}
            self._changed.notify_all()

    def open(self, shard: int) -> np.ndarray:
        """The bytes of a shard, uint8; waits for it.

        Raises:
            OSError: it cannot be fetched.
        """
        with self._changed:
            if shard in self._plan[self._reached :]:
                self._reached = self._plan.index(shard, self._reached) + 1
                self._changed.notify_all()
            while shard in self._fetching:
                self._changed.wait()
            if shard in self._maps:
                self._maps.move_to_end(shard)
                return self._maps[shard]
            self._fetching.add(shard)
        return self._fetch(shard)

    def _fetch(self, shard: int) -> np.ndarray:
        """Fetch a shard that the caller has entered in `_fetching`."""
        name = self._index.names[shard]
        path = Path(self._folder.name, name)
        mapped: np.ndarray | None = None
        try:
            fetch(f"{self._base}/{name}", path, int(self._index.shard_bytes[shard]))
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
            # The mapping keeps the bytes for whoever uses them; the name is not needed.
            path.unlink()
            return mapped
        finally:
            with self._changed:
                self._fetching.discard(shard)
                if mapped is not None and not self._closed:
                    self._maps[shard] = mapped
                    self.fetched += 1
                    while len(self._maps) > self._capacity:
                        self._maps.popitem(last=False)
                self._changed.notify_all()

    def _next(self) -> int | None:
        """The next shard of the plan to fetch, None where enough is there."""
        for shard in self._plan[self._reached : self._reached + self._ahead]:
            if shard not in self._maps and shard not in self._fetching and shard not in self._errors:
                return shard
        return None

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and self._next() is None:
                    self._changed.wait()
                if self._closed:
                    return
                shard, generation = self._next(), self._generation
                assert shard is not None
                self._fetching.add(shard)
            try:
                self._fetch(shard)
            except Exception as error:
                # Whoever opens the shard tries again and gets the error; this thread must not give up on the others.
                with self._changed:
                    if generation == self._generation:
                        self._errors[shard] = error

    def close(self) -> None:
        """Stop fetching and remove the temporary folder."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._maps.clear()
        self._folder.cleanup()


class ShardStore:
    """The records of a set of shards by number, with the packer's checksums."""

    def __init__(self, index: ShardIndex, files: ShardFiles, where: str):
        self.index, self.files = index, files
        self.labels, self.data_hash = index.labels, index.data_hash
        self.shard_of = index.shard_of()
        self._where = where

    def fill(self, jobs: np.ndarray, index: np.ndarray) -> object:
        """Addresses within the mapped shards, which the result keeps."""
        shards = self.shard_of[index]
        maps = {shard: self.files.open(shard) for shard in np.unique(shards).tolist()}
        bases = {shard: mapped.ctypes.data for shard, mapped in maps.items()}
        jobs["data"] = np.array([bases[shard] for shard in shards.tolist()], dtype=np.uint64) + self.index.offsets[
            index
        ].astype(np.uint64)
        jobs["size"] = self.index.sizes[index]
        jobs["flags"], jobs["crc"] = CHECK_CRC, self.index.checksums[index]
        return maps

    def read(self, index: int) -> bytes:
        """The bytes of one record; raises OSError."""
        start = int(self.index.offsets[index])
        return self.files.open(int(self.shard_of[index]))[start : start + int(self.index.sizes[index])].tobytes()

    def intact(self, index: int, data: bytes) -> bool:
        """Whether the bytes fit the packer's checksum."""
        return zlib.crc32(data) == int(self.index.checksums[index])

    def name(self, index: int) -> str:
        """Number and shard."""
        return f"record {index} in {self._where}/{self.index.names[self.shard_of[index]]}"


def open_shards(data: str, order: str, readers: int, window: int) -> ShardStore:
    """The shards that `--data` names: a folder or address with an index, that index, or a pattern of shards beside it.

    Args:
        data: folder, address or pattern.
        order: the order they are to be read in; streamed shards serve "sharded" and "sequential".
        readers: ranks that read.
        window: shards that are mixed with one another.

    Raises:
        ValueError: there is no index, shards are missing, or there are fewer shards than readers.
        OSError: an address could not be reached.
    """
    base, chosen = split_location(data)
    remote = "://" in base
    if remote:
        base = public_url(base)
        with tempfile.TemporaryDirectory(prefix="regatta-index-") as folder:
            copy = Path(folder, INDEX_NAME)
            fetch(f"{base}/{INDEX_NAME}", copy)
            text = copy.read_text(encoding="utf-8", errors="replace")
    else:
        path = Path(base, INDEX_NAME)
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; make shards with their index with tools/make_webdataset.py, which takes "
                "folders, lists and other tar shards as SOURCE"
            )
        text = path.read_text(encoding="utf-8", errors="replace")
    index = parse_index(text, f"{base}/{INDEX_NAME}")
    if chosen is not None:
        index = index.only(chosen)
    if len(index.names) < readers:
        raise ValueError(
            f"{data} has {len(index.names)} shards, fewer than the {readers} ranks that read them; "
            f"make smaller shards with tools/make_webdataset.py --shard-size-mib"
        )
    if remote and order == "global":
        raise ValueError(
            f"{data} is streamed, and the global order would need every shard at once; choose --order sharded"
        )
    files = StreamedShards(base, index, ahead=window, capacity=2 * window) if remote else LocalShards(Path(base), index)
    return ShardStore(index, files, base)


class WebDatasetPipeline(EpochPipeline):
    """Shards made by `tools/make_webdataset.py`, local or streamed.

    Raises:
        ValueError: see `open_shards`.
    """

    def __init__(self, config: PipelineConfig):
        self.store = open_shards(config.data, config.order, config.world_size, config.shard_window)
        try:
            super().__init__(config, self.store.labels, self.store.data_hash, self.store.index.samples)
            self.decoder = ViewDecoder(
                self.store,
                config.views,
                config.seed,
                self.plan.population,
                decoding_threads(config.workers),
                self.note_bad,
            )
        except BaseException:
            self.store.files.close()
            raise
        rows = self.plan.slice.batch_per_device
        self.augments_itself = augments_on_host(config, self.decoder)
        self._views = HostAugmenter(config, self.decoder, rows) if self.augments_itself else self.decoder
        dtype = config.dtype if self.augments_itself else torch.uint8
        self._buffers = HostBuffers(config.views, rows, config.device.type == "cuda", dtype=dtype)

    def deliver(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Batch]:
        """Generate the batches whose sample indices are given, in order."""
        self.store.files.plan(self._first_uses(batches))

        def work(index: np.ndarray) -> HostBatch:
            arrays = self._buffers.take()
            self._views.decode(epoch, index, arrays)
            return index, arrays

        with closing(deliver_batches(self.config, self.labels, prefetch(work, batches))) as delivered:  # type: ignore[type-var]
            yield from delivered

    def _first_uses(self, batches: list[np.ndarray]) -> list[int]:
        """The shards in the order in which these batches come to need them."""
        if not batches:
            return []
        shards = self.store.shard_of[np.concatenate(batches)]
        _, first = np.unique(shards, return_index=True)
        return shards[np.sort(first)].tolist()

    def close(self) -> None:
        """Stop workers and release buffers; may be called twice."""
        super().close()
        self.decoder.close()
        self.store.files.close()
