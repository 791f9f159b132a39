"""The records of tar shards by number, and the opening of what `--data` names."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path

import numpy as np

from .endings import is_tar
from .fetch import fetch, member_url, public_url, shown
from .layouts import CHECK_CRC
from .parts import divided_into
from .shard_files import LocalShards, ShardFiles, StreamedShards
from .shards import INDEX_NAME, ShardIndex, expand_braces, parse_index


class ShardStore:
    """The records of a set of shards by number, with the packer's checksums."""

    def __init__(self, index: ShardIndex, files: ShardFiles, where: str):
        self.index, self.files = index, files
        self.labels, self.classes, self.data_hash = index.labels, index.classes, index.data_hash
        self.shard_of = index.shard_of()
        self._where = where

    def expect(self, batches: list[np.ndarray]) -> None:
        """Announce the batches to come, so that their shards are there in the order in which they are first needed."""
        shards = self.shard_of[np.concatenate(batches)] if batches else np.zeros(0, dtype=np.int64)
        _, first = np.unique(shards, return_index=True)
        self.files.expect(shards[np.sort(first)].tolist())

    def fill(self, jobs: np.ndarray, index: np.ndarray) -> object:
        """Addresses within the mapped shards, which the result keeps."""
        shards = self.shard_of[index]
        # Opened once for a batch, in the caller's thread: this is where a streamed shard is waited for.
        maps = {shard: self.files.open(shard) for shard in np.unique(shards).tolist()}
        bases = {shard: mapped.ctypes.data for shard, mapped in maps.items()}
        jobs["data"] = np.array([bases[shard] for shard in shards.tolist()], dtype=np.uint64) + self.index.offsets[
            index
        ].astype(np.uint64)
        jobs["size"] = self.index.sizes[index]
        jobs["flags"], jobs["crc"] = CHECK_CRC, self.index.checksums[index]
        # The mappings must live until the batch is decoded, whatever the store lets go meanwhile.
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


def split_location(data: str) -> tuple[str, list[str] | None]:
    """(folder or address of the shards, the shard names chosen or None for all of them)."""
    # A signature stays behind the path: of the index and of every shard.
    data, mark, query = data.partition("?") if data.startswith(("http://", "https://")) else (data, "", "")
    data = data.removesuffix("/" + INDEX_NAME)
    if not is_tar(data):
        return (data.rstrip("/") or "/") + mark + query, None
    paths = expand_braces(data)
    folders = {path.rpartition("/")[0] for path in paths}
    # One index describes one folder.
    if len(folders) > 1:
        raise ValueError(f"the shards of {data} lie in {len(folders)} folders; they must share one, with its index")
    return (folders.pop() or ".") + mark + query, [path.rpartition("/")[2] for path in paths]


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
        SourceClosed: there is no index behind an address, or it may not be read.
    """
    base, chosen = split_location(data)
    # The index comes first: it is small, and tells every rank the same epoch.
    remote = "://" in base
    if remote:
        base = public_url(base)
        with tempfile.TemporaryDirectory(prefix="regatta-index-") as folder:
            copy = Path(folder, INDEX_NAME)
            fetch(member_url(base, INDEX_NAME), copy)
            text = copy.read_text(encoding="utf-8", errors="replace")
    else:
        path = Path(base, INDEX_NAME)
        missing = not path.is_file()
        if missing and chosen is not None and not any(Path(base, name).is_file() for name in chosen):
            raise ValueError(f"no file matches {data}; check the folder, and the numbers and zeros in the pattern")
        parts = divided_into(Path(base)) if missing else 0
        if parts:
            raise ValueError(
                f"{path}, which tools/make_webdataset.py writes when all {parts} parts are there, does not exist; "
                "pack the parts that lack, or repeat the command of one, which then packs nothing again"
            )
        if missing:
            raise ValueError(
                f"{path} does not exist; make shards with their index with tools/make_webdataset.py, which takes "
                "folders, lists and other tar shards as SOURCE"
            )
        text = path.read_text(encoding="utf-8", errors="replace")
    index = parse_index(text, shown(member_url(base, INDEX_NAME)))
    if chosen is not None:
        index = index.only(chosen)
    if len(index.names) < readers:
        raise ValueError(
            f"{data} has {len(index.names)} shards, fewer than the {readers} ranks that read them; "
            f"make smaller shards with tools/make_webdataset.py --shard-size-mib"
        )
    # A sample could come from any shard at any time.
    if remote and order == "global":
        raise ValueError(
            f"{data} is streamed, and the global order would need every shard at once; choose --order sharded"
        )
    # Two windows: the one in use and the one that is being fetched.
    files = StreamedShards(base, index, ahead=window, capacity=2 * window) if remote else LocalShards(Path(base), index)
    return ShardStore(index, files, shown(base))
