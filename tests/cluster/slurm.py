"""A real Slurm in the box: munge and slurmctld on the first host, munge and slurmd on the others.

    python -m tests.cluster.slurm       # in a box that is up (Debian: slurmctld slurmd slurm-client munge)
    export SLURM_CONF=/tmp/mmtrain-box/slurm.conf
    python -m tests.cluster.box run head sinfo
"""

import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.box import Box, default_folder

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# Control groups belong to the machine around the box: processes are tracked by their parents. SlurmdParameters:
# the nodes do not have the CPUs and the memory that they claim. Times are short, so that tests of faults are.
CONFIG = """
ClusterName=box
SlurmctldHost={head}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/slurmctld
SlurmdSpoolDir={folder}/slurmd-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
AuthInfo=cred_expire=5
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName={nodes} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Slurm on a box that is up; its first host is where jobs are submitted."""

    def __init__(self, box: Box) -> None:
        self.box, self.head, self.nodes = box, box.names[0], box.names[1:]
        self.config = box.folder / "slurm.conf"

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        self.config.write_text(CONFIG.format(folder=self.box.folder, head=self.head, nodes=",".join(self.nodes)))
        key = self.box.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._munge(self.head)
        (self.box.folder / "slurmctld").mkdir()
        self.box.check(self.head, "slurmctld", "-f", str(self.config))
        for name in self.nodes:
            self.start_node(name)
        self.wait(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "the nodes are not idle")

    def start_node(self, name: str) -> None:
        """Start the daemons of a node that has just been switched on."""
        self._munge(name)
        (self.box.folder / f"slurmd-{name}").mkdir(exist_ok=True)
        self.box.check(name, "slurmd", "-f", str(self.config))

    def __call__(self, *words: str) -> str:
        """Run a Slurm command on the first host; returns its output."""
        return self.box.check(self.head, "env", f"SLURM_CONF={self.config}", *words)

    def submit(self, folder: Path, *words: str, **variables: str) -> str:
        """`sbatch WORDS` in a folder, with variables for the job; returns its id."""
        settings = [f"{name}={value}" for name, value in variables.items()]
        return self("env", f"--chdir={folder}", *settings, "sbatch", "--parsable", *words).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, ExitCode, ..."""
        words = self("scontrol", "--oneliner", "show", "job", job).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def states(self) -> dict[str, str]:
        """State of each node: idle, alloc, down, ..."""
        rows = self("sinfo", "-hN", "-o", "%N %t").splitlines()
        return dict(row.split() for row in rows)

    def wait(self, condition: Callable[[], bool], complaint: str, seconds: float = 60) -> None:
        """Wait for a condition; raises TimeoutError with the complaint and the end of the controller's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = (self.box.folder / "slurmctld.log").read_text()[-2000:]
                raise TimeoutError(f"{complaint} after {seconds:.0f} s: {self.states()}\n{log}")
            time.sleep(0.1)

    def _munge(self, name: str) -> None:
        # As root, not as the user munge, who may not read our folder: --force takes that for a warning.
        words = ("--force", f"--key-file={self.box.folder}/munge.key", f"--log-file={self.box.folder}/munge-{name}.log",
                 f"--seed-file={self.box.folder}/munge-{name}.seed")  # fmt: skip
        self.box.check(name, "sh", "-c", 'mkdir -m 755 /run/munge && exec munged "$@"', "munged", *words)


def missing() -> str:
    """What this machine lacks for Slurm, as a reason; empty when nothing."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    return f"Slurm needs {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)" if absent else ""


if __name__ == "__main__":
    Slurm(Box(default_folder())).start()
