"""The doctor: damage in a packed file is found and named, a run's symptoms lead to flags, exit codes say which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import BetonReader
from tests.test_report import write_run
from tools import doctor, make_ffcv_dataset
from tools.support import machine
from tools.support.packed import check_packed
from train.record.diagnosis import Finding, diagnose
from train.record.run import read_run


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Twelve small images of two classes, packed by the project's own command."""
    random = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 96)).save(folder / f"{number:02d}.jpg", quality=90)
    target = tmp_path / "images.beton"
    assert make_ffcv_dataset.main([str(tmp_path / "images"), str(target), "--workers", "1"]) == 0
    return target


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_a_good_file_is_good(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(check_packed(packed, 100))
    assert levels(found) == ["ok", "ok", "ok"]
    assert "12 images, 2 classes, 80 x 96 px at most" in found[0].text
    assert doctor.main([str(packed)]) == 0
    assert "12 records fit their checksums" in capsys.readouterr().out


def test_damage_is_found_and_named(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = BetonReader(packed)
    middle = int(reader.offsets[5] + reader.sizes[5] // 2)
    content = bytearray(packed.read_bytes())
    content[middle] ^= 0x55
    packed.write_bytes(content)
    assert doctor.main([str(packed)]) == 3
    said = capsys.readouterr().out
    assert "FAULT  1 of 12 records have other bytes than were packed: 5 (" in said
    assert ".jpg)" in said and "-> copy the file again" in said


def test_records_that_do_not_decode_are_found_without_a_manifest(packed: Path) -> None:
    reader = BetonReader(packed)
    content = bytearray(packed.read_bytes())
    first = int(reader.offsets[3])
    content[first + 2 : first + int(reader.sizes[3])] = bytes(int(reader.sizes[3]) - 2)
    packed.write_bytes(content)
    packed.with_name("images.manifest.json").unlink()
    found = list(check_packed(packed, 100))
    assert levels(found) == ["ok", "note", "fault"]
    assert "1 of 12 records do not decode: 3" in found[2].text


def test_a_cut_file_is_one_line(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed.write_bytes(packed.read_bytes()[:-100])
    assert doctor.main([str(packed)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "truncated" in errors[0]


def change(folder: Path, **values: object) -> None:
    """Set figures in every row of the metrics that has them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.update({name.replace("__", "/"): value for name, value in values.items() if name.replace("__", "/") in row})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configure(folder: Path, part: str, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part].update(values)
    (folder / "config.json").write_text(json.dumps(config))


def find(folder: Path, words: str) -> Finding:
    (found,) = [finding for finding in diagnose(read_run(folder)) if words in finding.text]
    return found


def test_a_starved_run_is_told_to_pack(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert find(folder, "waiting for data").level == "ok"
    change(folder, data_wait_share=0.4)
    configure(folder, "run", data="/photos", loader="folder")
    finding = find(folder, "the loader is the limit")
    assert finding.level == "note" and "make_ffcv_dataset.py" in finding.remedy
    configure(folder, "run", data="photos.beton", loader="ffcv", workers=2, order="global")
    remedy = find(folder, "the loader is the limit").remedy
    assert "--workers 2" in remedy and "--order sharded" in remedy and "FFCV was not installed" in remedy


def test_a_step_that_is_the_limit_is_told_what_costs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    change(folder, data_wait_share=0.001)
    configure(folder, "run", precision="fp32", compile=False, deterministic=True)
    remedy = find(folder, "the step itself is the limit").remedy
    assert "--precision auto" in remedy and "--compile" in remedy and "--deterministic" in remedy


def test_a_run_that_does_not_learn_or_collapses(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=900)
    assert find(folder, "instance loss").level == "ok"
    change(folder, loss__ins=8.3)
    assert find(folder, "are not told from others").level == "note"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [row for row in rows if row["kind"] == "health"][-1]["feature_std"] = 0.001
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find(folder, "given one feature").level == "fault"
    assert doctor.main([str(folder)]) == 2


def test_the_loss_is_not_judged_before_the_queue_is_full(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=60)
    assert "says nothing yet" in find(folder, "queue is full").text


def test_accidents_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"kind": "end", "step": 300, "epoch": 10, "time_s": 150, "bad_records": 7}) + "\n")
        stream.write(json.dumps({"kind": "skipped_step", "step": 300, "epoch": 9, "time_s": 149, "steps": 4}) + "\n")
    assert find(folder, "steps were skipped").text.startswith("5 ")
    assert "7 damaged records" in find(folder, "damaged").text


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing every optional package takes long; what is installed is the doctor's business, not this test's.
    listed = (("numpy", "numpy", "everything"), ("no-such-package", "no_such_module", "--loader none"))
    monkeypatch.setattr(machine, "_OPTIONAL", listed)
    found = list(machine.check_environment())
    text = " ".join(finding.text for finding in found)
    assert "fault" not in levels(found)
    assert all(word in text for word in ("Python 3", "torch 2", "numpy 2", "cores"))
    (missing,) = [finding for finding in found if "no-such-package" in finding.text]
    assert missing.level == "note" and "--loader none" in missing.text and "setup.sh --retry" in missing.remedy


@pytest.mark.parametrize("arguments", [["absent.beton"], ["."], ["--decod", "3"], ["--decode", "-1"]])
def test_mistakes_are_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
