"""What `mmtrain plan` says against what DeepSpeed takes and sends, on this machine's CPU.

    OMP_NUM_THREADS=1 python tests/bench/plan.py --sizes 6x256 8x512 --ranks 1 2 4

Every size (LAYERS x WIDTH) trains at stages 0 to 3 in processes of its own; peaks are the sum of all tensors of a rank
at a time, bytes are those handed to torch's collectives in a step of two micro-batches, as a ring passes them on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "train" / "memory_cases.py"


def measure(size: str, ranks: int) -> dict[str, dict[str, list[int]]]:
    """What memory_cases.py writes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run([*launcher, str(CASES), str(out), *size.split("x")], env=environment, capture_output=True)
        if done.returncode:
            sys.exit(done.stderr.decode()[-4000:])
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["6x256", "8x512"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    print("| layers x width | ranks | stage | peak MB, measured | planned | | sent MB, measured | planned | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        for ranks in args.ranks:
            found = measure(size, ranks)
            for name, pair in found["sent"].items():
                cells = [_compared(found["memory"].get(name)), _compared(pair if ranks > 1 else None)]
                print(f"| {size} | {ranks} | {name} | {' | '.join(cells)} |", flush=True)


def _compared(pair: list[int] | None) -> str:
    if pair is None:
        return " | | "
    measured, planned = pair
    return f"{measured / 1e6:.1f} | {planned / 1e6:.1f} | {planned / measured - 1:+.1%}"


if __name__ == "__main__":
    main()
