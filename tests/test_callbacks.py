"""Callbacks are told what the rows say; loggers are callbacks, go on in the same external run, and end no run."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.callbacks
import train.main
import train.record.live
import train.record.loggers
from tests.test_rehearsal import FLAGS
from tools.wheel.functions import train as regatta_train
from train.callbacks import Callback, Listeners, Started, made
from train.errors import Stopped, UserMistake
from train.record.live import LivePage
from train.record.loggers import LOGGERS, NOTE, Background, Logger, numbers
from train.record.metrics import Metrics

RUN = [*FLAGS[: FLAGS.index("--log-every")], *"--data 64 --log-every 2 --checkpoint-every 4 --knn-every 1".split()]
RUN += ["--max-steps", "6"]


class Recorder(Callback):
    """Writes down every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_start(self, run: Started) -> None:
        self.calls.append(("start", run))

    def on_row(self, row: dict[str, Any]) -> None:
        self.calls.append(("row", dict(row)))
        super().on_row(row)

    def on_step(self, row: dict[str, Any]) -> None:
        self.calls.append(("step", row["step"]))

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self.calls.append(("evaluation", row["step"]))

    def on_checkpoint(self, row: dict[str, Any]) -> None:
        self.calls.append(("checkpoint", row["path"]))

    def on_end(self, outcome: str) -> None:
        self.calls.append(("end", outcome))

    def of(self, name: str) -> list[Any]:
        return [value for call, value in self.calls if call == name]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_callbacks_are_told_what_the_rows_say(tmp_path: Path) -> None:
    recorder = Recorder()
    assert train.main.run([*RUN, "--run-dir", str(tmp_path)], [recorder]) == 0
    assert recorder.of("row") == rows(tmp_path)
    assert recorder.of("step") == [2, 4, 6] and recorder.of("evaluation") == [0, 4, 6]
    assert recorder.of("checkpoint") == ["step_00000004", "step_00000006"]
    (started,) = recorder.of("start")
    assert (started.run_dir, started.first_step, started.last_step, started.steps_per_epoch) == (tmp_path, 0, 6, 4)
    assert started.config["run"]["method"] == "moco-v2" and started.config["world_size"] == 1
    assert recorder.calls[0][0] == "start" and recorder.calls[-1] == ("end", "done")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (shown,) = board.Tensors("config/text_summary")
    assert (
        '"method": "moco-v2"' in shown.tensor_proto.string_val[0].decode() and "train/loss" in board.Tags()["scalars"]
    )


def test_a_callback_may_stop_the_run_and_is_told_that_it_goes_on(tmp_path: Path) -> None:
    class StopsAtTwo(Recorder):
        def on_step(self, row: dict[str, Any]) -> None:
            if row["step"] == 2:
                signal.raise_signal(signal.SIGTERM)

    stops, goes_on = StopsAtTwo(), Recorder()
    with pytest.raises(Stopped, match="after step 2, saved"):
        train.main.run([*RUN, "--run-dir", str(tmp_path)], [stops])
    assert stops.of("end") == ["stopped"]
    assert train.main.run([*RUN, "--run-dir", str(tmp_path)], [goes_on]) == 0
    assert goes_on.of("start")[0].first_step == 2 and goes_on.of("step") == [4, 6]


def test_one_that_raises_is_left_out_and_the_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Breaks(Recorder):
        def on_step(self, row: dict[str, Any]) -> None:
            row.clear()  # its own copy
            raise KeyError("mine")

    breaks, other = Breaks(), Recorder()
    assert train.main.run([*RUN, "--run-dir", str(tmp_path)], [breaks, other]) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert line == "regatta: Breaks failed in on_row and is left out from here on: KeyError: 'mine'"
    assert breaks.of("end") == [] and other.of("step") == [2, 4, 6] and other.of("row") == rows(tmp_path)


MODULE = """
from train.callbacks import Callback
class Mine(Callback):
    def on_end(self, outcome):
        open("ended", "w").write(outcome)
nothing = dict
"""


def test_callbacks_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_callbacks_here.py").write_text(MODULE)
    flags = [*RUN, "--run-dir", str(tmp_path / "run"), "--callbacks"]
    assert train.main.main([*flags, "own_callbacks_here:Mine"]) == 0
    assert (tmp_path / "ended").read_text() == "done"
    for text, said in {
        "own_callbacks_here": "write module:factory",
        "no_such_module:x": "No module named 'no_such_module'",
        "own_callbacks_here:Other": "has no attribute 'Other'",
        "own_callbacks_here:nothing": "gives a dict; give a class that is derived from regatta.Callback",
    }.items():
        with pytest.raises(UserMistake, match=said):
            made([text])


