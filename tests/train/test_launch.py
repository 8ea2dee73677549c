"""How processes are started."""

import sys
from pathlib import Path

import pytest

from mmtrain.config import Config, UserError
from mmtrain.train.launch import check_batch, launch_command, num_ranks


def test_one_machine_uses_the_loopback_interface_and_a_free_port(tmp_path: Path) -> None:
    config = Config()
    config.engine.ranks = 2
    (command, environment), (other, _) = (launch_command(tmp_path, config) for _ in range(2))
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_gpus") + 1] == "2"
    assert command[command.index("--master_addr") + 1] == "127.0.0.1"
    assert command[-4:] == ["--module", "mmtrain.train.worker", "--run-dir", str(tmp_path)]
    port = command.index("--master_port") + 1
    assert 1024 < int(command[port]) < 65536 and command[port] != other[port]
    assert int(environment["OMP_NUM_THREADS"]) >= 1


def test_the_hostfile_must_exist(tmp_path: Path) -> None:
    config = Config()
    config.engine.hostfile = str(tmp_path / "hosts")
    with pytest.raises(UserError, match=r"hosts does not exist; see launch/hostfile\.example"):
        launch_command(tmp_path, config)


def test_ranks_are_what_the_config_says() -> None:
    config = Config()
    config.engine.ranks = 3
    assert num_ranks(config) == 3


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
