"""docs/reliability.md from the rows that the fault tests wrote.

MMTRAIN_FAULT_REPORT=faults.jsonl MMTRAIN_CI=1 bash launch/test.sh
python -m tests.faults.report faults.jsonl > docs/reliability.md
"""

import json
import sys
from datetime import date
from pathlib import Path

HEAD = """\
# What breaks, and what then happens

Every row below is a test that breaks something on purpose: real processes in a real process group (gloo, CPU), real
files, signals, servers, hosts (network namespaces with an sshd each) and a real Slurm. The tests write the table:

```bash
MMTRAIN_FAULT_REPORT=faults.jsonl MMTRAIN_CI=1 bash launch/test.sh
python -m tests.faults.report faults.jsonl > docs/reliability.md
```

*Recovery* is the time from the new start to the first step that is done, without the launcher and the imports
of torch and DeepSpeed; the machine has two cores, and starts two ranks. *Lost* counts steps that were logged and had to
be done again, where a checkpoint is written every 8 steps (every 3 where ranks are killed at random moments).
*Bit-equal* means: loss by modality, gradient norm, learning rate, tokens and FLOPs of every step, and parameters and
moments at the end, compared without any tolerance with a run that nothing happened to. So no data was lost or read
twice.

| fault | promise | seen | recovery | steps lost |
|---|---|---|---|---|
"""
TAIL = """
What cannot be tested on the machines that this was written on: GPUs that fail, NCCL, file systems shared over a
network, and hosts that lie. What is not promised:

- A step can only be as exact as its kernels. On CPU all are; on CUDA some sums depend on the order of threads.
- A checkpoint is as durable as the file system's `fsync`.
- A process that keeps Python's global lock is ended by a second watchdog with exit code 1 and no mark, and a process
  stopped for longer than a section's limit (SIGSTOP, a frozen virtual machine) may be taken for hanging.

How it works: [checkpoints](explanation/checkpoints.md), [the engine](explanation/engine.md),
[many nodes](how-to/many-nodes.md).
"""


def main(path: Path) -> str:
    """The page."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        recovery = "" if row["recovery"] is None else f"{row['recovery']:.1f} s"
        lost = "" if row["lost"] is None else str(row["lost"])
        lines.append(f"| {row['fault']} | {row['promise']} | {row['seen']} | {recovery} | {lost} |")
    table = "\n".join(lines)
    return f"{HEAD}{table}\n\nMeasured on {date.today()}.\n{TAIL}"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])), end="")
