"""Packages of Debian: what is kept of one, which links survive, and what is said where apt fails."""

import os
import subprocess
from pathlib import Path

import pytest

from mmtrain.config import UserError
from mmtrain.documents.debian import fetch_debian

PACKAGE = "some-pages"
OTHERWISE = "set corpus.path instead"


def fetch(cache: Path, package: str = PACKAGE) -> Path:
    return fetch_debian(package, (".html", ".png"), cache, OTHERWISE)


def fake_apt(folder: Path, monkeypatch, script: str) -> None:
    """An apt-get that runs `script`; the other programs stay."""
    folder.mkdir(exist_ok=True)
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def package(tmp_path: Path, need_command) -> Path:
    """A real .deb with links of all sorts."""
    need_command("dpkg-deb")
    tree = tmp_path / "tree"
    pages = tree / "usr/share/doc" / PACKAGE
    pages.mkdir(parents=True)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        f"Package: {PACKAGE}\nVersion: 1.2\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: pages\n"
    )
    for name in ("a.html", "a.PNG", "copyright", "program.js", "hidden.js"):
        (pages / name).write_text(f"content of {name}")
    links = {
        "relative.html": "a.html",
        "absolute.html": f"/usr/share/doc/{PACKAGE}/a.html",
        "chain.html": "relative.html",
        "other.html": "hidden.js",
        "machine.html": "/etc/hostname",
        "outside.png": "../../../../../../../../../../../../etc/hostname",
        "circle.html": "circle.html",
        "nothing.html": "nothing-there.html",
        "folder": ".",
    }
    for name, target in links.items():
        (pages / name).symlink_to(target)
    archive = tmp_path / f"{PACKAGE}_1.2_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, archive], check=True, capture_output=True)
    return archive


def test_wanted_files_are_kept_and_links_to_them_become_files(tmp_path, monkeypatch, package):
    fake_apt(tmp_path / "bin", monkeypatch, f'echo once >> {tmp_path}/calls\ncp {package} .')
    root = fetch(tmp_path / "cache")
    found = {path.relative_to(root / "usr/share/doc" / PACKAGE).as_posix(): path for path in root.rglob("*.*")}
    assert set(found) == {"a.html", "a.PNG", "relative.html", "absolute.html", "chain.html"}
    assert not any(path.is_symlink() for path in root.rglob("*"))
    assert found["absolute.html"].read_text() == found["chain.html"].read_text() == "content of a.html"
    assert (root / "usr/share/doc" / PACKAGE / "copyright").is_file()
    assert (root.parent / "package.txt").read_text() == f"{package.name}\n"
    assert sorted(path.name for path in root.parent.iterdir()) == ["package.txt", "root"]
    assert fetch(tmp_path / "cache") == root
    assert (tmp_path / "calls").read_text() == "once\n"
    assert fetch_debian(PACKAGE, (".js",), tmp_path / "cache", OTHERWISE) != root  # other files are another artifact


def test_own_lists_are_fetched_where_the_machine_has_none(tmp_path, monkeypatch, package):
    has_lists = f'case "$*" in *Dir::State*download*) cp {package} .;; *Dir::State*update) ;; *) exit 100;; esac'
    fake_apt(tmp_path / "bin", monkeypatch, has_lists)
    assert (fetch(tmp_path / "cache") / "usr/share/doc" / PACKAGE / "a.html").is_file()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('echo "E: Unable to locate package" >&2; exit 100', "Unable to locate package"),
        ("exit 0", "no file came"),
        (f"echo broken > {PACKAGE}_1_all.deb", "cannot be unpacked"),
    ],
)
def test_failure_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, script, words):
    fake_apt(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(UserError, match=rf"{words}.*{OTHERWISE}\.$"):
        fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_machine_without_apt_is_told_what_else_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=rf"apt-get is not installed.*{OTHERWISE}"):
        fetch(tmp_path / "cache")


@pytest.mark.parametrize("name", ["", "-o", "a", "../x", "a/unstable", "a=1", "A-b", "pages\n", "pages*", "a b"])
def test_what_is_no_package_name_reaches_no_command(tmp_path, monkeypatch, name):
    fake_apt(tmp_path / "bin", monkeypatch, f"touch {tmp_path}/called")
    with pytest.raises(UserError, match="no name of a Debian package"):
        fetch(tmp_path / "cache", name)
    assert not (tmp_path / "called").exists() and not (tmp_path / "cache").exists()
