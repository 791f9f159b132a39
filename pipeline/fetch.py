"""Files behind an address, copied into local ones: over HTTP, or through fsspec where an address needs that.

Servers of large data sets answer 429 or 503 when they are asked too often, redirect to other hosts, expect a signature
in the address, and pause. What they ask for is done, within a stated time (`PATIENCE_S`); what has arrived is kept and
the rest is asked for.
"""

from __future__ import annotations

import email.utils
import errno
import http.client
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, TypeVar

from .atomic import replacing
from .refusal import SourceBusy, SourceClosed
from .remote import copy_remote, described, needs_fsspec

T = TypeVar("T")

PATIENCE_S = float(os.environ.get("REGATTA_HTTP_PATIENCE", 900))
"""Seconds that a file is waited for; after them `SourceBusy` ends the command, which can be started again later."""
HEADERS = "REGATTA_HTTP_HEADERS"
"""Environment variable with headers for every request, one `Name: value` a line. No flag: those are recorded."""

_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.8
_TIMEOUT_S = 30
_PIECE = 1 << 20
_SCHEMES = ("http", "https", "s3", "gs", "hf")
_CLOSED = (401, 403, 404, 410)
_BUSY = (429, 503)
_OWN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_not_before: dict[str, float] = {}  # host -> time before which it does not want to be asked
_stopping = False


def stop_waiting(stop: bool = True) -> None:
    """Let waits for busy servers end at once with `SourceBusy`, for signal handlers; False lets them wait again."""
    global _stopping
    _stopping = stop


def is_stopping() -> bool:
    """Whether `stop_waiting` has been called."""
    return _stopping


def public_url(address: str) -> str:
    """The http(s) address of what users write as s3://, gs:// or hf:// (public objects; a signed https works as it is).

    Addresses that fsspec reads with the user's own credentials are left as they are.

    Raises:
        ValueError: another kind of address.
    """
    scheme, _, rest = address.partition("://")
    if scheme in ("http", "https") or needs_fsspec(address):
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
        " or copy the files to a local folder"
    )


def member_url(base: str, name: str) -> str:
    """The address of a file in a folder with an address; a query of the folder, as a signature, goes with the file."""
    if not base.startswith(("http://", "https://")):
        return f"{base.rstrip('/')}/{name}"
    parts = urllib.parse.urlsplit(base)
    return urllib.parse.urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{urllib.parse.quote(name)}"))


def shown(url: str) -> str:
    """An address for a message: a query may hold a signature, which does not belong into logs."""
    return url.partition("?")[0] + ("?…" if "?" in url else "")


def fetch(url: str, into: Path, expected_bytes: int | None = None, persistent: bool = False) -> None:
    """Copy an address into a file, which appears under its name when it is whole.

    Args:
        url: http(s), or what `remote.needs_fsspec` says.
        into: the file.
        expected_bytes: its size, where that is known.
        persistent: wait out failures of the network as well as a busy server. For a server that has answered before; a
            mistyped name shall be told at once.

    Raises:
        SourceClosed: it does not exist, may not be read, or has another size than expected.
        SourceBusy: it did not arrive in time.
        OSError: the host cannot be reached, without `persistent`; or the file cannot be written.
    """
    # Fetched files can be fetched again, so nothing waits for the disk.
    with replacing(into, durable=False) as partial, open(partial, "wb") as file:
        fetch_rest(url, file, expected_bytes, persistent)


def fetch_rest(url: str, file: BinaryIO, expected_bytes: int | None = None, persistent: bool = False) -> None:
    """Append to an open file, which stands at its end, what it lacks of an address; arguments and errors as `fetch`."""
    _until_done(url, persistent, lambda: _receive(url, file, expected_bytes), file.tell)


@dataclass(frozen=True)
class Remote:
    """What is known of a file behind an address without fetching it.

    Attributes:
        size: its bytes; -1 where the server does not say.
        version: text that changes with its content; empty where the server gives none.
        head: its first bytes.
    """

    size: int
    version: str
    head: bytes


def ask(url: str, head_bytes: int) -> Remote:
    """Size, version and first bytes of a file behind an address.

    Raises:
        SourceClosed, SourceBusy, OSError: as `fetch`, without `persistent`.
    """
    if needs_fsspec(url):
        return _until_done(url, False, lambda: Remote(*described(url, head_bytes)), lambda: 0)
    return _until_done(url, False, lambda: _ask_http(url, head_bytes), lambda: 0)


