"""Every table and figure of the three papers is a command, and its runs are those that its figures belong to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tools.analyze import main as analyze
from tools.reproduce import main
from tools.reproduction import runner
from tools.reproduction.commands import Plan, jobs, pictures, result_file
from tools.reproduction.cost import cost
from tools.reproduction.drawn import drawn_sources
from tools.reproduction.figure import points
from tools.reproduction.scales import Sources
from tools.reproduction.sheet import figures, sheet
from tools.reproduction.tables import TABLES
from tools.reproduction.training import Line, lines
from train.errors import UserMistake
from train.eval.trials import Trials, run_trials, take_trials
from train.evaluate import main as evaluate
from train.main import main as train
from train.record.published import PUBLISHED, candidates
from train.resolve import resolve

EVERY_LINE = [(name, number, line) for name, table in TABLES.items() for number, line in enumerate(lines(table), 1)]
SOURCES = Sources(("train", "val"), ("train100", "val100"), "coco", "voc", "city", "weights.pth", "real.json", "boxes")


RIVALS = ("regioncl-m", "moco-v2")


def plan(tmp_path: Path, scale: Any = "full", **more: Any) -> Plan:
    return Plan(SOURCES, scale, tmp_path, **more)


def training_argv(line: Line, plan: Plan) -> list[str]:
    return list(jobs(line, 0, plan)[0].argv[1:])


def test_every_table_of_the_papers_is_there_and_every_published_figure_is_in_one() -> None:
    tables = {"regioncl": range(1, 11), "care": ("1a", "1b", *range(2, 9)), "lewel": range(1, 8)}
    assert {f"{paper}-table{number}" for paper, numbers in tables.items() for number in numbers} <= set(TABLES)
    # Reported by repositories, logs and other papers only, or measured by no protocol of ours.
    elsewhere = re.compile("repository|log|SimSiam paper|MoCo v2$|MoCo v3|SimCLR paper|Barlow Twins paper|SwAV")
    taken = {id(row) for table in TABLES.values() for pick in table.picks for row in PUBLISHED if pick.takes(row)}
    lost = [row for row in PUBLISHED if id(row) not in taken and not elsewhere.search(row.source)]
    assert [(row.method, row.protocol, row.task, row.source) for row in lost] == []


@pytest.mark.parametrize(("table", "number", "line"), EVERY_LINE, ids=[f"{t}-{n}" for t, n, _ in EVERY_LINE])
def test_a_line_trains_what_its_figures_were_measured_on(table: str, number: int, line: Line, tmp_path: Path) -> None:
    if line.training.method == "supervised" or line.training.missing:
        return
    config = json.loads(json.dumps(resolve(training_argv(line, plan(tmp_path))).to_json()))
    images = 126_689 if line.training.recipe.endswith("-in100") else 1_281_167
    for cell in line.cells:
        if cell.figures:
            fitting = candidates({**config, "data_images": images}, cell.protocol, cell.task)
            assert cell.figures in [row.figures for row in fitting], (cell, line.training.name)
    # A table's own setting must be reachable at the smaller scales, too.
    for scale in ("in100", "tiny"):
        resolve(training_argv(line, plan(tmp_path, scale)))


def test_lines_of_a_table_differ() -> None:
    for name, table in TABLES.items():
        names = [line.training.name + line.training.arch for line in lines(table)]
        assert len(names) == len(set(names)), name


def test_the_scale_of_imagenet_100_doubles_the_rate_once(tmp_path: Path) -> None:
    [line] = [line for line in lines(TABLES["regioncl-table1"]) if line.training.method == "regioncl-m"]
    full, small = (resolve(training_argv(line, plan(tmp_path, scale))).recipe for scale in ("full", "in100"))
    assert small.optim.lr == 2 * full.optim.lr and (full.epochs, small.epochs) == (200, 240)
    [line] = [line for line in lines(TABLES["lewel-table5"]) if not line.training.flags]
    assert training_argv(line, plan(tmp_path)) == training_argv(line, plan(tmp_path, "in100"))


def test_one_run_serves_every_table(tmp_path: Path) -> None:
    folders = {
        jobs(line, 0, plan(tmp_path))[0].done
        for name in ("regioncl-table1", "regioncl-table4", "regioncl-figure1")
        for line in lines(TABLES[name])
        if line.training.method == "regioncl-m"
    }
    assert len(folders) == 1


def test_commands_of_a_detector_and_a_segmenter(tmp_path: Path) -> None:
    line = next(line for line in lines(TABLES["lewel-table4"]) if len(line.cells) == 2)
    texts = [job.text(8) for job in jobs(line, 1, plan(tmp_path, trials=5, sweep=(0.02, 0.04)))]
    assert texts[0].startswith("torchrun --standalone --nproc_per_node=8 train/main.py --method lewel-")
    assert "--detector mask-rcnn-c4" in texts[1] and "--trials 5 --sweep-lrs 0.02,0.04" in texts[1]
    assert "--detector mask-rcnn-fpn --box-head 4conv1fc --schedule 1x" in texts[2]
    own, cited = (next(x for x in lines(TABLES["regioncl-table4"]) if x.training.name == n) for n in RIVALS)
    assert ["--longest-side 1200" in job.text() for job in jobs(own, 0, plan(tmp_path))[1:]] == [True, False]
    assert not [job for job in jobs(cited, 0, plan(tmp_path)) if "--longest-side" in job.text()]
    line = lines(TABLES["regioncl-table7"])[1]
    assert "--model upernet --schedule 80k" in jobs(line, 0, plan(tmp_path))[-1].text()


def test_data_that_are_missing_are_named(tmp_path: Path) -> None:
    nothing = Plan(Sources(), "full", tmp_path)
    for table, flag in (("care-table6", "--imagenet TRAIN"), ("lewel-table5", "--imagenet100 TRAIN")):
        with pytest.raises(UserMistake, match=flag):
            jobs(lines(TABLES[table])[0], 0, nothing)
    for table, flag in (
        ("regioncl-table4", "--supervised"),
        ("lewel-table3", "--imagenet"),
        ("care-table4", "--imagenet"),
    ):
        with pytest.raises(UserMistake, match=flag):
            jobs(lines(TABLES[table])[0], 0, nothing)


def write_result(line: Line, cell: Any, seed: int, plan: Plan, **document: Any) -> None:
    path = result_file(cell, line.training, seed, plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"protocol": cell.protocol, **document}))


def test_the_sheet_has_means_and_standard_errors_beside_the_published_figures(tmp_path: Path) -> None:
    here = plan(tmp_path)
    found = lines(TABLES["regioncl-figure1"])
    line = next(line for line in found if line.training.method == "regioncl-m")
    for seed, top1 in enumerate((0.69, 0.70, 0.71)):
        write_result(line, line.cells[0], seed, here, top1=top1)
    write_result(line, line.cells[1], 0, here, metrics={"box_ap": 0.4})
    [top1] = [each for each in figures(line.cells[0], line, (0, 1, 2), here) if each.name == "top1"]
    # Sample deviation 1 over the root of three seeds.
    assert top1.text() == "top-1 69.4, ours 70.00 +- 0.58 (3 seeds)"
    assert "top-5 89.6;" in sheet({1: line}, (0, 1, 2), here), "a figure that was not measured stands alone"
    published, ours = points(found, (0, 1, 2), here)
    assert ("regioncl-m", 69.4, 40.1) in published and ours == [("regioncl-m", pytest.approx(70.0), 40.0)]


def test_figures_of_two_numbers_of_neighbours_are_told_apart(tmp_path: Path) -> None:
    here = plan(tmp_path)
    line = lines(TABLES["regioncl-table10"])[0]
    assert len(jobs(line, 0, here)) == 3, "one run of k-NN has both"
    write_result(line, line.cells[0], 0, here, results=[{"k": 20, "top1": 0.5}, {"k": 100, "top1": 0.4}])
    assert [figures(cell, line, (0,), here)[0].ours for cell in line.cells[:2]] == [(50.0,), (40.0,)]


@pytest.mark.parametrize(
    ("arch", "parameters", "operations"),
    # Published by torchvision beside its weights; CARE's table 1b has 25, 45, 60 and 69 million.
    [
        ("resnet50", 25.557, 4.09),
        ("resnet101", 44.549, 7.80),
        ("resnet152", 60.193, 11.51),
        ("resnet50-2x", 68.883, 11.40),
    ],
)
def test_costs_of_a_backbone_are_the_published_ones(arch: str, parameters: float, operations: float) -> None:
    found = cost(arch)
    assert found == (pytest.approx(parameters, abs=1e-3), pytest.approx(operations, abs=0.01))
    line = next(line for line in lines(TABLES["care-table1b"]) if line.training.arch == "resnet101")
    shown = sheet({1: line}, (0,), plan(Path()), TABLES["care-table1b"].costs)
    assert "(resnet101, 44.5 M parameters, 7.8 GFLOPs)" in shown


def test_pictures_show_all_runs_of_a_figure(tmp_path: Path) -> None:
    [job] = pictures("care-figure4", lines(TABLES["care-figure4"]), 0, plan(tmp_path))
    assert job.argv[1] == "gradcam" and {"care-conv-200ep", "care-200ep"} <= {Path(a).parent.name for a in job.argv}
    [job] = pictures("regioncl-figure4", lines(TABLES["regioncl-figure4"]), 0, plan(tmp_path))
    assert job.argv[-4:-2] == ("--annotations", "boxes")


def test_the_command_lists_prints_and_writes_an_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0 and capsys.readouterr().out.count("\n") == len(TABLES)
    data = ["--imagenet", "a", "b", "--out", str(tmp_path)]
    assert main(["care-table6", *data, "--lines", "2", "4"]) == 0
    out = capsys.readouterr().out
    assert re.search("--lambda-att 1$", out, re.M) and "--lambda-att 250" in out and "--lambda-att 10" not in out
    assert "  4  care-lambda-att=250" in out, "a line keeps its number"
    script = tmp_path / "table.sh"
    assert main(["care-table6", *data, "--seeds", "0", "1", "--slurm", str(script)]) == 0
    assert "#SBATCH --array=0-9" in script.read_text() and "--run --task" in script.read_text()
    with pytest.raises(UserMistake, match="the nearest is care-table6"):
        main(["care-tabel6"])


def test_a_run_passes_over_what_is_done_and_ends_with_the_commands_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = plan(tmp_path)
    every = jobs(lines(TABLES["care-table6"])[0], 0, here)
    codes = [0, 75]
    started: list[str] = []

    def call(self: Any, command: list[str]) -> int:
        started.append(Path(command[1]).name)
        code = codes[len(started) - 1]
        if not code:
            every[0].done.touch()
        return code

    monkeypatch.setattr(runner, "Commands", type("Commands", (), {"call": call}))
    assert runner.run(every, 1) == 75 and started == ["main.py", "evaluate.py"]
    codes.append(75)
    assert runner.run(every, 1) == 75 and started[2:] == ["evaluate.py"], "training is done"


class InProcess:
    """Runs the commands of a table in this process; to import PyTorch for each would take most of the time."""

    def call(self, command: list[str]) -> int:
        """The exit code of `python SCRIPT ARGUMENTS...`."""
        mains = {"main.py": train, "evaluate.py": evaluate, "analyze.py": analyze}
        return int(mains[Path(command[1]).name](command[2:]))


def run_whole(table: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command of a table and see that each of its lines has all figures and each picture is drawn."""
    monkeypatch.setattr(runner, "Commands", InProcess)
    assert main([table, "--scale", "tiny", "--run", "--out", str(out)]) == 0
    here, found = Plan(drawn_sources(out / "tiny-data"), "tiny", out), lines(TABLES[table])
    assert not [line.training.missing for line in found if line.training.missing]
    assert all(job.done.stat().st_size > 0 for job in pictures(table, found, 0, here))
    measured = [(line, cell) for line in found for cell in line.cells if cell.protocol != "analyze"]
    shown = {(line.training.name, cell.name): figures(cell, line, (0,), here) for line, cell in measured}
    # No drawn picture has a label of ImageNet-ReaL, and no run reports the best of its epochs.
    lost = [
        (name, each.name)
        for name, cells in shown.items()
        for each in cells
        if not each.ours and each.name not in ("real_top1", "best_top1")
    ]
    assert lost == [] and all(shown.values())


