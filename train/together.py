"""Ranks end together: what ends or stops one rank ends the others within a time limit, with the culprit's name.

A rank that leaves on its own (bad data that only it met, no memory, a full disk under rank 0) would leave the others
waiting in their next exchange: with NCCL for ten minutes, and then without a reason. Here it first leaves its last
words in the store through which the ranks have met. A thread of every rank looks there twice a second, tells that its
rank is alive and where it is, and ends its process where the main thread has made no progress for `--hang-timeout`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from .errors import EXIT_HUNG, RunEnd, text_and_code
from .say_once import say_once

_WORDS, _HEARD, _ALIVE = "regatta/last_words", "regatta/heard", "regatta/alive"
_POLL_S = 0.5
_LINGER_S = 10.0
"""How long a rank that leaves waits until the others have heard it: with it the store may go."""
_SPEAKS_S = 1.0
"""How long a rank that has heard lets the one that has left say it itself."""
_GRACE_S = 5.0
"""How long a rank that has heard may take to end in order, before it is ended where it stands."""
_STORE_LIMIT_S = 5.0
"""A store that has not answered for so long has gone with its process, or stands still with it."""


@dataclass(frozen=True)
class Words:
    """What a rank said before it left: its number, its message in one line, its exit code."""

    rank: int
    text: str
    code: int

    def __str__(self) -> str:
        return f"rank {self.rank} ended the run: {self.text}"

    @property
    def line(self) -> str:
        """What the rank itself prints, where it prints one line."""
        return f"regatta: {self.text}"


@dataclass(frozen=True)
class Sign:
    """What a rank last told of itself: how often it has told, where its main thread is and since how many seconds."""

    count: int
    place: str
    age_s: float


class Together:
    """Watches over one rank and listens to the others.

    Args:
        store: a `torch.distributed` store that all ranks share; None where there is one process.
        rank: this process.
        world_size: number of processes.
        limit_s: seconds without progress after which the job ends; 0 for no limit.
        leave: called with the exit code to end this process at once; another one in tests.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, limit_s: float, leave: Callable[[int], Any] = os._exit
    ) -> None:
        self.rank, self._world_size, self._limit_s, self._leave = rank, world_size, limit_s, leave
        self._store = _own_connection(store)
        self._mark: tuple[str, float] | None = None
        self._said: Words | None = None
        self._closing, self._lock, self._has_heard = threading.Event(), threading.Lock(), False
        self._threads = [threading.Thread(target=self._watch, name="hang-watch", daemon=True)]
        if store is not None:
            # A connection and a thread of its own: a store that stands still must not keep the clock from ending us.
            listen = threading.Thread(target=self._listen, args=(_own_connection(store),), name="ranks", daemon=True)
            self._threads.append(listen)
        for thread in self._threads:
            thread.start()

    def at(self, place: str) -> None:
        """Note that the main thread has made progress, and where it is now; costs no exchange.

        The limit holds from the first note on: what opens data before the first step may take as long as it likes.
        """
        self._mark = (place, time.monotonic())

    def end(self, reason: BaseException) -> None:
        """Called by a rank that ends with `reason`: tells the others, or takes over what ended another rank before.

        Raises:
            RunEnd: with the words and exit code of the rank that was first, where this one only lost its connection.
        """
        # Who ends makes no progress any more, and its reason must not lose to the clock while the others hear it.
        self._mark = None
        if self._store is None:
            return
        said = self._say(Words(self.rank, *_told(reason)), reason)
        if said is not None and said.rank != self.rank and not isinstance(reason, RunEnd):
            raise RunEnd(str(said), said.code, repeats=said.line) from None

    def close(self) -> None:
        """Stop watching; what another rank says from now on does not end this one."""
        self._closing.set()

    def _say(self, own: Words, reason: BaseException) -> Words | None:
        """Leave words unless another rank came first; whose words stand, None where the store has gone."""
        # Whoever spoke waits only until it is heard; by now the store may have gone with it.
        if self._said is not None and self._said.rank != self.rank:
            return self._said
        if _lost_connection(reason):
            gone = self._gone()
            if gone:
                own = Words(gone[0], "it has gone without a word; was it killed?", 1)
        try:
            said = _parse(self._store.compare_set(_WORDS, "", json.dumps([own.rank, own.text, own.code])))
            self._hear(self._store)
            if said == own:
                self._wait_until_heard()
        except RuntimeError:  # the store's host has left
            return own if own.rank != self.rank else None
        return said

    def _gone(self) -> list[int]:
        """Ranks that have told nothing for some seconds; rank 0 where the store does not answer, which it keeps."""
        before = self._signs()
        time.sleep(4 * _POLL_S)
        after = self._signs()
        if before is None or after is None:
            return [0]
        then, now = ({rank: sign.count for rank, sign in signs.items()} for signs in (before, after))
        # One that has never told anything died in its first moments: all have met before any of them tells.
        return [rank for rank in range(self._world_size) if rank != self.rank and then.get(rank) == now.get(rank)]

    def _signs(self) -> dict[int, Sign] | None:
        """What each rank last told; None where the store does not answer."""
        signs: dict[int, Sign] = {}

        def ask() -> None:
            for rank in range(self._world_size):
                key = f"{_ALIVE}/{rank}"
                if self._store.check([key]):
                    signs[rank] = Sign(*json.loads(self._store.get(key)))
            signs[-1] = Sign(0, "asked all", 0.0)

        # In a thread, because the store of a process that was stopped keeps whoever asks it waiting for good.
        asking = threading.Thread(target=_quietly, args=(ask,), daemon=True)
        asking.start()
        asking.join(_STORE_LIMIT_S)
        return signs if signs.pop(-1, None) is not None else None

    def _hear(self, store: Any) -> None:
        with self._lock:
            if not self._has_heard:
                store.add(_HEARD, 1)
                self._has_heard = True

    def _wait_until_heard(self) -> None:
        deadline = time.monotonic() + _LINGER_S
        while self._store.add(_HEARD, 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(_POLL_S / 5)

    def _listen(self, store: Any) -> None:
        count = 0
        while not self._closing.wait(_POLL_S):
            place, since = self._mark or ("starts", time.monotonic())
            count += 1
            try:
                store.set(f"{_ALIVE}/{self.rank}", json.dumps([count, place, time.monotonic() - since]))
                if not store.check([_WORDS]):
                    continue
                self._said = said = _parse(store.get(_WORDS))
                self._hear(store)
            except RuntimeError:
                continue  # gone with its process, in order or not: the main thread's next exchange or the clock decides
            if said.rank != self.rank and not self._closing.wait(_SPEAKS_S):
                # Now, while the rank that said it is still there and keeps this one from saying it again.
                say_once(f"regatta: {said}", said.line, leaves=False)
                if not self._closing.wait(_GRACE_S - _SPEAKS_S):
                    # The main thread waits in an exchange that will never come and cannot be interrupted there.
                    self._leave(said.code)
            return

    def _watch(self) -> None:
        while self._limit_s and not self._closing.wait(_POLL_S):
            if self._mark is None:
                continue
            place, since = self._mark
            waited = time.monotonic() - since
            if waited > self._limit_s:
                culprit = self._culprit(place)
                self._leave_now(f"no progress for {waited:.0f} s (--hang-timeout {self._limit_s:g}): {culprit}")
                return

    def _culprit(self, place: str) -> str:
        """Who keeps the job waiting: a rank that tells nothing any more, else the one that waits for no other."""
        own = f"rank {self.rank} {place}"
        if self._store is None:
            return own
        gone = self._gone()
        if gone:
            return f"rank {gone[0]} gives no sign of life, is it stopped or its machine gone? {own}"
        signs = self._signs() or {}
        alone = {rank: sign for rank, sign in signs.items() if not sign.place.startswith("takes step")}
        return (
            "; ".join(f"rank {rank} {sign.place} for {sign.age_s:.0f} s" for rank, sign in (alone or signs).items())
            or own
        )

    def _leave_now(self, text: str) -> None:
        say_once(f"regatta: {' '.join(text.split())}")
        self._leave(EXIT_HUNG)


def _quietly(action: Callable[[], None]) -> None:
    try:
        action()
    except RuntimeError:
        pass  # whoever asked sees that there is no answer


def _own_connection(store: Any) -> Any:
    if store is None:
        return None
    own = store.clone()
    own.set_timeout(timedelta(seconds=_STORE_LIMIT_S))
    return own


def _lost_connection(reason: BaseException) -> bool:
    """Whether this is what an exchange raises when another rank has gone, and no fault of this one."""
    return isinstance(reason, RuntimeError) and not isinstance(reason, RunEnd)


def _parse(said: bytes) -> Words:
    return Words(*json.loads(said))


def _told(reason: BaseException) -> tuple[str, int]:
    """The text and the exit code that a process ends with for this reason."""
    told = text_and_code(reason) if isinstance(reason, Exception) else None
    return told or (f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}", 1)
