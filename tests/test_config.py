"""Flags, recipes and what a user sees after a mistake."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train.main
import train.pretrain
from models.methods import METHODS
from pipeline.prefetch import decoding_threads, set_sharing_processes
from tests.runs import last_wins
from train.config import Config
from train.errors import EXIT_NON_FINITE, EXIT_USER_MISTAKE, UserMistake
from train.fields import flatten
from train.flags import parse_value
from train.recipes import RECIPES, default_recipe
from train.resolve import changed_fields, continued, resolve
from train.runtime import _choose_device, _launch_environment, _without_buffers, compiles, share_cores


def error_line(capfd: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert train.main.main(argv) == EXIT_USER_MISTAKE
    captured = capfd.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_no_colliding_flags(name: str) -> None:
    method, make = RECIPES[name]
    recipe, model = make()
    flags = [leaf.flag for part in (train.config.RunConfig(), recipe, model) for leaf in flatten(part).values()]
    assert len(flags) == len(set(flags))
    assert isinstance(model, METHODS[method].Config)


def test_every_method_has_a_recipe_of_its_name() -> None:
    for method in METHODS:
        assert RECIPES[default_recipe(method)][0] == method


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("moco-v2", 0.03),
        ("regioncl-m", 0.15),
        ("simsiam", 0.1),
        ("moco-v3", 9.6),
        ("moco-v3-300ep", 4.8),
        ("moby", 1e-3),
        ("care", 0.2),
        ("lewel-m", 0.06),
        ("lewel-b", 3.6),
        ("lewel-b-400ep", 7.2),
        ("byol-paper-1000ep", 3.2),
    ],
)
def test_actual_learning_rates(name: str, rate: float) -> None:
    from train.schedules import scaled_lr

    if RECIPES[name][0] not in METHODS:
        pytest.fail(f"{name} belongs to a method that does not exist")
    recipe, _ = RECIPES[name][1]()
    assert scaled_lr(recipe.optim, recipe.global_batch) == pytest.approx(rate)


def test_flags_reach_every_part_in_either_spelling() -> None:
    config = resolve(
        [
            "--method",
            "regioncl-m",
            "--region.sampling",
            "official",
            "--optim.lr",
            "0.5",
            "--bn.group_size=16",
            "--no-deterministic",
            "--compile",
            "--seed",
            "3",
            "--symmetric.enabled",
            "true",
        ]
    )
    assert config.model.region.sampling == "official"
    assert config.recipe.optim.lr == 0.5
    assert config.recipe.bn.group_size == 16
    assert config.run.compile is True and config.run.deterministic is False and config.run.seed == 3
    assert config.model.symmetric.enabled is True
    assert resolve(["--method", "moco-v2", "--no-compile"]).run.compile is False
    assert resolve(["--method", "moco-v2"]).run.compile is None


def test_every_flag_changes_the_configuration() -> None:
    """No option is accepted and ignored on the way to the configuration."""
    base = resolve(["--method", "regioncl-m"])
    samples = {int: "9", float: "0.123", str: "x", bool: "toggle"}
    for part in ("run", "recipe", "model"):
        for leaf in flatten(getattr(base, part)).values():
            if leaf.name in ("method", "recipe", "arch"):
                continue
            given = {"--augment.profile": "byol", "--schedule.milestones": "3,5"}
            text = given.get(leaf.flag) or other_value(leaf, samples)
            # Milestones are refused with another decay.
            also = ["--schedule.decay", "steps"] if leaf.flag == "--schedule.milestones" else []
            config = resolve(["--method", "regioncl-m", *also, leaf.flag, text])
            assert config != base, leaf.flag
            assert flatten(getattr(config, part))[leaf.name].value != leaf.value, leaf.flag


def other_value(leaf, samples: dict[type, str]) -> str:
    import typing

    arguments = typing.get_args(leaf.annotation)
    if typing.get_origin(leaf.annotation) is typing.Literal:
        return str(next(choice for choice in arguments if choice != leaf.value))
    if leaf.annotation is bool:
        return "false" if leaf.value else "true"
    if leaf.annotation == bool | None:
        return "true"
    if typing.get_origin(leaf.annotation) is tuple:
        # Names to choose from, or numbers.
        return ",".join(typing.get_args(arguments[0])) or "0.5,0.25"
    if leaf.name == "micro_batch":
        return "auto"
    return samples[leaf.annotation]


def test_unknown_flag_names_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    line = error_line(capfd, ["--method", "regioncl-m", "--region.samplng", "official"])
    assert "--region.samplng" in line and "nearest valid flag is --region.sampling" in line


SYNTHETIC = ["--method", "moco-v2", "--loader", "synthetic", "--data", "64", "--device", "cpu"]
SMALL = [
    *SYNTHETIC,
    "--arch",
    "resnet18",
    "--image-size",
    "32",
    "--global-batch",
    "8",
    "--bn.group-size",
    "8",
    "--queue-size",
    "64",
    "--no-report",
]
REGIONS = ["--method", "regioncl-m", *SYNTHETIC[2:], "--arch", "resnet18"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--data", "x"], "--method is needed"),
        (["--method", "mocov2"], "choose from"),
        (["--method", "moco-v2", "--recipe", "regioncl-m"], "belongs to --method regioncl-m"),
        (["--method", "moco-v2", "--recipe", "nope"], "choose from moco-v2"),
        (["--method", "moco-v2", "--epochs", "many"], "--epochs many: give a whole number"),
        (["--method", "moco-v2", "--epochs", "0"], "at least 1"),
        (["--method", "regioncl-m", "--region.sampling", "both"], "choose from paper, official"),
        (["--method", "moco-v2"], "tools/make_ffcv_dataset.py"),
        (["--method", "moco-v2", "--data", "/nowhere/photos.beton", "--device", "cpu"], "/nowhere/photos.beton"),
        ([*SYNTHETIC, "--arch", "resnet99"], "resnet99"),
        (SYNTHETIC, "fewer than --global-batch"),
        ([*SYNTHETIC, "--bn.group-size", "48"], "--bn.group-size 48"),
        ([*SYNTHETIC, "--queue-size", "255"], "--queue-size 255"),
        ([*SYNTHETIC, "--optim.lr", "-1"], "--optim.lr -1"),
        ([*SYNTHETIC, "--optim.lr", "nan"], "--optim.lr nan: give a finite number"),
        ([*SMALL, "--optim.kind", "adamw", "--optim.eps", "-1"], "--optim: Invalid epsilon"),
        ([*SYNTHETIC, "--schedule.warmup-epochs", "-1"], "--schedule.warmup-epochs -1"),
        ([*SYNTHETIC, "--augment.profile", "linear"], "choose from mocov2"),
        ([*SYNTHETIC, "--augment.min-scale", "3"], "--augment.min-scale 3"),
        ([*SMALL, "--augment.implementation", "kernel"], "choose from auto, reference, native"),
        (last_wins([*SMALL, "--data", "photos.beton"]), "reads no photos.beton"),
        ([*SYNTHETIC, "--global-batch", "1"], "--global-batch 1: must be at least 2"),
        ([*SYNTHETIC, "--image-size", "1"], "--image-size 1: must be at least 8"),
        ([*SYNTHETIC, "--temperature", "0"], "--temperature 0"),
        ([*SYNTHETIC, "--hidden-dim", "-1"], "--hidden-dim -1"),
        (["--method", "care", *SYNTHETIC[2:], "--heads", "0"], "--heads 0"),
        ([*SYNTHETIC, "--ema.momentum", "2"], "--ema.momentum 2"),
        ([*SYNTHETIC, "--seed", "4294967296"], "--seed 4294967296"),
        ([*REGIONS, "--image-size", "32"], "2 x 2 feature cells"),
        ([*REGIONS, "--image-size", "100"], "choose 96 or 128"),
        ([*REGIONS, "--region.lower", "9"], "region sides of 9"),
        (["--method", "moco-v2", "--device", "cpu", "--precision", "fp16", "--data", "1"], "--precision fp16"),
        (["--method", "moco-v2", "--config", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_mistakes_are_one_line(capfd, monkeypatch, tmp_path: Path, argv: list[str], expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    # The description of the run may be printed before data are opened, but only on standard output.
    assert expected in error_line(capfd, argv)


def test_srun_without_a_meeting_place_is_refused(capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Eight tasks that cannot find each other would write eight runs into one folder."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert _launch_environment() == (0, 1, 0)  # a batch script that calls Python itself
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert "MASTER_ADDR" in error_line(capfd, SMALL)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29501")
    monkeypatch.setenv("RANK", "")  # so that both are taken back after the test
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.delenv("RANK")
    assert _launch_environment() == (3, 8, 3)


def test_a_backbone_that_has_diverged_ends_the_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = [*SMALL, "--max-steps", "1", "--optim.lr", "1e30", "--run-dir", str(tmp_path / "run")]
    assert train.main.main(argv) == EXIT_NON_FINITE
    assert "not finite" in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("more", [["--data", "30"], ["--holdout", "1"], ["--data", "16", "--holdout", "1"]])
def test_few_images_have_health_figures(tmp_path: Path, more: list[str]) -> None:
    """Of one image alone there is no spread and no neighbour: then images that are trained on serve."""
    run_dir = tmp_path / "run"
    assert train.main.main(last_wins([*SMALL, "--max-steps", "1", "--run-dir", str(run_dir), *more])) == 0
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "health"] == [0, 1]


def test_read_only_run_folder(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    line = error_line(
        capfd,
        [
            "--method",
            "moco-v2",
            "--loader",
            "synthetic",
            "--data",
            "64",
            "--device",
            "cpu",
            "--arch",
            "resnet18",
            "--image-size",
            "32",
            "--run-dir",
            str(blocker / "run"),
        ],
    )
    assert "--run-dir" in line and "choose a folder that can be written" in line


def test_config_file_repeats_a_run(tmp_path: Path) -> None:
    config = resolve(["--method", "regioncl-m", "--region.weight", "0.5", "--optim.lr", "0.2", "--seed", "9"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config.to_json(), "versions": {}}))
    again = resolve(["--config", str(path)])
    assert again == config
    assert resolve(["--config", str(path), "--seed", "1"]).run.seed == 1


def test_config_file_with_unknown_fields_is_refused(tmp_path: Path) -> None:
    document = resolve(["--method", "moco-v2"]).to_json()
    document["recipe"]["optim"]["nesterov"] = True
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserMistake, match="optim.nesterov"):
        resolve(["--config", str(path)])


def test_changed_fields_ignores_what_is_free() -> None:
    before = resolve(["--method", "regioncl-m"])
    free = resolve(["--method", "regioncl-m", "--workers", "3", "--knn-every", "1", "--run-dir", "elsewhere"])
    other = resolve(["--method", "regioncl-m", "--optim.lr", "1", "--region.weight", "2"])
    assert changed_fields(json.loads(json.dumps(before.to_json())), free.to_json()) == []
    changes = changed_fields(json.loads(json.dumps(before.to_json())), other.to_json())
    assert any(change.startswith("optim.lr") for change in changes)
    assert any(change.startswith("region.weight") for change in changes)


def test_a_run_of_an_earlier_version_goes_on() -> None:
    """An option that it did not have yet is no change at its default, and is one at any other value."""
    before = json.loads(json.dumps(resolve(["--method", "moco-v2"]).to_json()))
    del before["model"]["symmetric"]["enqueue"], before["recipe"]["optim"]["betas"], before["run"]["order"]
    assert changed_fields(before, resolve(["--method", "moco-v2"]).to_json()) == []
    assert changed_fields(resolve(["--method", "moco-v2"]).to_json(), before) == []
    other = resolve(["--method", "moco-v2", "--symmetric.enqueue", "first", "--order", "sharded"]).to_json()
    assert changed_fields(before, other) == ["order: global -> sharded", "symmetric.enqueue: both -> first"]


def test_a_run_goes_on_with_what_it_has_recorded_where_no_flag_says_otherwise() -> None:
    """Defaults and recipes may be mended between versions; a run that has begun keeps its own values."""
    asked = ["--method", "care", "--workers", "3", "--run-dir", "runs/a"]
    config = resolve(asked)
    recorded = json.loads(json.dumps(config.to_json()))
    recorded["run"] |= {"holdout": 500, "workers": 1, "max_steps": 7}
    recorded["model"]["pos"] = "sincos"
    recorded["recipe"]["optim"]["betas"] = [0.8, 0.9]
    kept = continued(asked, config, recorded)
    assert (kept.run.holdout, kept.model.pos, kept.recipe.optim.betas) == (500, "sincos", (0.8, 0.9))
    assert (kept.run.workers, kept.run.max_steps) == (3, 0), "what may change follows the command line"
    assert changed_fields(recorded, kept.to_json()) == []

    flags = [*asked, "--holdout", "20"]
    told = continued(flags, resolve(flags), recorded)
    assert told.run.holdout == 20 and told.model.pos == "sincos"
    assert changed_fields(recorded, told.to_json()) == ["holdout: 500 -> 20"]


@pytest.mark.parametrize("change", [{"method": "byol"}, {"recipe": "care-200ep"}])
def test_another_method_or_recipe_is_not_taken_over(change: dict[str, str]) -> None:
    config = resolve(["--method", "care"])
    recorded = json.loads(json.dumps(config.to_json()))
    recorded["run"] |= {"holdout": 500, **change}
    assert continued(["--method", "care"], config, recorded) is config


def test_health_figures_come_from_images_that_are_trained_on_unless_some_are_kept_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The papers train on every image, so that is the default; the row says where its images are from."""
    steps, told = {}, []
    for name, more in {"training": [], "held out": ["--holdout", "8"], "validation": ["--val-data", "30"]}.items():
        run_dir = tmp_path / name
        argv = last_wins([*SMALL, "--data", "320", "--max-steps", "1", "--run-dir", str(run_dir), *more])
        assert train.main.main(argv) == 0
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert {row["source"] for row in rows if row["kind"] == "health"} == {name}
        steps[name] = rows[0]["steps_per_epoch"]
        told += re.findall("^data: .*", capfd.readouterr().out, re.MULTILINE)
    assert told == [
        "data: 320 images, all trained on",
        "data: 320 images, 312 trained on and 8 held out",
        "data: 320 images, all trained on; --val-data: 30 images",
    ]
    batch = resolve(SMALL).recipe.global_batch
    assert steps == {"training": 320 // batch, "held out": 312 // batch, "validation": 320 // batch}


def test_dry_run_prints_what_follows(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steps of the published batch would take minutes here; tests/test_rehearsal.py takes some.
    monkeypatch.setattr(train.pretrain, "rehearse", lambda *_: SimpleNamespace(text=lambda: "rehearsed"))
    argv = [
        "--method",
        "regioncl-m",
        "--loader",
        "synthetic",
        "--device",
        "cpu",
        "--arch",
        "resnet18",
        "--dry-run",
        "--image-size",
        "128",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert train.main.main(argv) == 0
    printed = capfd.readouterr().out
    assert "2 to 3 cells a side on a 4 x 4 grid" in printed
    assert "lr 0.15" in printed
    assert "rehearsed" in printed
    assert not (tmp_path / "run").exists()


def test_help_shows_defaults_of_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        resolve(["--method", "regioncl-m", "--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--region.sampling {paper,official}" in printed and '(default: "paper")' in printed


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [("none", bool | None, None), ("1,2", tuple[float, ...], (1.0, 2.0)), ("1_000", int, 1000), ("off", bool, False)],
)
def test_values_parse(text: str, annotation: object, value: object) -> None:
    assert parse_value(text, annotation) == value


def test_configuration_survives_json() -> None:
    config = resolve(["--method", "regioncl-m"])
    assert isinstance(config, Config)
    assert json.loads(json.dumps(config.to_json()))["model"] == dataclasses.asdict(config.model)


def test_a_task_of_srun_that_sees_one_gpu_takes_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "H200")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert _choose_device("auto", 3) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")  # of torchrun, whose processes all see the same devices
    with pytest.raises(UserMistake, match="local rank 3 has no GPU, 1 are visible"):
        _choose_device("auto", 3)


def test_ranks_on_the_same_cores_share_them_out(monkeypatch):
    """As on a machine of two sockets with four ranks on each, and where each rank has cores of its own."""
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    near, far = frozenset(range(64)), frozenset(range(64, 128))
    own = [frozenset(range(8 * rank, 8 * rank + 8)) for rank in range(8)]
    try:
        for affinities, expected in (([near] * 4 + [far] * 4, 16), (own, 8), ([near] * 2, 32)):
            monkeypatch.setattr("os.sched_getaffinity", lambda _, mine=affinities[0]: mine)
            everyone = [(socket.gethostname(), cores) for cores in affinities] + [("elsewhere", near)]
            share_cores(SimpleNamespace(world_size=len(everyone), gather_objects=lambda mine, all=everyone: all))
            assert decoding_threads(0) == expected and decoding_threads(5) == 5
    finally:
        set_sharing_processes(0)


def test_heads_are_compiled_on_a_gpu_where_they_can_be(monkeypatch, capsys, tmp_path):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert compiles(None, gpu) and not compiles(None, cpu)
    assert compiles(True, cpu) and not compiles(False, gpu)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere/include")
    assert not compiles(None, gpu) and "/nowhere/include/Python.h; install python3-dev" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiles(None, gpu) and compiles(True, gpu)


@pytest.mark.parametrize(
    "argv",
    [
        ["--method", "moco-v2", "--recipe", "moco-v2", "--recipe", "moco-v2-small"],
        ["--method", "moco-v2", "--method", "simsiam"],
        ["--recipe", "moco-v2-small", "--method", "moco-v2", "--method=regioncl"],
        ["--method", "moco-v2", "--seed", "1", "--seed", "1"],
        ["--method", "moco-v2", "--bn.group-size", "8", "--bn.group_size=16"],
    ],
)
def test_a_flag_given_twice_is_refused(capfd: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert "is given twice; give it once" in error_line(capfd, argv)


def test_a_recipe_and_a_file_of_another_recipe_are_refused(tmp_path: Path) -> None:
    """The values of the one under the name of the other would be recorded as what was not run."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(resolve(["--method", "moco-v2", "--recipe", "moco-v2-small"]).to_json()))
    with pytest.raises(UserMistake, match="whose recipe is moco-v2-small, both set every value"):
        resolve(["--config", str(path), "--recipe", "moco-v2"])
    assert resolve(["--config", str(path), "--recipe", "moco-v2-small"]).run.recipe == "moco-v2-small"


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--lr", "--optim.lr"),
        ("--batch-size", "--global-batch"),
        ("--batch_size=64", "--global-batch"),
        ("--amp", "--precision"),
        ("--fp16", "--precision"),
        ("--warmup", "--schedule.warmup-epochs"),
        ("--warmup-epochs", "--schedule.warmup-epochs"),
        ("--model", "--arch"),
        ("--out", "--run-dir"),
        ("--gpus", "torchrun --nproc_per_node=N"),
        ("--wandb", "metrics.jsonl"),
        ("--global-bach", "--global-batch"),
        ("--sampling", "--region.sampling"),
        ("--moco-t", "--temperature"),
    ],
)
def test_flags_of_other_trainers_lead_to_ours(capfd: pytest.CaptureFixture[str], typed: str, named: str) -> None:
    line = error_line(capfd, ["--method", "regioncl-m", typed])
    assert typed.partition("=")[0].replace("_", "-") in line and named in line


def test_no_advice_is_better_than_a_wrong_one(capfd: pytest.CaptureFixture[str]) -> None:
    line = error_line(capfd, ["--method", "moco-v2", "--quux"])
    assert line.endswith("unknown flag --quux; --help lists all flags")


def test_every_synonym_leads_to_a_flag_that_some_command_has() -> None:
    """A synonym whose flags were all renamed would silently give no advice."""
    from train.flags import SYNONYMS

    known = {
        *flatten(train.config.RunConfig()),
        *flatten(train.config.Recipe()),
        *(name for method in METHODS.values() for name in flatten(method.Config())),
    }
    known = {name.replace("_", "-") for name in known} | {"checkpoint", "overwrite"}
    lost = [word for word, flags in SYNONYMS.items() if not known.intersection(flags)]
    assert not lost


BEFORE = sorted((Path(__file__).parent / "golden" / "config_json").glob("*.json"))


@pytest.mark.parametrize("path", BEFORE, ids=lambda path: path.stem)
def test_a_run_of_before_is_unchanged(path: Path, tmp_path: Path) -> None:
    """`config.json` as commit ba97f32 wrote it is read by --config, and what it says counts as no change."""
    saved = json.loads(path.read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = resolve(["--config", str(tmp_path / "config.json")])
    # Fields that came after it are at their defaults, which compute what was computed without them.
    now = json.loads(json.dumps({name: leaf.value for name, leaf in flatten(config).items()}))
    before = {
        name: leaf.value for name, leaf in flatten({part: saved[part] for part in ("run", "recipe", "model")}).items()
    }
    assert {name: now[name] for name in before} == before
    assert changed_fields(saved, config.to_json()) == []
    assert changed_fields(config.to_json(), saved) == []
    other = resolve(["--config", str(tmp_path / "config.json"), "--optim.eps", "0.5", "--knn-every", "3"])
    assert changed_fields(saved, other.to_json()) == ["optim.eps: 1e-08 -> 0.5"]


@pytest.mark.parametrize("method", ["moco-v2", "regioncl-m", "simsiam"])
def test_a_run_of_before_goes_on_with_its_flags(method: str) -> None:
    """Though --holdout has another default now: what the flags leave open is as the run has recorded it."""
    path = next(path for path in BEFORE if path.stem == method)
    document = json.loads(path.read_text())
    flags = document["flags"].split()
    assert changed_fields(document["config"], resolve(flags).to_json()) == ["holdout: 500 -> 0"]
    kept = continued(flags, resolve(flags), document["config"])
    assert changed_fields(document["config"], kept.to_json()) == []


def test_runs_of_before_are_there() -> None:
    assert len(BEFORE) == 8


def test_ddp_warns_of_none_of_its_arguments():
    """PyTorch 2.15 has another name for leaving buffers alone, and warns of the old one in every rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2), **_without_buffers())
        assert not wrapped.broadcast_buffers
    finally:
        torch.distributed.destroy_process_group()
