"""Processes that a launcher starts again, at different moments on different machines, meet those of the same start."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from train.errors import EXIT_HUNG, RunEnd
from train.meeting import join
from train.restarts import Start, leaving_if_another_starts_again, may_restart, meet


@pytest.fixture
def store() -> Iterator[TCPStore]:
    """What a launcher keeps while its processes come and go."""
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def starts(store: TCPStore, *ranks: int, limit_s: float = 10.0) -> Callable[[], dict[int, Start]]:
    """Processes of a world of two that start now, each with a connection of its own; call the result to wait."""
    found: dict[int, Start] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: found.update({rank: meet(store.clone(), rank, 2, limit_s)}))
        for rank in ranks
    ]
    for thread in threads:
        thread.start()

    def join() -> dict[int, Start]:
        for thread in threads:
            thread.join(15)
        return found

    return join


def meets(first: Start, second: Start) -> bool:
    """Whether a word of the one is heard by the other."""
    first.store.set("word", first.marks[0])
    return second.store.check(["word"]) and second.store.get("word").decode() == first.marks[0]


def test_each_start_has_a_store_of_its_own(store: TCPStore) -> None:
    once, again = starts(store, 0, 1)(), starts(store, 1, 0)()
    assert meets(once[0], once[1]) and meets(again[0], again[1])
    once[0].store.set("last words", "old")
    assert not again[1].store.check(["last words"])


@pytest.mark.parametrize("first", [0, 1])
def test_a_process_waits_for_one_that_has_not_left_its_old_start_yet(store: TCPStore, first: int) -> None:
    """The launcher of one machine starts its process again while the other machine's still runs."""
    old = starts(store, 0, 1)()
    early = starts(store, first)
    time.sleep(0.4)
    late = starts(store, 1 - first)
    found = {**early(), **late()}
    assert found[0].marks == found[1].marks and not set(found[0].marks) & set(old[0].marks)
    assert meets(found[0], found[1])


def test_a_rank_that_dies_twice_before_the_other_comes_leaves_no_wrong_mark(store: TCPStore) -> None:
    starts(store, 0, 1)()
    store.set("regatta/mark/1", "died before the other came")
    found = starts(store, 1)
    time.sleep(0.2)
    both = {**starts(store, 0)(), **found()}
    assert meets(both[0], both[1]) and "died before the other came" not in both[0].marks


def test_who_has_not_come_is_named(store: TCPStore) -> None:
    for absent, rank in ((1, 0), (0, 1)):
        with pytest.raises(RunEnd, match=rf"rank {absent} has not started within 0 s") as ended:
            meet(store, rank, 2, limit_s=0.3)
        assert ended.value.code == EXIT_HUNG


def test_a_started_again_process_waits_as_long_as_the_run_may_stand_still(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    with pytest.raises(RunEnd, match="rank 0 has not started within 1 s") as ended:
        join("gloo", 1, 2, timedelta(seconds=1))
    assert ended.value.code == EXIT_HUNG


def test_a_process_that_waits_in_vain_for_one_started_again_leaves(store: TCPStore, capfd) -> None:
    found = starts(store, 0, 1)()
    codes: list[int] = []
    with leaving_if_another_starts_again(store, 0, found[0], codes.append):
        time.sleep(0.7)
        assert not codes
        with pytest.raises(RunEnd):
            meet(store.clone(), 1, 2, limit_s=0.1)
        time.sleep(0.7)
    assert codes == [1]
    assert "rank 1 was started again while all were meeting, so rank 0 starts again too" in capfd.readouterr().err


def test_only_a_launcher_that_may_start_again_asks_for_it() -> None:
    assert not may_restart({}) and not may_restart({"TORCHELASTIC_MAX_RESTARTS": "0"})
    assert may_restart({"TORCHELASTIC_MAX_RESTARTS": "3"})
