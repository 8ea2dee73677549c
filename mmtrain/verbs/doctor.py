"""`mmtrain doctor`: is this machine ready, and if not, how to mend it."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict

from mmtrain.config import Config, UserError
from mmtrain.config.compose import compose
from mmtrain.track import redact
from mmtrain.verbs import doctor_data, doctor_machine, doctor_network, doctor_storage, doctor_versions
from mmtrain.verbs.doctor_machine import Check

MARKS = {"pass": "ok  ", "warn": "WARN", "fail": "FAIL"}
CHECKS: tuple[Callable[[Config], Iterator[Check]], ...] = (
    doctor_machine.check_python,
    doctor_machine.check_packages,
    doctor_versions.check_versions,
    doctor_machine.check_devices,
    doctor_machine.check_processor,
    doctor_machine.check_limits,
    doctor_storage.check_shared_memory,
    doctor_storage.check_disks,
    doctor_storage.check_checkpoints,
    doctor_machine.check_apt,
    doctor_data.check_sources,
    doctor_data.check_vocabulary,
    doctor_machine.check_deepspeed,
    doctor_network.check_interfaces,
    doctor_network.check_port,
    doctor_network.check_all_reduce,
    doctor_network.check_tracking,
)


def main(argv: list[str]) -> int:
    """Print every check (as JSON with --json); 0 when nothing fails, else 1."""
    as_json = "--json" in argv
    config = compose([word for word in argv if word != "--json"])
    findings = []
    for check in CHECKS:
        for finding in examine(check, config):
            findings.append(finding)
            if not as_json:
                mend = f"\n       mend: {finding.mend}" if finding.mend else ""
                print(f"{MARKS[finding.status]}  {finding.name:<15}{finding.detail}{mend}", flush=True)
    counts = {status: sum(finding.status == status for finding in findings) for status in MARKS}
    if as_json:
        print(json.dumps({"counts": counts, "checks": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(f"\n{counts['pass']} well, {counts['warn']} warnings, {counts['fail']} failures")
    return 1 if counts["fail"] else 0


def examine(check: Callable[[Config], Iterator[Check]], config: Config) -> Iterator[Check]:
    """The findings of a check; one that breaks off is itself a finding, and the others go on."""
    try:
        yield from check(config)
    except Exception as error:
        if os.environ.get("MMTRAIN_DEBUG") == "1":
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = check.__name__.removeprefix("check_").replace("_", " ")
        mend = "" if isinstance(error, UserError) else "MMTRAIN_DEBUG=1 says where"  # a user's mistake says how
        yield Check(name, "fail", redact(said), mend)
