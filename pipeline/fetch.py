"""Files behind an address, copied over HTTP."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from .atomic import replacing

_ATTEMPTS = 4
_TIMEOUT_S = 30
_PIECE = 1 << 20
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
    # Public objects have plain addresses, so no client library and no credentials are needed.
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


def fetch(url: str, into: Path, expected_bytes: int | None = None) -> None:
    """Copy an address into a file, which appears under its name when it is whole.

    Raises:
        ValueError: it does not exist or may not be read.
        OSError: it could not be fetched after several attempts, or has another size than expected.
    """
    problem: Exception = OSError("nothing was tried")
    for attempt in range(_ATTEMPTS):
        # Servers that refuse for being busy want a growing pause: 0.8, 3.2 and 12.8 seconds.
        if attempt:
            time.sleep(0.2 * 4**attempt)
        try:
            _fetch_once(url, into, expected_bytes)
            return
        except urllib.error.HTTPError as error:
            # Asking again cannot help where the address is wrong or closed; every other answer may be a passing one.
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
    # Fetched files can be fetched again, so nothing waits for the disk.
    with replacing(into, durable=False) as partial:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, open(partial, "wb") as file:
            while piece := answer.read(_PIECE):
                file.write(piece)
            size = file.tell()
        # A connection that is cut can look like the end of the file.
        if expected_bytes is not None and size != expected_bytes:
            raise OSError(f"it has {size} bytes, the index says {expected_bytes}")