def test_callbacks_do_not_reach_other_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--callbacks module:factory"):
        regatta_train(data="64", out=tmp_path, method="moco-v2", processes=2, callbacks=[Recorder()])


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train.callbacks.importlib.util, "find_spec", lambda name: None)
    assert train.main.main(["--method", "moco-v2", "--data", "photos", "--log", "mlflow,wandb"]) == 2
    said = capsys.readouterr().err
    assert said == "regatta: --log mlflow: the package mlflow is not installed; pip install mlflow\n"
    assert train.main.main(["--method", "moco-v2", "--data", "photos", "--log", "neptune"]) == 2
    assert "--log neptune: choose from wandb, mlflow, trackio" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Loggers


class Service(Logger):
    """A logger that keeps what it is sent."""

    name = "service"
    runs: dict[str, list[tuple[int, dict[str, float]]]] = {}

    def open(self, run: Started, identity: str | None) -> str:
        self.identity = identity or f"run-{len(self.runs)}"
        self.runs.setdefault(self.identity, [])
        return self.identity

    def send(self, figures: dict[str, float], step: int) -> None:
        self.runs[self.identity].append((step, figures))

    def close(self, outcome: str) -> None:
        self.runs[self.identity].append((-1, {outcome: 1.0}))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> type[Service]:
    monkeypatch.setattr(Service, "runs", {})
    return Service


def test_a_killed_run_goes_on_in_the_same_external_run(tmp_path: Path, service: type[Service]) -> None:
    def begin(keep_bytes: int, first_step: int) -> Metrics:
        metrics = Metrics(tmp_path, 100, keep_bytes, first_step, callbacks=[service()])
        metrics.start({})
        return metrics

    def take(metrics: Metrics, steps: range) -> None:
        for step in steps:
            metrics.row("train", step, 0, loss=1.0 / step, images_per_s=1.0)

    first = begin(0, 0)
    take(first, range(1, 4))
    saved = first.position()
    take(first, range(4, 9))  # and killed here: nothing is closed
    again = begin(saved, 3)
    take(again, range(4, 6))  # killed earlier than the first time
    third = begin(saved, 3)
    take(third, range(4, 11))
    third.row("knn", 10, 1, top1=0.5, source="x")
    third.close("stopped")
    (sent,) = service.runs.values()
    assert [step for step, _ in sent] == [*range(1, 11), 10, -1]
    assert sent[-2][1] == {"knn/epoch": 1, "knn/top1": 0.5} and sent[-1][1] == {"stopped": 1.0}
    assert json.loads((tmp_path / NOTE).read_text()) == {"service": {"id": "run-0", "told": {"train": 8}}}
    begin(0, 0)
    assert list(service.runs) == ["run-0", "run-1"], "a run that starts over is another one"