def _until_done(url: str, persistent: bool, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
    """The result of the first attempt that succeeds; `progress` grows while bytes arrive, and errors are as `fetch`."""
    waiting = _Waiting(url, persistent)
    while True:
        waiting.for_host()
        arrived = progress()
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            if error.code in _CLOSED:
                raise _closed(url, error) from error
            waiting.after(error, busy=error.code in _BUSY, asked_s=_retry_after(error.headers.get("Retry-After")))
        except (OSError, http.client.HTTPException) as error:
            # A full disk does not get better by asking the server again, nor does a signal's request to stop.
            if getattr(error, "errno", None) in _OWN_DISK or isinstance(error, SourceBusy):
                raise
            if progress() > arrived:
                waiting.attempts = 0  # it comes, only slowly
            waiting.after(error)


def _closed(url: str, error: urllib.error.HTTPError) -> SourceClosed:
    index = ", and make shards with tools/make_webdataset.py, which writes their index"
    is_index = urllib.parse.urlsplit(url).path.endswith("/index.json")
    return SourceClosed(
        f"{shown(url)} cannot be read (HTTP {error.code} {error.reason}); check the address, make it public or sign it "
        f"(or set headers in {HEADERS}){index if is_index else ''}"
    )


class _Waiting:
    """How long one file has been waited for, and whether to go on.

    Attributes:
        attempts: since something arrived last.
    """

    def __init__(self, url: str, persistent: bool):
        self._url, self._persistent = url, persistent
        self._host = urllib.parse.urlsplit(url).netloc
        self._started = time.monotonic()
        self.attempts = 0

    def for_host(self) -> None:
        """Wait until the host may be asked again: one answer of "too many requests" is meant for all threads."""
        while (pause := _not_before.get(self._host, 0) - time.monotonic()) > 0:
            self._sleep(pause, "its host asked to wait")

    def after(self, problem: Exception, busy: bool = False, asked_s: float | None = None) -> None:
        """Wait after a failure.

        Args:
            problem: what failed.
            busy: the server says that it is.
            asked_s: seconds that it asks to be left alone.

        Raises:
            SourceBusy: enough was tried.
        """
        self.attempts += 1
        # 0.8, 3.2 and 12.8 seconds, then every 30: servers that refuse for being busy want a growing pause.
        pause = min(_FIRST_PAUSE_S * 4 ** min(self.attempts - 1, 9), 30.0) if asked_s is None else asked_s
        wrong_size = isinstance(problem, _WrongSize)
        patient = busy or (self._persistent and not wrong_size)
        if not patient and self.attempts >= _ATTEMPTS:
            # Whoever starts the same command again meets the same: a wrong index or a mistyped name does not pass.
            kind = SourceClosed if wrong_size else OSError
            raise kind(
                f"{shown(self._url)} could not be fetched in {self.attempts} attempts: {problem}; check the network "
                "and the server"
            )
        if patient and time.monotonic() - self._started + pause > PATIENCE_S:
            raise SourceBusy(
                f"{shown(self._url)} could not be fetched: {problem}; the next attempt would come after more than the "
                f"{PATIENCE_S:g} s that REGATTA_HTTP_PATIENCE allows; start the same command again later"
            )
        if busy and asked_s is not None:
            _not_before[self._host] = time.monotonic() + pause
        self._sleep(pause, str(problem))

    def _sleep(self, seconds: float, reason: str) -> None:
        until = time.monotonic() + seconds
        if seconds >= 5:
            print(f"waits {seconds:.0f} s for {shown(self._url)}: {reason}", file=sys.stderr)
        # In slices, so that a signal's request to stop is seen within its grace period.
        while (left := until - time.monotonic()) > 0:
            if _stopping:
                raise SourceBusy(f"stopped while {shown(self._url)} was waited for ({reason})")
            time.sleep(min(left, 0.25))


def _retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None without one."""
    if not text:
        return None
    try:
        return max(float(text), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


class _WrongSize(OSError):
    """A whole answer of another length than the index says."""


class _SameHostHeaders(urllib.request.HTTPRedirectHandler):
    """Redirects without the user's own headers where they lead to another host.

    Stores redirect to signed addresses, which refuse a second authorization, and a key is meant for one host.
    """

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The next request; see the base class."""
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and following.host != req.host:
            for name in _own_headers():
                following.remove_header(name.capitalize())
        return following


_opener = urllib.request.build_opener(_SameHostHeaders)


def _own_headers() -> dict[str, str]:
    lines = os.environ.get(HEADERS, "").splitlines()
    pairs = (line.partition(":") for line in lines if line.strip())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _receive(url: str, file: BinaryIO, expected_bytes: int | None) -> None:
    """Append to a file what it lacks of an address."""
    if needs_fsspec(url):
        copy_remote(url, file)
    else:
        _receive_http(url, file)
    size = file.tell()
    if expected_bytes is not None and size != expected_bytes:
        # What is there cannot be the beginning of what is wanted.
        file.seek(0)
        file.truncate()
        raise _WrongSize(f"it has {size} bytes, the index says {expected_bytes}")


def _receive_http(url: str, file: BinaryIO) -> None:
    have = file.tell()
    with _opened(url, f"bytes={have}-" if have else None) as answer:
        # A server that knows no ranges sends the whole file.
        if have and answer.status != 206:
            file.seek(0)
            file.truncate()
        start, promised = file.tell(), answer.headers.get("Content-Length")
        while piece := answer.read(_PIECE):
            file.write(piece)
        # A connection that is cut can look like the end of the file.
        if promised is not None and file.tell() - start < int(promised):
            raise OSError(f"the connection ended after {file.tell()} bytes")


def _opened(url: str, piece: str | None) -> http.client.HTTPResponse:
    """The answer to a request for an address, or for a range of its bytes."""
    # Some servers refuse Python's own name.
    request = urllib.request.Request(url, headers={"User-Agent": "regatta", **_own_headers()})
    if piece:
        request.add_header("Range", piece)
    answer: http.client.HTTPResponse = _opener.open(request, timeout=_TIMEOUT_S)
    return answer


def _ask_http(url: str, head_bytes: int) -> Remote:
    # No HEAD request: a signature is often good for GET alone. What is not read of a longer answer is not sent.
    with _opened(url, f"bytes=0-{head_bytes - 1}") as answer:
        headers = answer.headers
        # "bytes 0-23/5000", where the server knows ranges.
        whole = headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else ""
        told = whole or headers.get("Content-Length", "")
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        size, head = int(told) if told.isdecimal() else -1, answer.read(head_bytes)
        if len(head) < min(head_bytes, size):
            raise OSError(f"the connection ended after {len(head)} bytes")
        return Remote(size, version, head)
