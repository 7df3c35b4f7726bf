"""The files in launch/ are read by what reads them, or by its rules where that isn't there, and start this program."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from likely.config import SETTINGS_OF_TRAINING

LAUNCH = Path(__file__).parent.parent / "launch"


def flags_of(words: list[str]) -> dict[str, str]:
    """What torchrun is given, and after it `likely train`: both must know their flags."""
    told = get_args_parser().parse_args([word.removeprefix("torchrun") for word in words if word != "torchrun"])
    assert told.module
    assert told.training_script == "likely"
    verb, *flags = told.training_script_args
    assert verb == "train"
    joined = [flag for word in flags for flag in word.split("=", 1)]
    names = [name.removeprefix("--").replace("-", "_") for name in joined[::2]]
    assert set(names) <= set(SETTINGS_OF_TRAINING), names
    return {**vars(told), **dict(zip(names, joined[1::2], strict=True))}


def run_with(script: str, tmp_path: Path, environment: dict[str, str], *arguments: str) -> list[str]:
    """The words that a shell script starts torchrun with; what it needs of its system is played."""
    played = {
        "torchrun": 'printf "%s\\n" torchrun "$@" > "$SAID"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": "echo host-1; echo host-2",
    }
    for name, text in played.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SAID": str(said), "HOME": str(tmp_path), **environment}
    (tmp_path / "likely" / "bin").mkdir(parents=True)
    (tmp_path / "likely" / "bin" / "torchrun").symlink_to(tmp_path / "torchrun")
    subprocess.run(["bash", "-c", script, "slurm.sbatch", *arguments], env=environment, check=True, timeout=20)
    return said.read_text(encoding="utf-8").splitlines()


def test_slurm(tmp_path: Path) -> None:
    script = (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8")
    assert script.startswith("#!/bin/bash\n")
    slurm = {"SLURM_JOB_NODELIST": "host-[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "17"}
    told = flags_of(run_with(script, tmp_path, slurm, "--model", "M", "--data", "my rows.jsonl", "--output", "RUN"))
    assert (told["nnodes"], told["nproc_per_node"], told["rdzv_endpoint"]) == ("2", "8", "host-1:29500")
    assert (told["rdzv_backend"], told["rdzv_id"], told["max_restarts"]) == ("c10d", "17", 3)
    assert told["data"] == "my rows.jsonl"
    if shutil.which("sbatch"):
        subprocess.run(["sbatch", "--test-only", LAUNCH / "slurm.sbatch"], check=True, timeout=60)
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert all(line.split("=")[0].startswith("#SBATCH --") and " " not in line[8:].strip() for line in directives)


def test_kubeflow() -> None:
    job: dict[str, Any] = yaml.safe_load((LAUNCH / "kubeflow.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert set(job["spec"]) == {"runtimeRef", "trainer", "podTemplateOverrides"}
    trainer = job["spec"]["trainer"]
    # The fields of v1alpha1's Trainer.
    assert set(trainer) <= {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"}
    told = flags_of([*trainer["command"], *trainer["args"]])
    assert told["resume"] == "newest"
    (pods,) = (override["spec"] for override in job["spec"]["podTemplateOverrides"])
    mounts = {mount["name"] for container in pods["containers"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pods["volumes"]}


def test_skypilot(tmp_path: Path) -> None:
    task: dict[str, Any] = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert set(task) <= {"name", "resources", "num_nodes", "envs", "workdir", "file_mounts", "setup", "run"}
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    told = flags_of(run_with(task["run"], tmp_path, {**sky, **task["envs"]}))
    assert (told["nnodes"], told["nproc_per_node"], told["rdzv_endpoint"]) == ("2", "8", "10.0.0.1:29500")
    assert told["output"] == "/shared/runs/1"
    assert shlex.split(task["setup"])


def test_skypilot_reads_its_file() -> None:
    skypilot = pytest.importorskip("sky", reason="SkyPilot is not installed")
    assert skypilot.Task.from_yaml(str(LAUNCH / "skypilot.yaml")).num_nodes == 2