def test_the_rows_of_the_folder_are_what_a_logger_gets(
    tmp_path: Path, service: type[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGERS, "trackio", service)
    monkeypatch.setattr(train.main, "check_loggers", lambda names: None)
    assert train.main.main([*RUN, "--run-dir", str(tmp_path), "--log", "trackio"]) == 0
    (sent,) = service.runs.values()
    assert sent[:-1] == [(row["step"], numbers(row)) for row in rows(tmp_path)]
    assert any("train/loss/ins" in figures for _, figures in sent)


def test_a_slow_service_holds_no_row_up(
    tmp_path: Path, service: type[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = service.send
    monkeypatch.setattr(service, "send", lambda *arguments: (time.sleep(0.05), send(*arguments)))
    listeners = Listeners([Background(service())])
    listeners.start(Started(tmp_path, {}, 0, 10, 10))
    begun = time.monotonic()
    for step in range(10):
        listeners.row({"kind": "train", "step": step, "loss": 1.0})
    assert time.monotonic() - begun < 0.2
    listeners.end("done")
    (sent,) = service.runs.values()
    assert [step for step, _ in sent] == [*range(10), -1], "the end waits for them"


def test_a_service_that_fails_or_hangs_ends_no_run(
    tmp_path: Path, service: type[Service], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise ConnectionError("server gone\nfor good")

    monkeypatch.setattr(service, "send", fails)
    listeners = Listeners([Background(service())])
    listeners.start(Started(tmp_path, {}, 0, 10, 10))
    for step in range(20):
        listeners.row({"kind": "train", "step": step, "loss": 1.0})
        time.sleep(0.01)
    listeners.end("done")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--log service failed in on_row and is left out from here on: ConnectionError: server gone for good" in said
    monkeypatch.setattr(service, "send", lambda *_: time.sleep(60))
    monkeypatch.setattr(train.record.loggers, "END_S", 0.1)
    listeners = Listeners([Background(service())])
    listeners.start(Started(tmp_path, {}, 0, 10, 10))
    listeners.row({"kind": "train", "step": 1, "loss": 1.0})
    listeners.end("done")
    assert "not all rows were delivered within 0.1 s" in capsys.readouterr().err


def twice(tmp_path: Path, name: str) -> None:
    """A run that is stopped after two of its rows, and goes on."""
    flags = [*RUN[:-1], "4", "--run-dir", str(tmp_path / "run"), "--log", name]
    assert train.main.main(flags) == 0
    assert train.main.main([*RUN, *flags[len(RUN) :]]) == 0


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the mlflow package is absent (pip install mlflow-skinny)")
    pytest.importorskip("sqlalchemy", reason="mlflow's local store needs sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    twice(tmp_path, "mlflow")
    client = mlflow.tracking.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("regatta").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["run.method"] == "moco-v2"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    wanted = [(row["step"], row["loss"]) for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert sorted((each.step, each.value) for each in history) == wanted


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the wandb package is absent (pip install wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    twice(tmp_path, "wandb")
    identity = json.loads((tmp_path / "run" / NOTE).read_text())["wandb"]["id"]
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(identity) for folder in folders)
    # Its helper process may write the last bytes a little after the run has ended.
    last = time.monotonic() + 20
    while not all(b"train/loss" in next(folder.glob("*.wandb")).read_bytes() for folder in folders):
        assert time.monotonic() < last, "the rows are not in its files"
        time.sleep(0.2)


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio", reason="the trackio package is absent (pip install trackio)")
    twice(tmp_path, "trackio")
    (database,) = (tmp_path / "trackio").glob("regatta*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, *_ in found} == {json.loads((tmp_path / "run" / NOTE).read_text())["trackio"]["id"]}
    steps = [step for _, step, metrics in found if "train/loss" in str(metrics)]
    assert steps == [row["step"] for row in rows(tmp_path / "run") if row["kind"] == "train"]


# ---------------------------------------------------------------------------------------------------------------------
# The page that is written while the run goes


def test_a_page_is_there_while_the_run_goes(tmp_path: Path) -> None:
    pages: list[str] = []

    class Looks(Recorder):
        def on_step(self, row: dict[str, Any]) -> None:
            page = tmp_path / "report.html"
            last = time.monotonic() + 20
            while not page.exists() and time.monotonic() < last:
                time.sleep(0.02)
            pages.append(page.read_text())

    assert train.main.run([*RUN, "--run-dir", str(tmp_path), "--live-report", "1"], [Looks()]) == 0
    assert all('<meta http-equiv="refresh" content="1">' in page and page.endswith("</html>\n") for page in pages)
    last = (tmp_path / "report.html").read_text()
    assert "refresh" not in last and "<svg" in last and "Curves" in last


def test_a_page_is_drawn_seldom_where_that_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bool] = []
    monkeypatch.setattr(train.record.live, "build_report", lambda *_, **__: (drawn.append(True), time.sleep(0.05)))
    page = LivePage(0.01)
    page.on_start(Started(tmp_path, {}, 0, 10, 10))
    for step in range(40):
        page.on_row({"kind": "train", "step": step})
        time.sleep(0.01)
    begun = time.monotonic()
    page.on_end("done")
    # 0.05 s at two percent of the time: the next one is due after 2.5 s, and the end does not wait for it.
    assert len(drawn) == 2 and time.monotonic() - begun < 1.0


def test_a_page_that_cannot_be_drawn_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no axis")

    monkeypatch.setattr(train.record.live, "build_report", fails)
    assert train.main.main([*RUN, "--run-dir", str(tmp_path), "--live-report", "1"]) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 1 and "--live-report failed in" in said[0] and "ZeroDivisionError: no axis" in said[0]
