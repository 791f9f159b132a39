"""Addresses that need more than HTTP: object stores with the credentials that people have set up, through fsspec."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any, BinaryIO

from .refusal import SourceClosed

# fsspec's packages by scheme; without the package public objects of the first two are still read over HTTP.
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hdfs": "pyarrow",
    "sftp": "paramiko",
    "webhdfs": "requests",
    "memory": "fsspec",
}


def needs_fsspec(address: str) -> bool:
    """Whether fsspec is to read an address: it is of a scheme of its own, and the package for it is installed."""
    package = _PACKAGES.get(address.partition("://")[0])
    if package is None or "://" not in address:
        return False
    return importlib.util.find_spec("fsspec") is not None and importlib.util.find_spec(package) is not None


def copy_remote(address: str, file: BinaryIO) -> None:
    """Append to a file, which stands at its end, what it lacks of the bytes behind an address.

    Raises:
        SourceClosed, OSError: as `opened`.
    """
    with opened(address) as source:
        if file.tell():
            source.seek(file.tell())
        shutil.copyfileobj(source, file, 1 << 20)


def described(address: str, head_bytes: int) -> tuple[int, str, bytes]:
    """Size in bytes, a text that changes with the content, and the first bytes of a file behind an address.

    Raises:
        SourceClosed, OSError: as `opened`.
    """
    with opened(address) as source:
        return int(source.size), str(source.fs.ukey(source.path)), source.read(head_bytes)


def listed(address: str) -> list[str]:
    """Paths of all files below a folder with an address, relative to it.

    Raises:
        SourceClosed, OSError: as `opened`.
    """
    import fsspec

    try:
        store, root = fsspec.core.url_to_fs(address)
        return [str(path)[len(root) :].lstrip("/") for path in store.find(root)]
    except FileNotFoundError as error:
        raise SourceClosed(f"{address} is not there ({error}); check the address") from error
    except OSError:
        raise
    except Exception as error:  # as in `opened`
        raise OSError(f"{type(error).__name__}: {error}") from error


def opened(address: str) -> Any:
    """A binary file behind an address, for reading; close it.

    Raises:
        SourceClosed: it is not there or may not be read.
        OSError: the network failed.
    """
    import fsspec

    try:
        return fsspec.open(address, "rb").open()
    except (FileNotFoundError, PermissionError) as error:
        raise SourceClosed(
            f"{address} is not there or may not be read ({error}); check the address and this machine's credentials"
        ) from error
    except OSError:
        raise
    # The stores' clients raise types of their own for credentials and names.
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