# The cheapest of the tables: one with figures and one with a picture.
@pytest.mark.parametrize("table", ["care-streams", "lewel-appendix-c1"])
def test_a_whole_table_runs_at_the_tiny_scale(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_whole(table, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("table", list(TABLES))
def test_every_table_runs_at_the_tiny_scale(
    table: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One folder for all tables, as a user has it: what another table has trained is not trained again.
    run_whole(table, tmp_path_factory.getbasetemp() / "papers", monkeypatch)


def test_a_line_runs_at_the_tiny_scale(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["lewel-table5", "--scale", "tiny", "--run", "--out", str(tmp_path), "--lines", "3"]
    assert main(arguments) == 0
    assert re.search(r"linear: top-1 81, ours \d", capfd.readouterr().out)
    assert main(arguments) == 0
    assert capfd.readouterr().out.count("done: ") == 3


# ---------------------------------------------------------------------------------------------------------------------
# Trials and sweeps of `train/evaluate.py`


def fake_protocol(best: float) -> Any:
    """A protocol whose AP falls with the distance of the rate from the best one, and rises with the seed."""

    def run(argv: list[str]) -> int:
        flags = dict(zip(argv[::2], argv[1::2], strict=True))
        ap = 0.4 - abs(float(flags.get("--lr", best)) - best) + 0.01 * int(flags["--seed"])
        document = {"protocol": "detect", "task": "t", "lr": 1.0, "metrics": {"box_ap": ap}, "history": [1]}
        Path(flags["--output"]).write_text(json.dumps(document))
        return 0

    return run


def test_trials_give_mean_and_deviation_and_a_sweep_the_best_rate(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    argv = ["--trials", "3", "--sweep-lrs=0.1,0.2", "--output", str(output), "--seed", "5", "--data", "d"]
    trials, rest = take_trials("detect", argv)
    assert trials == Trials(3, (0.1, 0.2), 5, output) and rest == ["--data", "d"]
    assert run_trials(fake_protocol(0.2), trials, []) == 0
    found = json.loads(output.read_text())
    assert found["metrics"]["box_ap"] == pytest.approx(0.46) and found["deviation"]["box_ap"] == pytest.approx(0.01)
    assert found["rates"] == {"0.1": pytest.approx(0.36), "0.2": pytest.approx(0.46)}
    assert found["lr"] == 1.0 and len(found["trials"]) == 3
    assert len(list(tmp_path.iterdir())) == 7


def test_trials_that_are_done_are_not_run_again_and_a_stop_is_passed_on(tmp_path: Path) -> None:
    trials = Trials(2, (), 0, tmp_path / "result.json")
    started: list[Any] = []
    stop = [0, 75, 0]

    def run(argv: Any) -> int:
        started.append(argv)
        code = stop[len(started) - 1]
        return fake_protocol(0.1)(argv) if code == 0 else code

    assert run_trials(run, trials, []) == 75 and not trials.output.exists()
    assert run_trials(run, trials, []) == 0 and trials.output.exists() and len(started) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("detect --trials 2", "need --output"),
        ("detect --trials 0", "at least 1"),
        ("detect --sweep-lrs 0,-1 --output a.json", "sweep-lrs"),
        ("linear --sweep-lrs 0.1 --output a.json", "is for detect and segment"),
        ("knn --trials 2 --output a.json", "draws nothing"),
    ],
)
def test_mistakes_are_one_line(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(argv.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
