"""How processes are started."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import torch
import yaml

from mmtrain.config import Config, UserError
from mmtrain.train.forward import environment_script, launcher_environment, write_environment
from mmtrain.train.hosts import end_workers, fit, read_hostfile, write_hostfile
from mmtrain.train.launch import check_batch, launch_command, num_ranks

SCRIPTS = Path(__file__).parents[2] / "launch"
HOSTS = {"node-1": 2, "node-2": 1}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of fake programs that come first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def test_one_machine_uses_the_loopback_interface_and_a_free_port(tmp_path: Path) -> None:
    config = Config()
    config.engine.ranks = 2
    (command, environment), (other, _) = (launch_command(tmp_path, config, {}) for _ in range(2))
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_gpus") + 1] == "2"
    assert command[command.index("--master_addr") + 1] == "127.0.0.1"
    assert command[-4:] == ["--module", "mmtrain.train.worker", "--run-dir", str(tmp_path)]
    port = command.index("--master_port") + 1
    assert 1024 < int(command[port]) < 65536 and command[port] != other[port]
    assert int(environment["OMP_NUM_THREADS"]) >= 1


def test_the_chosen_gpus_are_used_and_not_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = Config()
    config.engine.ranks = 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    command, environment = launch_command(tmp_path, config, {})
    assert command[command.index("--include") + 1] == "localhost:4,6"
    assert "CUDA_VISIBLE_DEVICES" not in environment
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,GPU-1c2d")
    with pytest.raises(UserError, match="does not name 2 devices by their numbers"):
        launch_command(tmp_path, config, {})


def test_a_host_is_reached_over_ssh_also_when_it_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    command, environment = launch_command(tmp_path, Config(), {"node-2": 8})
    assert "--force_multi" in command and "--num_gpus" not in command
    assert Path(command[command.index("--hostfile") + 1]).read_text() == "node-2 slots=8\n"
    script = Path(command[command.index("--venv_script") + 1])
    assert script.stat().st_mode & 0o777 == 0o600 and "NCCL_DEBUG" in script.read_text()
    assert "NCCL_DEBUG" not in environment and "BatchMode=yes" in environment["PDSH_SSH_ARGS_APPEND"]


def test_a_path_that_a_remote_shell_would_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="remote shell"):
        launch_command(tmp_path / "a$(b)", Config(), {"node-2": 8})


@pytest.mark.parametrize("value", ["", "plain", "a b", "it's", '"q" $(false) `false` \\ ; # & *', "two\nlines", "é"])
def test_a_forwarded_value_reaches_the_other_shell_unchanged(value: str, tmp_path: Path) -> None:
    script = write_environment(tmp_path, {"WANDB_NOTES": value})
    shell = f"source {script}; exec {sys.executable} -c 'import os; print(ascii(os.environ[\"WANDB_NOTES\"]))'"
    found = subprocess.run(["bash", "-c", shell], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert found.stdout.strip() == ascii(value), found.stderr


def test_what_is_forwarded_and_what_stays_here() -> None:
    forwarded = ["NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "WANDB_API_KEY", "HF_TOKEN", "OMP_NUM_THREADS", "PYTHONPATH"]
    forwarded += ["DS_ACCELERATOR", "TORCH_NCCL_DUMP_ON_TIMEOUT", "https_proxy", "LD_LIBRARY_PATH"]
    here = ["HOME", "PATH", "SSH_AUTH_SOCK", "CUDA_VISIBLE_DEVICES", "FILE", "BASH_FUNC_x%%"]
    script = environment_script(dict.fromkeys([*forwarded, *here], "x"))
    assert sorted(line.split("=")[0] for line in script.splitlines()) == sorted(f"export {name}" for name in forwarded)


def test_deepspeed_gets_nothing_to_put_on_a_command_line_but_the_path_of_the_program() -> None:
    environment = dict.fromkeys(["MLFLOW_TRACKING_TOKEN", "NCCL_DEBUG", "PYTHONSTARTUP", "PYTHONPATH", "HOME"], "x")
    assert launcher_environment(environment).keys() == {"PYTHONPATH", "HOME"}


def test_a_hostfile_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_hostfile(tmp_path / "hosts", HOSTS)
    assert read_hostfile(tmp_path / "hosts") == HOSTS
    assert read_hostfile(SCRIPTS / "hostfile.example") == {"node-1": 8, "node-2": 8}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("node-1 slots=2\nnode-2", r"line 2: 'node-2' is not `HOST slots=NUMBER`"),
        ("node-1 slots=0", "line 1"),
        ("-oProxyCommand=id slots=1", "line 1"),
        ("node-[1-9] slots=1", "line 1"),
        ("node-1 slots=1\nnode-1 slots=1", "node-1 is there twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_hostfile(tmp_path / "hosts")


def test_a_missing_hostfile_is_never_one_machine() -> None:
    config = Config()
    config.engine.hostfile = "nowhere/hosts"
    with pytest.raises(UserError, match=r"hosts does not exist; see launch/hostfile\.example"):
        num_ranks(config)


def test_ranks_are_what_the_config_or_the_hostfile_says(tmp_path: Path, programs: Path) -> None:
    config = Config()
    config.engine.ranks = 3
    assert num_ranks(config) == 3
    write_hostfile(tmp_path / "hosts", {"node-1": 4, "node-2": 4})
    config.engine.hostfile = str(tmp_path / "hosts")
    program(programs, "pdsh", ":"), program(programs, "ssh", ":")
    assert num_ranks(config) == 8


@pytest.mark.parametrize(
    ("batch", "micro", "expected"),
    [(12, 0, {"a": 4, "b": 2}), (8, 0, {"a": 4}), (7, 0, {"a": 4, "b": 3}), (8, 4, {"a": 2}), (3, 2, {})],
)
def test_the_largest_number_of_ranks_that_divides_the_batch(batch: int, micro: int, expected: dict[str, int]) -> None:
    config = Config()
    config.stream.global_batch, config.engine.micro_batch = batch, micro
    assert fit({"a": 4, "b": 3}, config) == expected


def test_only_own_workers_are_ended_on_hosts_that_answer(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "ssh", '[ "${@: -2:1}" != gone ] && exec sh -c "${@: -1}"')
    hosts = importlib.import_module("mmtrain.train.hosts")
    own, other = (subprocess.Popen(["sleep", "60"], env={"MMTRAIN_PARENT": mark}) for mark in (hosts.PARENT[1], "else"))
    try:
        assert end_workers(["here", "gone"]) == ["here"]
        assert own.wait(timeout=10) == -9 and other.poll() is None
    finally:
        own.kill(), other.kill()


@pytest.mark.parametrize(("batch", "ranks", "micro"), [(16, 3, 0), (16, 2, 3), (2, 4, 0)])
def test_a_batch_that_does_not_divide_is_refused(batch: int, ranks: int, micro: int) -> None:
    config = Config()
    config.stream.global_batch, config.engine.micro_batch = batch, micro
    with pytest.raises(UserError, match=r"global_batch|micro_batch"):
        check_batch(config, ranks)


def test_a_batch_that_divides_passes() -> None:
    config = Config()
    config.stream.global_batch, config.engine.micro_batch = 24, 4
    check_batch(config, 3)


NODE = {"NNODES": "2", "RANKS_PER_NODE": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


def worker_script(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **variables}
    command = ["bash", str(SCRIPTS / "worker.sh"), "--run-dir", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)


def test_the_script_starts_the_ranks_of_a_node(tmp_path: Path, programs: Path) -> None:
    program(programs, "python", 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $*"')
    done = worker_script(tmp_path, **NODE)
    words = f"4 -m mmtrain.train.worker --run-dir {tmp_path}"
    assert sorted(done.stdout.splitlines()) == [f"2 0 {words}", f"3 1 {words}"] and done.returncode == 0


def test_the_script_starts_the_rank_of_a_slurm_task(tmp_path: Path, programs: Path) -> None:
    program(programs, "python", 'echo "$RANK $LOCAL_RANK $WORLD_SIZE"')
    done = worker_script(tmp_path, SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_NTASKS="8")
    assert done.stdout == "5 1 8\n"


def test_the_script_ends_all_ranks_when_one_fails_and_keeps_its_code(tmp_path: Path, programs: Path) -> None:
    program(programs, "python", '[ "$RANK" = 2 ] && exit 2; exec sleep 60')
    assert worker_script(tmp_path, **NODE).returncode == 2


def test_a_stopped_run_has_a_code_of_its_own_where_one_is_asked_for(tmp_path: Path, programs: Path) -> None:
    program(programs, "python", ":")
    for state, code in (("stopped", 75), ("finished", 0)):
        (tmp_path / "status.json").write_text(f'{{"state": "{state}", "step": 3}}')
        assert worker_script(tmp_path, **NODE, MMTRAIN_STOPPED_CODE="75").returncode == code


def test_the_kubernetes_manifest_is_valid() -> None:
    documents = list(yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, "1.30", strict=True)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]"}


@pytest.mark.parametrize(
    ("state", "saved", "fruitless", "srun", "code", "requeued"),
    [
        ("finished", True, 0, 0, 0, False),
        ("stopped", True, 2, 0, 0, True),
        ("running", False, 0, 1, 0, True),
        ("running", True, 2, 1, 0, True),
        ("running", False, 2, 1, 1, False),
        ("failed", True, 0, 2, 2, False),
        ("running", False, 2, 0, 1, False),
    ],
)
def test_the_slurm_job_queues_itself_again_when_that_helps(
    state: str, saved: bool, fruitless: int, srun: int, code: int, requeued: bool, tmp_path: Path, programs: Path
) -> None:
    run, submitted = tmp_path / "run", tmp_path / "submitted"
    run.mkdir()
    (run / "fruitless-starts").write_text("earlier\n" * fruitless)
    (submitted / "launch").mkdir(parents=True)
    (submitted / "launch" / "environment.sh").write_text("mmtrain_root=$SLURM_SUBMIT_DIR\n")
    program(programs, "mmtrain", f'echo "$*" >{tmp_path}/prepared; echo building; echo {run}')
    program(programs, "scontrol", f'echo "$*" >>{tmp_path}/scontrol; [ "$1" = requeue ] || printf "node-1\\nnode-2\\n"')
    step = f"mkdir -p {run}/checkpoints/step-00000003; " if saved else ""
    say = f'echo \'{{"state": "{state}"}}\' >{run}/status.json; echo "$MASTER_ADDR"'
    program(programs, "srun", f"{step}{say}; exit {srun}")
    done = subprocess.run(
        ["bash", str(SCRIPTS / "slurm.sbatch"), "name=mine"],
        env={"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(submitted), **SLURM},
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert done.returncode == code and "node-1\n" in done.stdout, done.stderr
    assert (tmp_path / "prepared").read_text() == "train prepare name=mine\n"
    assert ("requeue 7" in (tmp_path / "scontrol").read_text()) == requeued
