"""`mmtrain data verify`: every byte of a corpus's documents and tokens against what was written."""

from dataclasses import asdict
from pathlib import Path

from mmtrain.config import Config, UserError
from mmtrain.shards import Manifest, ShardInfo, broken_seal, find_fault, manifest_faults, repeated_ids
from mmtrain.shards.store import MIRRORED
from mmtrain.track import closing_box
from mmtrain.verbs.build import SPLITS
from mmtrain.verbs.partitions import Result, Task, run_partitions


def main(config: Config, words: list[str]) -> int:
    """Check all that was built of the corpora, name every file at fault; exit code 1 if there is one."""
    if words:
        raise UserError(f"mmtrain data verify takes settings only, not {words[0]!r}; name the corpus with corpus=")
    artifacts = [
        path
        for name in config.sources
        for path in sorted(Path(config.data_dir, name).glob("*"))
        if path.name.startswith(("documents-", "tokens-"))
    ]
    if not artifacts:
        places = ", ".join(str(Path(config.data_dir, name)) for name in config.sources)
        raise UserError(f"there is nothing to verify in {places}; run `mmtrain data` first")
    artifacts = [path for path in artifacts if not (path / SPLITS[0] / MIRRORED).exists()]
    if not artifacts:
        raise UserError("these token shards are elsewhere: every file of them is verified when it is fetched")
    faults: list[str] = []
    tasks: list[Task] = []
    for artifact in artifacts:
        faults += broken_seal(artifact)
        for folder in (artifact / split for split in SPLITS):
            try:
                faults += [*manifest_faults(folder), *repeated_ids(folder)]
                manifest = Manifest.load(folder)
            except UserError as error:
                faults.append(str(error))
            else:
                tasks += [{"folder": str(folder), "kind": manifest.kind, **asdict(s)} for s in manifest.shards]
    results = run_partitions(check_shard, tasks, None, "verifying", config.data.processes, runner=config.runner)
    faults += [result["fault"] for result in results if result["fault"]]
    for fault in faults:
        print(f"  {fault}")
    num_documents = sum(result["documents"] for result in results)
    advice = f"{len(faults)}, named above: restore these files, or delete their folder and build it again"
    checked = f"{len(tasks):,} shards, {num_documents:,} documents in {len(artifacts)} folders"
    closing_box(f"verified {', '.join(config.sources)}", {"checked": checked, "faults": advice if faults else "none"})
    return 1 if faults else 0


def check_shard(task: Task) -> Result:
    """Work: one shard; its fault, or "", and how many documents it should hold."""
    shard = ShardInfo(**{key: value for key, value in task.items() if key not in ("folder", "kind")})
    return {"fault": find_fault(Path(task["folder"]), task["kind"], shard), "documents": shard.documents}
