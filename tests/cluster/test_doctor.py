"""`mmtrain doctor` with a hostfile: the all-reduce goes over ssh to every host, and a host that is gone is named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.box import Box
from tests.e2e.conftest import environment

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]
# The checks of the network alone: the others are of one machine.
PROGRAM = """
import sys
from mmtrain import cli
from mmtrain.verbs import doctor, doctor_network
doctor.CHECKS = (doctor_network.check_port, doctor_network.check_all_reduce)
sys.exit(cli.main(["doctor", "--json", "experiment=smoke", "engine.hostfile=hostfile"]))
"""


def doctor(box: Box, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    command = [*box.command("head"), "env", f"--chdir={folder}", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["checks"]


def test_every_host_takes_part_and_one_that_is_unplugged_is_named(box: Box, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("node-1 slots=2\nnode-2 slots=1\n")
    code, (port, reduced) = doctor(box, tmp_path)
    assert code == 0 and port["detail"] == "29500 is free"
    assert reduced["detail"].startswith("3 ranks on node-1, node-2, gloo: 4 MiB summed in"), reduced
    box.unplug("node-2")
    code, (_, lost, reduced) = doctor(box, tmp_path)
    assert code == 1 and lost["status"] == "fail" and lost["detail"].startswith("node-2 does not answer")
    assert reduced["status"] == "pass" and reduced["detail"].startswith("2 ranks on node-1, gloo"), reduced
    left = [words for name in box.names for words in box.processes(name).values()]
    assert not any("all_reduce" in word for words in left for word in words)
    assert os.listdir(tmp_path) == ["hostfile"]
