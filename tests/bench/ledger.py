"""What accounting costs in a training step: everything that would be gone if nobody counted FLOPs.

    OMP_NUM_THREADS=1 python tests/bench/ledger.py --folder DIR [SETTINGS]      default: experiment=smoke

Trains for real, one rank in this process, with a clock around each part: the sums of lengths of every batch, their
addition, the closed form of every window, the ledger's books, and the journal. What the clocks
themselves cost is in the figure.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the run and its data go")
    args, settings = parser.parse_known_args()
    settings = settings or ["experiment=smoke"]
    args.folder.mkdir(parents=True, exist_ok=True)
    words = ["train", "prepare", *settings, "engine.ranks=1", "track.wandb=disabled", f"root={args.folder}/runs"]
    done = subprocess.run(
        [sys.executable, "-m", "mmtrain", *words, f"data_dir={args.folder}/data"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    run = Path(done.stdout.splitlines()[-1])

    from mmtrain.flops import Journal, Ledger
    from mmtrain.train import token_learner, worker
    from mmtrain.train.launch import free_port
    from mmtrain.train.window import Window

    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            since = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - since

        return call

    token_learner.work_sums = timed("sums of lengths, each step", token_learner.work_sums)
    Window.add_work = timed("addition, each step", Window.add_work)
    token_learner.flops_from_sums = timed("closed form, each log row", token_learner.flops_from_sums)
    token_learner.split_by_kind = timed("closed form, each log row", token_learner.split_by_kind)
    Ledger.book_training = timed("books, each log row", Ledger.book_training)
    Journal.write = timed("journal, each log row", Journal.write)

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    sys.argv = ["worker", "--run-dir", str(run)]
    if code := worker.main():
        sys.exit(code)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, whole, before = rows[-1]["step"], 0.0, 0
    for row in rows:
        if "step_seconds" in row:
            whole += row["step_seconds"] * (row["step"] - before)
            before = row["step"]
    print(f"\n{steps} steps of {1e3 * whole / steps:.2f} ms, a log row each {rows[0]['step']} steps")
    for name, seconds in spent.items():
        print(f"{name:<36}{1e6 * seconds / steps:9.2f} us a step  {seconds / whole:8.4%}")
    print(f"{'all':<36}{1e6 * sum(spent.values()) / steps:9.2f} us a step  {sum(spent.values()) / whole:8.4%}")


if __name__ == "__main__":
    main()
