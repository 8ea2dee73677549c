"""`mmtrain doctor`: what is wrong is named with its mend, nothing crashes it, and its all-reduce is a real one."""

import json
import os
import socket
import threading
import time
from copy import deepcopy
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mmtrain import cli
from mmtrain.config import EngineConfig, UserError
from mmtrain.config.compose import compose, freeze
from mmtrain.shards import DocumentShards
from mmtrain.train.all_reduce import CONNECTED, DONE, Note
from mmtrain.train.run import Artifacts
from mmtrain.verbs import doctor, doctor_data, doctor_machine, doctor_network, doctor_storage, prepare
from mmtrain.verbs.doctor_versions import known_bad


@cache
def smoke():
    return compose(["experiment=smoke"])


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return deepcopy(smoke())


def findings(check, config):
    return [(finding.status, finding.detail) for finding in check(config)]


def test_a_check_that_raises_is_a_failure_with_its_line_and_the_others_go_on(config, monkeypatch, capsys):
    def broken(config):
        yield doctor.Check("half", "warn", "a limit", "mend it")
        raise RuntimeError("first line\nsecond line")

    def mistaken(config):
        raise UserError("give another file")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (broken, mistaken, doctor_machine.check_python))
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"pass": 1, "warn": 1, "fail": 2}
    assert [check["detail"] for check in found["checks"][:3]] == ["a limit", "first line", "give another file"]
    assert found["checks"][0]["mend"] == "mend it"
    monkeypatch.setattr(doctor, "CHECKS", (broken,))
    assert cli.main(["doctor"]) == 1 and "FAIL  broken" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "CHECKS", (doctor_machine.check_python,))
    assert cli.main(["doctor"]) == 0


@pytest.mark.parametrize(("versions", "sources"), [
    ({"deepspeed": "0.18.7", "torch": "2.10.0"}, ["#7985", "#7965, #7981", "#7951, #8024", "#8090, #8141, #8056"]),
    ({"deepspeed": "0.18.5", "torch": "2.13.0+cpu"}, ["#7965, #7981", "#8090, #8141, #8056"]),
    ({"deepspeed": "0.19.8", "torch": "2.13.0+cpu", "hydra-core": "1.3.8", "pillow": "13.0.0"}, []),
    ({"hydra-optuna-sweeper": "1.3.0", "optuna": "5.0.0"}, ["requirements"]),
    ({"hydra-optuna-sweeper": "1.3.0", "optuna": "2.10.1"}, []),
])  # fmt: skip
def test_versions_that_are_bad_together_are_known(versions, sources):
    found = [entry.source for entry, _ in known_bad(versions)]
    assert len(found) == len(sources) and all(want in said for want, said in zip(sources, found, strict=True))


def test_checkpoints_that_do_not_fit_are_a_failure(config, monkeypatch):
    ((status, detail),) = findings(doctor_storage.check_checkpoints, config)
    assert status == "pass" and "2 kept" in detail
    config.model = replace(config.model, layers=80, width=8192, heads=64)
    ((status, detail),) = findings(doctor_storage.check_checkpoints, config)
    assert status == "fail" and "GiB each" in detail


def test_a_source_is_decoded_and_a_damaged_one_named(shapes, tmp_path):
    config, _ = shapes
    ((status, detail),) = findings(doctor_data.check_sources, config)
    assert status == "pass" and "64 documents" in detail and "1 pictures decoded (32x32)" in detail
    elsewhere = replace(config, data_dir=str(tmp_path))
    assert "not built yet" in findings(doctor_data.check_sources, elsewhere)[0][1]
    folder = prepare.documents_folder(config, "shapes")
    copy = Path(str(folder).replace(config.data_dir, str(tmp_path)))
    copy.parent.mkdir(parents=True)
    os.system(f"cp -r '{folder}' '{copy}'")
    tar = copy / "train" / "shard-000000.tar"
    shards = DocumentShards(copy / "train")
    data = bytearray(tar.read_bytes())
    start = data.index(shards[0].images[0].data[:16])
    data[start : start + 64] = bytes(64)
    tar.write_bytes(data)
    ((status, detail),) = findings(doctor_data.check_sources, elsewhere)
    assert status == "fail" and "cannot be decoded" in detail
    missing = compose(["corpus=pairs", "corpus.path=nowhere"])
    ((status, detail),) = findings(doctor_data.check_sources, missing)
    assert status == "fail" and "nowhere does not exist" in detail


