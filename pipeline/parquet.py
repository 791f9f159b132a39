"""Parquet files with a column of images, as Hugging Face's datasets are published: names, labels and bytes by row.

pyarrow is asked for when the first such file is opened; nothing else here needs it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .classes import joined

MAGIC = b"PAR1"
"""The first bytes of every parquet file whose footer is not encrypted."""

_KEPT_BYTES = 1 << 30
MOST_CLASSES = 10_000_000
_BYTES = ("binary", "large_binary")
_LABELS = ("label", "labels", "fine_label", "class", "target", "category")


class ParquetImages:
    """The images of some parquet files, by number in the order of files and rows.

    An image column holds bytes, or a structure of `bytes` and `path`. A label column holds numbers (named by the
    metadata that the datasets library writes) or names.

    Args:
        files: paths.

    Attributes:
        names: what to call each image: its path in the table, or file and row.
        labels: (N,) int64, -1 where there is none.
        classes: class names by label; empty where the table has numbers only.
        groups: (G,) int64, images of each row group; what is read at a time.

    Raises:
        ValueError: pyarrow is missing, a file is no parquet file, or it has no column of images.
    """

    def __init__(self, files: Sequence[Path]):
        tables = [_Table(file) for file in files]
        self.names = [name for table in tables for name in table.names]
        self.labels, self.classes = joined([(table.labels, table.classes, str(table.path)) for table in tables])
        self._groups = [(table, number) for table in tables for number in range(len(table.sizes))]
        self.groups = np.array([size for table in tables for size in table.sizes], dtype=np.int64)
        self._ends = np.cumsum(self.groups)
        # In the order of last use. A row group is read whole, so those near by are kept.
        self._kept: OrderedDict[int, list[bytes | None]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The bytes of one image file; empty where the cell is.

        Raises:
            OSError: the file cannot be read.
        """
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[group] - self.groups[group])
        # One reader at a time: several threads want rows of one group, which would be read for each of them.
        with self._lock:
            if group not in self._kept:
                table, number = self._groups[group]
                self._kept[group] = table.images(number)
                while len(self._kept) > 1 and self._kept_bytes() > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group][row] or b""

    def _kept_bytes(self) -> int:
        return sum(len(data or b"") for group in self._kept.values() for data in group)


class _Table:
    """One file: its columns of images and labels."""

    def __init__(self, path: Path):
        parquet = _pyarrow_parquet()
        self.path = path
        try:
            self._file = parquet.ParquetFile(path)
        # pyarrow's errors are of its own types.
        except Exception as error:
            raise ValueError(f"{path} cannot be read as a parquet file: {error}; copy it again") from error
        schema = self._file.schema_arrow
        self._column = _image_column(schema, path)
        self.sizes = [self._file.metadata.row_group(n).num_rows for n in range(self._file.num_row_groups)]
        self.names = self._paths()
        self.labels, self.classes = self._read_labels(schema)

    def images(self, group: int) -> list[bytes | None]:
        """The bytes of a row group's images."""
        try:
            column = self._file.read_row_group(group, columns=[self._column]).column(0)
        except Exception as error:  # damage shows as errors of many types
            raise OSError(f"row group {group} of {self.path} cannot be read: {error}") from error
        return [cell.get("bytes") if isinstance(cell, dict) else cell for cell in column.to_pylist()]

    def _paths(self) -> list[str]:
        count = sum(self.sizes)
        fallback = [f"{self.path.name}#{row}" for row in range(count)]
        field = self._file.schema_arrow.field(self._column)
        if not _is_struct(field.type) or field.type.get_field_index("path") < 0:
            return fallback
        # A column of a structure is read alone, so the images themselves are not.
        cells = self._cells(f"{self._column}.path")
        paths = [cell.get("path") if isinstance(cell, dict) else None for cell in cells]
        return [path if path and isinstance(path, str) else other for path, other in zip(paths, fallback, strict=True)]

    def _cells(self, column: str) -> list[Any]:
        try:
            return list(self._file.read(columns=[column]).column(0).to_pylist())
        # Damage shows as errors of many types.
        except Exception as error:
            raise ValueError(f"column {column} of {self.path} cannot be read: {error}; copy the file again") from error

    def _read_labels(self, schema: Any) -> tuple[np.ndarray, tuple[str, ...]]:
        name = next((each for each in _LABELS if each in schema.names), None)
        if name is None:
            return np.full(sum(self.sizes), -1, dtype=np.int64), ()
        values = self._cells(name)
        if any(isinstance(value, str) for value in values):
            classes = tuple(sorted({value for value in values if value is not None}))
            number = {each: place for place, each in enumerate(classes)}
            return np.array([number.get(value, -1) for value in values], dtype=np.int64), classes
        numbers = [_as_number(value) for value in values]
        # Something else than classes, such as a regression target or a list of tags.
        if any(number is None for number in numbers):
            return np.full(len(values), -1, dtype=np.int64), ()
        names = _class_names(schema, name)
        self._check_labels(name, numbers, names)
        return np.array(numbers, dtype=np.int64), names

    def _check_labels(self, column: str, numbers: list[int | None], names: tuple[str, ...]) -> None:
        """Refuse numbers that cannot be classes: tables of results have a row for each number up to the highest."""
        most = len(names) - 1 if names else MOST_CLASSES
        wrong = next((number for number in numbers if number is not None and not -1 <= number <= most), None)
        if wrong is not None:
            raise ValueError(
                f"{self.path} has the label {wrong} in its column {column}; labels are 0 to {most}, and -1 for none"
            )


def _as_number(value: Any) -> int | None:
    """The class number in a cell, -1 for an empty one or NaN, None for what is no class number."""
    if value is None:
        return -1
    # Tables that held empty cells once have floats, with NaN for those.
    if isinstance(value, float):
        return -1 if value != value else int(value) if value.is_integer() else None
    return int(value) if isinstance(value, int) else None


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow, which is not installed; run: pip install pyarrow") from None
    return pyarrow.parquet


def _is_struct(kind: Any) -> bool:
    return str(kind).startswith("struct<")


def _image_column(schema: Any, path: Path) -> str:
    """The first column that holds bytes, or a structure with them."""
    for field in schema:
        if str(field.type) in _BYTES:
            return str(field.name)
        if _is_struct(field.type):
            place = field.type.get_field_index("bytes")
            if place >= 0 and str(field.type.field(place).type) in _BYTES:
                return str(field.name)
    raise ValueError(f"{path} has no column of images among {', '.join(schema.names)}; it needs one that holds bytes")


def _class_names(schema: Any, column: str) -> tuple[str, ...]:
    """The names that the datasets library keeps in a table's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    # Tables of other programs have no such entry, or another one under this name.
    except (KeyError, TypeError, ValueError):
        return ()
