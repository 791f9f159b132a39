"""Reading and writing packed files in FFCV's `.beton` format, without FFCV.

Layout, all little-endian: a 24-byte header; a 1,041-byte description of each field; one metadata row a sample, its
fields laid out as an aligned C struct; zeros up to a page boundary; pages of records, no record crossing a page; and
the allocation table, one (sample, address, size) row a record, up to the end of the file. Our files hold an image
field `image` with JPEG records and an integer field `label`, -1 where there is none.

Source: the format as FFCV 1.0.2 reads it (`ffcv/types.py`, `reader.py`, `memory_allocator.py`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

FORMAT_VERSION = 2
MIN_PAGE_SIZE = 1 << 21
DEFAULT_PAGE_SIZE = 1 << 23
MAX_PAGE_SIZE = 1 << 31
MAX_SIDE = 65_500  # what libjpeg can code; the format itself stores 16 bits

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

FLOAT_FIELD, INT_FIELD, IMAGE_FIELD = 0, 1, 2
# The other field types of the format (bytes, arrays, JSON, tensors) are addressed by (pointer, size) or a pointer;
# a file with one of those is not a photo store of ours and is refused.
_FIELD_DTYPES = {FLOAT_FIELD: np.dtype("<f8"), INT_FIELD: np.dtype("<i8"), IMAGE_FIELD: IMAGE}
_MODE_JPEG = 0


def metadata_dtype(type_ids: list[int]) -> np.dtype:
    """The row of the metadata table for fields of these types; the members are called f0, f1, ..."""
    return np.dtype([("", _FIELD_DTYPES[type_id]) for type_id in type_ids], align=True)


ROW = metadata_dtype([IMAGE_FIELD, INT_FIELD])


def page_size_for(max_side_px: int) -> int:
    """A page size in bytes, a power of two, that any JPEG record of this longest side fits in.

    Four bytes a pixel are more than any quality setting needs, apart from files padded with other segments; the
    packer codes those anew.
    """
    page_size = DEFAULT_PAGE_SIZE
    while page_size < min(4 * max_side_px * max_side_px, MAX_PAGE_SIZE):
        page_size *= 2
    return page_size


class BetonReader:
    """A packed file mapped into memory: where each record lies, and its bytes.

    Attributes:
        path: the file.
        num_samples: records in the file.
        labels: (N,) int64, -1 where there is none.
        heights: (N,) int32, pixels; `widths` likewise.
        offsets: (N,) int64, byte address of each record in the file.
        sizes: (N,) int64, bytes of each record.
        pages: (N,) int64, number of the page a record lies on (address // page_size).
        page_size: bytes of a page.
        data_end: address just behind the last page.
        data: uint8 memory map of the whole file, read-only.

    Raises:
        ValueError: the file is truncated, unfinished, not a `.beton`, or holds records that are not JPEG.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder, not a packed file; pass the .beton file")
        file_bytes = self.path.stat().st_size
        if file_bytes < HEADER.itemsize:
            raise self._broken(f"it has only {file_bytes} bytes", "pack the images again")
        self.data = np.memmap(self.path, dtype=np.uint8, mode="r")
        header = self.data[: HEADER.itemsize].view(HEADER)[0]
        self._check_header(header, file_bytes)
        self.page_size = int(header["page_size"])
        self.num_samples = int(header["num_samples"])
        self.data_end = int(header["alloc_table_ptr"])
        image, labels = self._read_metadata(int(header["num_fields"]))
        self.widths, self.heights = image["width"].astype(np.int32), image["height"].astype(np.int32)
        self.labels = labels
        self.offsets = image["data_ptr"].astype(np.int64)
        self.sizes = self._read_sizes()
        self.pages = self.offsets // self.page_size

    def _broken(self, cause: str, remedy: str) -> ValueError:
        return ValueError(f"{self.path} cannot be read as a packed file: {cause}; {remedy}")

    def _check_header(self, header: np.void, file_bytes: int) -> None:
        page_size, table = int(header["page_size"]), int(header["alloc_table_ptr"])
        if int(header["version"]) != FORMAT_VERSION:
            raise self._broken(
                f"its first bytes are not those of FFCV format {FORMAT_VERSION}", "make one with make_ffcv_dataset.py"
            )
        if page_size & (page_size - 1) or not MIN_PAGE_SIZE <= page_size < 1 << 32:
            raise self._broken(f"page size {page_size} is impossible", "make one with make_ffcv_dataset.py")
        if table == 0:
            raise self._broken("its writer was interrupted", "pack the images again")
        if table > file_bytes or (file_bytes - table) % ALLOCATION.itemsize or table == file_bytes:
            raise self._broken(
                f"it is truncated ({file_bytes} bytes, its record table should start at {table})",
                "copy it again or pack the images again",
            )
        if int(header["num_samples"]) == 0:
            raise self._broken("it holds no images", "pack a source that has some")

    def _read_metadata(self, num_fields: int) -> tuple[np.ndarray, np.ndarray]:
        """The image column (dtype IMAGE) and the labels (int64)."""
        start = HEADER.itemsize + num_fields * FIELD.itemsize
        if start > self.data_end:
            raise self._broken(f"it claims {num_fields} fields", "make one with make_ffcv_dataset.py")
        fields = self.data[HEADER.itemsize : start].view(FIELD)
        type_ids = [int(type_id) for type_id in fields["type_id"]]
        if IMAGE_FIELD not in type_ids or not set(type_ids) <= set(_FIELD_DTYPES):
            raise self._broken(
                f"its fields have types {type_ids}, not an image and numbers", "make one with make_ffcv_dataset.py"
            )
        row = metadata_dtype(type_ids)
        end = start + self.num_samples * row.itemsize
        if end > self.data_end:
            raise self._broken(f"it claims {self.num_samples} images, more than it has room for", "pack it again")
        rows = self.data[start:end].view(row)
        image = rows[f"f{type_ids.index(IMAGE_FIELD)}"]
        raw = np.flatnonzero(image["mode"] != _MODE_JPEG)
        if len(raw):
            raise self._broken(
                f"image {raw[0]} and {len(raw) - 1} more are raw pixels, not JPEG", "pack the images with JPEG records"
            )
        if INT_FIELD in type_ids:
            labels = rows[f"f{type_ids.index(INT_FIELD)}"].astype(np.int64)
        else:
            labels = np.full(self.num_samples, -1, dtype=np.int64)
        return image, labels

    def _read_sizes(self) -> np.ndarray:
        # Not every address is a multiple of 8, so the table is copied before it is read as integers.
        table = np.frombuffer(self.data[self.data_end :].tobytes(), dtype=ALLOCATION)
        addresses, lengths = table["ptr"].astype(np.int64), table["size"].astype(np.int64)
        # The table is in the order of writing, which several workers of FFCV's writer may have mixed.
        order = np.argsort(addresses, kind="stable")
        addresses, lengths = addresses[order], lengths[order]
        slots = np.minimum(np.searchsorted(addresses, self.offsets), len(addresses) - 1)
        sizes = lengths[slots]
        bad = (addresses[slots] != self.offsets) | (self.offsets < 0) | (sizes < 0)
        bad |= sizes > self.data_end - self.offsets
        if bad.any():
            raise self._broken(
                f"the address of image {np.flatnonzero(bad)[0]} does not fit its record table", "pack the images again"
            )
        return sizes

    def __len__(self) -> int:
        return self.num_samples

    def record(self, index: int) -> np.ndarray:
        """The JPEG bytes of one sample: a read-only uint8 view into the memory map."""
        start = self.offsets[index]
        return self.data[start : start + self.sizes[index]]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything but the pages: what tells this file from another without reading it all."""
        digest = hashlib.sha256(self.data[: HEADER.itemsize].tobytes())
        for column in (self.labels, self.heights, self.widths, self.offsets, self.sizes):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


class BetonWriter:
    """Writes records in sample order into an open, empty binary file; the bytes depend on nothing else.

    Args:
        file: seekable and writable.
        capacity: the most samples there can be. Room for their metadata is kept in front of the pages, because how
            many of them will turn out to be good is known only at the end.
        page_size: bytes of a page, a power of two from `MIN_PAGE_SIZE`; no record may be larger.
    """

    def __init__(self, file: BinaryIO, capacity: int, page_size: int = DEFAULT_PAGE_SIZE):
        if page_size & (page_size - 1) or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page size {page_size} is not a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}")
        self._file = file
        self._capacity = capacity
        self.page_size = page_size
        self._metadata_start = HEADER.itemsize + 2 * FIELD.itemsize
        metadata_end = self._metadata_start + capacity * ROW.itemsize
        self._position = -(-metadata_end // page_size) * page_size
        self._rows = np.zeros(capacity, dtype=ROW)
        self._sizes = np.zeros(capacity, dtype=np.uint64)
        self.num_samples = 0
        self._pad_to(self._position)

    def _pad_to(self, position: int) -> None:
        gap = position - self._file.tell()
        while gap > 0:
            gap -= self._file.write(bytes(min(gap, 1 << 20)))

    def append(self, record: bytes, width: int, height: int, label: int = -1) -> None:
        """Add one JPEG record; width and height in pixels, label -1 for none.

        Raises:
            ValueError: the record is larger than a page or its size does not fit the format.
        """
        size, n = len(record), self.num_samples
        if not 0 < size <= self.page_size:
            raise ValueError(f"a record of {size} bytes does not fit a page of {self.page_size} bytes")
        if not (0 < width < 1 << 16 and 0 < height < 1 << 16):
            raise ValueError(f"an image of {width} x {height} pixels does not fit the format (sides from 1 to 65535)")
        if n >= self._capacity:
            raise ValueError(f"the file was laid out for {self._capacity} images and cannot take another")
        # FFCV reads page by page: no record may lie across a border.
        room = self.page_size - self._position % self.page_size
        if size > room:
            self._pad_to(self._position + room)
            self._position += room
        self._file.write(record)
        self._rows[n] = ((_MODE_JPEG, width, height, self._position), label)
        self._sizes[n] = size
        self._position += size
        self.num_samples = n + 1

    def finish(self) -> None:
        """Complete the file: fill the last page, write the record table, the metadata and the header."""
        n = self.num_samples
        end = -(-self._position // self.page_size) * self.page_size
        self._pad_to(end)
        table = np.zeros(n, dtype=ALLOCATION)
        # Only the good records count; their number is known now.
        table["sample_id"] = np.arange(n)
        table["ptr"] = self._rows["f0"]["data_ptr"][:n]
        table["size"] = self._sizes[:n]
        self._file.write(table.tobytes())
        fields = np.zeros(2, dtype=FIELD)
        for field, (name, type_id) in zip(fields, (("image", IMAGE_FIELD), ("label", INT_FIELD)), strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), dtype=np.uint8)
        header = np.zeros(1, dtype=HEADER)
        header[0] = (FORMAT_VERSION, len(fields), self.page_size, n, end)
        # The header comes last: a file that was not finished is not taken for one.
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + self._rows[:n].tobytes())