def test_the_vocabulary_of_shards_and_run_is_compared_with_the_model(shapes, tmp_path):
    config, corpus = shapes
    ((status, detail),) = findings(doctor_data.check_vocabulary, config)
    assert status == "pass" and "has that of the model" in detail
    other = compose(["experiment=smoke", "image_tokenizer.levels=[5,5]", f"data_dir={config.data_dir}"])
    assert "1 there are of other settings" in findings(doctor_data.check_vocabulary, other)[0][1]
    run = tmp_path / "smoke"
    run.mkdir()
    freeze(config, run / "config.yaml")
    tokens = next(corpus.folder.glob("tokens-*"))
    documents, image = (next(corpus.folder.glob(f"{name}-*")) for name in ("documents", "image"))
    Artifacts({"shapes": documents}, corpus.folder, image, {"shapes": tokens}, {}).save(run)
    ((status, detail),) = findings(doctor_data.check_vocabulary, replace(other, root=str(tmp_path)))
    assert status == "fail" and "64 image codes" in detail and "25 image codes" in detail


def test_a_port_that_is_taken_and_an_interface_that_is_not_there_are_failures(config, monkeypatch):
    assert findings(doctor_network.check_port, config)[0][0] == "pass"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ((status, detail),) = findings(
            doctor_network.check_port, replace(config, engine=EngineConfig(master_port=port))
        )
    assert status == "fail" and str(port) in detail
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    found = findings(doctor_network.check_interfaces, config)
    assert ("fail", "GLOO_SOCKET_IFNAME names nosuch0, which is not up here") in found
    assert found[0][0] == "pass" and "127.0.0.1" in found[0][1]


def test_infiniband_ports_are_read(tmp_path):
    for number, state in ((1, "4: ACTIVE"), (2, "1: DOWN")):
        port = tmp_path / "mlx5_0" / "ports" / str(number)
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    ports = list(doctor_network._infiniband(tmp_path))
    assert ports == [("mlx5_0/1 200 Gb/sec (4X HDR)", True), ("mlx5_0/2 200 Gb/sec (4X HDR)", False)]


@pytest.mark.slow
def test_ranks_of_this_machine_sum_and_one_that_cannot_connect_is_named(config, monkeypatch, tmp_path):
    config.engine.ranks = 2
    ((status, detail),) = findings(doctor_network.check_all_reduce, config)
    assert status == "pass" and "2 ranks of this machine, gloo: 4 MiB summed" in detail
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    began = time.monotonic()
    ((status, detail),) = findings(doctor_network.check_all_reduce, config)
    assert status == "fail" and "nosuch0" in detail and f"on {socket.gethostname()}" in detail
    assert time.monotonic() - began < doctor_network.LIMIT_SECONDS
    assert list(tmp_path.glob(".mmtrain-doctor-*")) == []


def test_time_is_limited_and_nothing_is_left_running(config, monkeypatch):
    config.engine.ranks = 2
    monkeypatch.setattr(doctor_network, "WHOLE_SECONDS", 0.3)
    ((status, detail),) = findings(doctor_network.check_all_reduce, config)
    assert status == "fail" and "within 0 s" in detail
    here = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert not any(doctor_network.SUM.encode() in line and os.fsencode(config.root) in line for line in here)


def test_what_the_ranks_left_says_who_is_missing():
    hosts = {"node-1": 2, "node-2": 1}
    notes = {0: Note(0, "node-1", DONE, "", "gloo", 0.01, 100.0), 1: Note(1, "node-1", CONNECTED, backend="gloo")}
    (absent,) = doctor_network.judge(notes, 3, hosts, 10.0, "ssh: lost")
    assert absent.status == "fail" and "ranks 2 did not start" in absent.detail and "ssh: lost" in absent.detail
    (stuck,) = doctor_network.judge(notes | {2: Note(2, "node-2", DONE)}, 3, hosts, 10.0, "")
    assert "rank 1 on node-1 connected" in stuck.detail and "firewall" in stuck.mend
    done = {rank: Note(rank, f"node-{rank}", DONE, "", "nccl", 0.001, 100.0 + 60 * rank) for rank in range(3)}
    well, clocks = doctor_network.judge(done, 3, hosts, 10.0, "")
    assert well.status == "pass" and "nccl: 4 MiB summed in 1.0 ms" in well.detail
    assert clocks.status == "warn" and "differ by 120 s" in clocks.detail


class Refusing(BaseHTTPRequestHandler):
    """A W&B server that knows no key."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"errors": [{"message": "permission denied"}]}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_wandb_offline_without_a_key_and_with_one_that_is_refused(config, monkeypatch):
    assert findings(doctor_network.check_tracking, config)[0][0] == "pass"
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.setenv("HOME", "/nonexistent")
    config.track.wandb = "online"
    assert findings(doctor_network.check_tracking, config)[0] == ("fail", "track.wandb=online, but no API key is set")
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    key = "a1b2" * 10
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("WANDB_MODE")
    ((status, detail),) = findings(doctor_network.check_tracking, config)
    server.shutdown()
    assert status == "fail" and "does not take the key" in detail and key not in detail
