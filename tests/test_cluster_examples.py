"""The cluster example: its commands are ones that the programs take, and its manifest fits together."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from models.ops import host_library
from tools import make_ffcv_dataset, slurm
from tools.support.cli import call
from train.resolve import resolve

EXAMPLES = Path(__file__).resolve().parents[1] / "tools" / "examples"


@pytest.fixture
def documents() -> dict[str, dict]:
    """The manifest's objects by kind."""
    yaml = pytest.importorskip("yaml")
    return {each["kind"]: each for each in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())}


def test_the_manifest_starts_a_training_that_is_possible(documents):
    job, service = documents["Job"]["spec"], documents["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][-1] == "torchrun" and job["completionMode"] == "Indexed"
    launcher = get_args_parser().parse_args(
        [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    )
    assert launcher.module and launcher.training_script == "regatta"
    command, *training = launcher.training_script_args
    config = resolve(training)
    assert command == "train" and config.run.data and config.run.method == "regioncl-m"
    # As many machines and processes as there are pods and GPUs, and a batch that divides over them.
    assert int(launcher.nnodes) == job["completions"] == job["parallelism"]
    assert int(launcher.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert config.recipe.global_batch % (int(launcher.nnodes) * int(launcher.nproc_per_node)) == 0
    # Pods meet at a name that the service gives the first of them.
    name, domain = launcher.master_addr.split(".")
    assert name == f"{documents['Job']['metadata']['name']}-0" and service["spec"]["clusterIP"] == "None"
    assert domain == service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": documents["Job"]["metadata"]["name"]}
    assert "JOB_COMPLETION_INDEX" in [variable["name"] for variable in container["env"]]
    # Data, runs and shared memory are where the command looks for them, and a pod may save before it goes.
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]} and "/dev/shm" in mounts
    assert all(any(path.startswith(f"{mount}/") for mount in mounts) for path in (config.run.data, config.run.run_dir))
    assert pod["terminationGracePeriodSeconds"] >= 120 and pod["restartPolicy"] == "OnFailure"


def test_the_image_copies_what_the_wheel_is_made_of():
    text = (EXAMPLES / "Dockerfile").read_text()
    root = EXAMPLES.parents[1]
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert all((root / name).exists() for name in copied)
    assert {"pyproject.toml", "LICENSE", "README.md", "pipeline", "models", "train", "tools"} == set(copied)
    assert 'ENTRYPOINT ["tini", "--", "regatta"]' in text
    assert "RUN python -m regatta.pipeline.native_build" in text and find_spec("pipeline.native_build") is not None
    assert "from regatta.models.ops.host_library import main; main()" in text and callable(host_library.main)


def test_the_commands_of_the_page(tmp_path, capsys):
    text = (EXAMPLES / "cluster.md").read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines() if line.strip()]
    (written,) = [words for words in lines if "tools/slurm.py" in words]
    own = ["--output", str(tmp_path / "s"), "--logs", str(tmp_path / "logs")]
    assert call(slurm.main, [*own, *written[2:]]) == 0
    assert "--method regioncl-m" in (tmp_path / "s").read_text()
    (wrapped,) = [words[-1] for words in lines if words[0] == "sbatch" and "--wrap" in words]
    packing = [words for words in (*lines, shlex.split(wrapped)) if "tools/make_ffcv_dataset.py" in words]
    assert len(packing) == 3
    capsys.readouterr()
    for words in packing:
        # The flags are taken; what is missing is the folder, Ray, or the task of an array.
        assert call(make_ffcv_dataset.main, words[2:]) == 2
        assert re.search("/data/photos does not exist|pip install ray|no task of an array", capsys.readouterr().err)
