"""The files of examples/launch: run where they can be, read where they cannot."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"

SCONTROL = (
    '#!/bin/bash\n[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"\n'
)
# Runs the command once per node, as srun does with one task per node, and ends with the worst status.
SRUN = """#!/bin/bash
for node in $(seq "$SLURM_NNODES"); do "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def slurm(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """slurm.sbatch as SLURM runs it: a copy, elsewhere, with the variables of a job of two nodes."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    copy = tmp_path / "slurm_script"
    copy.write_text((LAUNCH / "slurm.sbatch").read_text())
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "2",
        "RENDEZVOUS_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.run(
        ["bash", str(copy), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=1500,
        check=False,
    )


def test_slurm_starts_the_ranks_of_all_nodes(tmp_path: Path):
    file = tmp_path / "numbers.json"
    small = (
        "--steps",
        "1",
        "--layers",
        "1",
        "--width",
        "32",
        "--vocabulary",
        "64",
        "--length",
        "8",
    )
    done = slurm(
        *(tmp_path, "benchmarks/train_bench", "--strategy", "ddp", "ours@2"),
        *(*small, "--micro-steps", "1", "--json", str(file)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(file.read_text())
    assert (numbers["world_size"], numbers["ranks_per_node"]) == (4, 2)
    assert {record["parity"] for record in numbers["records"].values()} == {"exact"}


def test_slurm_passes_a_failure_on(tmp_path: Path):
    done = slurm(tmp_path, "benchmarks/train_bench", "--strategy", "ours@3")
    assert done.returncode != 0
    assert "P must divide the number of ranks: got 'ours@3' and 4 ranks." in done.stderr


def test_slurm_needs_a_script(tmp_path: Path):
    done = slurm(tmp_path)
    assert done.returncode == 2
    assert "got none" in done.stderr


def test_environment_keeps_what_is_set():
    script = f"source {LAUNCH / 'environment.sh'}; env"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "NCCL_SOCKET_IFNAME": "en"},
    )
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert found["NCCL_SOCKET_IFNAME"] == "en"
    assert found["FI_EFA_USE_HUGE_PAGE"] == "0"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def exported() -> dict[str, str]:
    """The variables of environment.sh."""
    text = (LAUNCH / "environment.sh").read_text()
    return dict(re.findall(r'^export (\w+)="\$\{\w+:-(.*?)\}"', text, re.MULTILINE))


def check_container(container: dict[str, Any]) -> None:
    assert {entry["name"]: entry["value"] for entry in container["env"]} == exported()
    assert container["volumeMounts"] == [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def check_command(command: list[str]) -> None:
    """The benchmark knows these options; it refuses the strategy for one rank and comes no further."""
    assert command[:2] == ["torchrun", "benchmarks/train_bench"]
    done = subprocess.run(
        ["python", *command[1:]], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert "P must divide the number of ranks: got 'ours@8' and 1 ranks." in done.stderr


def test_eks_has_a_runtime_and_a_job_on_it():
    runtime, job = documents("eks.yaml")
    assert (runtime["kind"], job["kind"]) == ("ClusterTrainingRuntime", "TrainJob")
    assert runtime["apiVersion"] == job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = replicated["template"]["spec"]["template"]["spec"]
    check_container(pod["containers"][0])
    assert [volume["name"] for volume in pod["volumes"]] == ["shared-memory"]
    trainer = job["spec"]["trainer"]
    check_command(trainer["command"] + trainer["args"])


def test_the_old_operator_gets_the_same_job():
    (job,) = documents("eks_pytorchjob.yaml")
    _, new = documents("eks.yaml")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    check_container(container)
    trainer = new["spec"]["trainer"]
    assert container["command"] + container["args"] == trainer["command"] + trainer["args"]
    assert container["resources"] == trainer["resourcesPerNode"]
    assert worker["replicas"] == trainer["numNodes"]


def test_parallelcluster_has_efa_and_a_placement_group():
    (cluster,) = documents("parallelcluster.yaml")
    (queue,) = cluster["Scheduling"]["SlurmQueues"]
    assert queue["ComputeResources"][0]["Efa"]["Enabled"] is True
    assert queue["Networking"]["PlacementGroup"]["Enabled"] is True


@pytest.mark.parametrize("name", ["slurm.sbatch"])
def test_the_command_in_a_comment_is_right(name: str):
    text = (LAUNCH / name).read_text().replace("\\\n#", "")
    (line,) = re.findall(r"^#\s+sbatch --nodes 16 \S+ (.*)$", text, re.MULTILINE)
    check_command(["torchrun", *shlex.split(line)])
