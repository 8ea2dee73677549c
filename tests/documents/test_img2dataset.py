"""Tars of img2dataset: what is delivered, what is left out and named, and that no damage ends in silence."""

import json
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents import Account, decode_square, encode_png, judge, read_corpus
from tests.documents.conftest import write_tar

BLOCK = 512
LENIENT = {"max_bad_fraction": 1.0}


def png(number: int) -> bytes:
    return encode_png(np.full((4, 4, 3), number, dtype=np.uint8))


def sample(number: int, **facts) -> dict[str, bytes]:
    """The three members that img2dataset writes, in its order."""
    facts = {"url": f"https://example.org/{number}", "status": "success", "original_width": 40, **facts}
    key = f"{number:09d}"
    return {
        f"{key}.jpg": png(number),
        f"{key}.json": json.dumps(facts, indent=4).encode(),
        f"{key}.txt": f"picture\n {number}".encode(),
    }


def write_webdataset(path: Path, numbers: range) -> Path:
    """As img2dataset does it: with a header of extended records before every member."""
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            members = {name.partition(".")[2]: data for name, data in sample(number).items()}
            writer.write({"__key__": f"{number:09d}", **members})
    return path


def read(path: Path | str | None, **options):
    config = CorpusConfig(name="web", kind="img2dataset", path=path and str(path), **options)
    account = Account()
    documents = list(read_corpus(config, Path(), account))
    judge(account, len(documents), config)
    return documents, account


def sentence(path: Path | str | None, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def captions(documents) -> list[str]:
    return sorted(document.texts[0] for document in documents)


def pictures(*numbers: int) -> list[str]:
    return sorted(f"picture {number}" for number in numbers)


@pytest.mark.parametrize("writer", ["webdataset", "ustar", "gnu", "pax"])
def test_every_sample_comes_with_its_caption_and_facts(tmp_path, writer):
    if writer == "webdataset":
        write_webdataset(tmp_path / "00000.tar", range(8))
    else:
        format = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[writer]
        folder = "ü" * 40 + "/" if writer == "ustar" else "ü" * 150 + "/"  # too long for a plain header
        parts = [{folder + name: data for name, data in sample(n).items()} for n in range(8)]
        write_tar(tmp_path / "00000.tar", *parts, format=format)
    documents, account = read(tmp_path)
    assert not account.bad and not account.skipped
    shown = {document.texts[0]: int(decode_square(document.images[0].data, 4)[0, 0, 0]) for document in documents}
    assert shown == {f"picture {number}": number for number in range(8)}
    for document in documents:
        number = int(document.texts[0].split()[1])
        assert document.meta.pop("path").endswith(f"/{number:09d}")
        assert document.meta == {"url": f"https://example.org/{number}", "original_width": 40}
        assert re.fullmatch(r"[A-Za-z0-9_-]+", document.id)


def test_order_is_that_of_the_tars_and_ids_are_stable_and_unique(tmp_path):
    for shard in (2, 0, 1):
        (tmp_path / f"part{shard % 2}").mkdir(exist_ok=True)
        write_tar(tmp_path / f"part{shard % 2}/{shard:05d}.tar", *(sample(n) for n in (5, 3, 4)))
    (tmp_path / "part0/._00000.tar").write_bytes(b"left by another system")
    documents = read(tmp_path)[0]
    assert [d.meta["path"] for d in documents] == [
        f"part{shard % 2}/{shard:05d}.tar/{n:09d}" for shard in (0, 2, 1) for n in (5, 3, 4)
    ]
    assert len({document.id for document in read(tmp_path)[0]}) == 9
    write_tar(tmp_path / "part0/00003.tar", sample(9))
    assert {d.id for d in documents} <= {d.id for d in read(tmp_path)[0]}
    alone = read(tmp_path / "part0/00000.tar")[0]
    assert captions(alone) == pictures(3, 4, 5)


def test_caption_is_the_text_file_or_the_json(tmp_path):
    parts = [sample(n, caption=f"from json\n{n}") for n in range(6)]
    del parts[2]["000000002.txt"], parts[3]["000000003.json"]
    assert captions(read(write_tar(tmp_path / "a.tar", *parts))[0]) == sorted(
        [*pictures(0, 1, 3, 4, 5), "from json 2"]
    )


def test_bad_samples_are_counted_and_named(tmp_path):
    def broken(number: int, **members: bytes | None) -> dict[str, bytes]:
        """A sample with members exchanged, or taken out."""
        key = f"{number:09d}"
        new = {f"{key}.{suffix}": data for suffix, data in members.items()}
        return {name: data for name, data in (sample(number) | new).items() if data is not None}

    bad = {
        "no caption": broken(100, txt=None),
        "no picture": broken(101, jpg=None),
        "failed download": broken(102, jpg=None, txt=None, json=b'{"status": "failed_to_download"}'),
        "empty caption": broken(103, txt=b" \n"),
        "caption is not UTF-8": broken(104, txt="é".encode("latin-1")),
        "json is no JSON object": broken(105, json=b"[" * 100_000),
        "not a PNG, JPEG or WebP picture": broken(106, jpg=b"<html>"),
        "empty file": broken(107, jpg=b""),
        "too many pixels": broken(108, jpg=encode_png(np.zeros((20, 20, 3), dtype=np.uint8))),
        "member too large": broken(109, txt=b"a" * 100_001),
        "caption too long": broken(112, txt=None, json=json.dumps({"caption": "a" * 100_001}).encode()),
        "duplicate key": {"000000003.jpg": png(77), "000000003.txt": b"again"},
        "path leaves the tar": {"../../000000110.jpg": png(110)},
        "name without a key": {"README": b"a note"},
        "truncated": broken(111, jpg=png(111)[:-30]),
    }
    path = write_tar(tmp_path / "00000.tar", *(sample(n) for n in range(20)), *bad.values())
    documents, account = read(path, max_pixels=100, **LENIENT)
    assert captions(documents) == pictures(*range(20))
    assert account.skipped == {"failed download": 1}
    skipped = account.bad + account.skipped
    assert (skipped.pop("truncated picture", 0), skipped.pop("unreadable picture", 0)) in ((1, 0), (0, 1))
    assert skipped == dict.fromkeys(bad.keys() - {"truncated"}, 1)
    examples = account.examples
    assert examples["failed download"] == "00000.tar/000000102"
    assert examples["path leaves the tar"] == "00000.tar/../../000000110.jpg"
    assert "max_bad_fraction" in sentence(path, max_pixels=100)


def test_failed_downloads_are_not_held_against_the_corpus(tmp_path):
    failed = [{f"{n:09d}.json": b'{"status": "failed_to_download"}'} for n in range(100, 150)]
    documents, account = read(write_tar(tmp_path / "a.tar", *(sample(n) for n in range(4)), *failed))
    assert len(documents) == 4 and not account.bad and account.skipped == {"failed download": 50}


def test_members_that_do_not_lie_side_by_side_are_no_sample(tmp_path):
    first = sample(50)
    late = {"000000050.txt": first.pop("000000050.txt")}
    documents, account = read(write_tar(tmp_path / "a.tar", first, *(sample(n) for n in range(5)), late), **LENIENT)
    assert captions(documents) == pictures(*range(5))
    assert account.bad == {"no caption": 1, "duplicate key": 1}


def test_the_same_sample_twice_in_a_row_comes_once(tmp_path):
    documents, account = read(write_tar(tmp_path / "a.tar", *(sample(n) for n in (0, 1, 2, 3, 3))), **LENIENT)
    assert captions(documents) == pictures(0, 1, 2, 3) and account.bad == {"duplicate key": 1}


def test_links_devices_and_absolute_paths_are_never_followed(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(png(200))
    parts: list = [sample(n) for n in range(8)]
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
        header = tarfile.TarInfo(f"00000090{number}.jpg")
        header.type, header.linkname = kind, str(secret)
        parts += [header, {f"00000090{number}.txt": b"stolen"}]
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    parts += [folder, {f"{tmp_path}/000000910.jpg": png(9), f"{tmp_path}/000000910.txt": b"stolen"}]
    documents, account = read(write_tar(tmp_path / "a.tar", *parts), **LENIENT)
    assert captions(documents) == pictures(*range(8))
    assert account.bad == {"not a regular file": 4, "no picture": 4, "path leaves the tar": 2}


def test_a_member_that_is_too_large_is_never_in_memory(tmp_path):
    path = tmp_path / "a.tar"
    header = tarfile.TarInfo("000000999.jpg")
    header.size = 200 * 2**20
    with open(path, "wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.seek(header.size, os.SEEK_CUR)
        file.write(write_tar(tmp_path / "rest", *(sample(n) for n in range(6))).read_bytes())
    tracemalloc.start()
    documents, account = read(path, max_pixels=1000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert captions(documents) == pictures(*range(6))
    assert account.examples == {"member too large": "a.tar/000000999"}
    assert peak_bytes < 20 * 2**20


def without_end(path: Path) -> bytes:
    """A tar up to its last member that is not empty, to write on from there."""
    content = path.read_bytes().rstrip(b"\0")
    return content + bytes(-len(content) % BLOCK)


def test_an_extended_header_that_is_too_large_is_never_in_memory(tmp_path):
    path = write_tar(tmp_path / "a.tar", *(sample(n) for n in range(6)))
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 200 * 2**20
    content = without_end(path) + header.tobuf(tarfile.GNU_FORMAT)
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(len(content) + header.size)
    tracemalloc.start()
    account = read(path, **LENIENT)[1]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "extended header" in account.examples["damaged tar"] and peak_bytes < 20 * 2**20


@pytest.mark.parametrize("num_bytes", [2**80, 2**40, -1024])
def test_a_header_may_claim_any_size(tmp_path, num_bytes):
    path = write_tar(tmp_path / "a.tar", *(sample(n) for n in range(6)))
    header = tarfile.TarInfo("000000999.jpg")
    header.size = num_bytes
    path.write_bytes(without_end(path) + header.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK))
    documents, account = read(path, **LENIENT)
    assert captions(documents) == pictures(*range(5)) and account.bad == {"damaged tar": 2}


@pytest.mark.parametrize(
    "records", [b"x", b"99 path=x\n", b"0 path=x\n", b"-1 path=x\n", b"9 path-x\n", b"11 size=-1\n", b"12 size=1e9\n"]
)
def test_a_broken_extended_header_is_damage(tmp_path, records):
    path = write_tar(tmp_path / "a.tar", *(sample(n) for n in range(6)))
    header = tarfile.TarInfo("extended")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    content = without_end(path) + header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % BLOCK)
    path.write_bytes(content + write_tar(tmp_path / "rest", sample(9)).read_bytes())
    documents, account = read(path, **LENIENT)
    assert captions(documents) == pictures(*range(5)) and account.bad == {"damaged tar": 2}
    assert "extended header" in account.examples["damaged tar"]


def headers(content: bytes) -> list[int]:
    """Offsets of all headers, extended ones too: the blocks that have tar's magic where it belongs."""
    return [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]


def account_of(path: Path, num_samples: int) -> tuple[list[str], bool]:
    """Captions that came, and whether a damage was named; every one of the samples must be accounted for."""
    try:
        documents, account = read(path, **LENIENT)
    except UserError as error:
        assert "has no usable document" in str(error) and "damaged tar (first: 00000.tar, " in str(error)
        return [], True
    for document in documents:  # nothing that came is made of two samples
        number = int(document.texts[0].split()[1])
        assert document.images[0].data == png(number) and document.meta["url"].endswith(f"/{number}")
    # The place of the damage is one entry more; a missing sample is counted by the _stats.json.
    num_bad = account.bad.total() - bool(account.bad["damaged tar"])
    assert len(documents) + num_bad + account.skipped.total() == num_samples
    return captions(documents), "damaged tar" in account.bad


@pytest.mark.parametrize("writer", [write_webdataset, lambda path, numbers: write_tar(path, *map(sample, numbers))])
def test_a_tar_cut_anywhere_is_noticed_and_every_sample_accounted_for(tmp_path, writer):
    content = writer(tmp_path / "00000.tar", range(5)).read_bytes()
    (tmp_path / "00000_stats.json").write_text('{"count": 9, "successes": 5}')
    starts = [content.index(f"{number:09d}.jpg".encode()) // BLOCK * BLOCK for number in range(5)]
    end = headers(content)[-1] + 2 * BLOCK  # of the last member, whose content fits into a block
    assert account_of(tmp_path / "00000.tar", 5) == (pictures(*range(5)), False)
    for boundary in range(0, len(content), BLOCK):
        for cut in (boundary, boundary + 100):
            (tmp_path / "00000.tar").write_bytes(content[:cut])
            came, is_named = account_of(tmp_path / "00000.tar", 5)
            # A sample is known to be whole when the first member of the next one has come, here two blocks.
            assert set(came) >= set(pictures(*(n for n in range(4) if cut >= starts[n + 1] + 2 * BLOCK)))
            assert is_named == (cut < end + 2 * BLOCK), cut


@pytest.mark.parametrize("writer", [write_webdataset, lambda path, numbers: write_tar(path, *map(sample, numbers))])
@pytest.mark.parametrize("with_stats", [True, False])
def test_a_flipped_byte_in_any_header_is_noticed(tmp_path, writer, with_stats):
    content = writer(tmp_path / "00000.tar", range(5)).read_bytes()
    if with_stats:
        (tmp_path / "00000_stats.json").write_text('{"count": 9, "successes": 5}')
    found = headers(content)
    assert len(found) == (15 if content[156] in b"0\0" else 30)
    for offset in found:
        for place in (0, 8, 107, 130, 148, 151, 156, 257, 300, 511):
            flipped = bytearray(content)
            flipped[offset + place] ^= 0xFF
            (tmp_path / "00000.tar").write_bytes(flipped)
            if with_stats:
                assert account_of(tmp_path / "00000.tar", 5)[1]
            else:
                try:
                    assert read(tmp_path, **LENIENT)[1].examples["damaged tar"].startswith("00000.tar, ")
                except UserError as error:
                    assert "damaged tar" in str(error)


def test_zeros_over_a_part_of_a_tar_are_no_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", *(sample(n) for n in range(6)))
    content = bytearray(path.read_bytes())
    start = content.index(b"000000003.jpg")
    content[start : start + 4 * BLOCK] = bytes(4 * BLOCK)
    path.write_bytes(content)
    documents, account = read(path, **LENIENT)
    assert captions(documents) == pictures(0, 1) and account.bad == {"damaged tar": 2}


def test_one_damaged_tar_costs_the_others_nothing(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", *(sample(10 * shard + n) for n in range(5)))
    (tmp_path / "1.tar").write_bytes(b"")
    documents, account = read(tmp_path)
    assert captions(documents) == pictures(*range(5), *range(20, 25))
    assert account.examples == {"damaged tar": "1.tar, cut at byte 0"}


def test_a_tar_with_fewer_samples_than_its_stats_say_is_named(tmp_path):
    write_tar(tmp_path / "00007.tar", *(sample(n) for n in range(10)), {"000000090.json": b'{"status": "failed"}'})
    (tmp_path / "00007_stats.json").write_text('{"count": 20, "successes": 12}')
    (tmp_path / "00007.parquet").write_bytes(b"not read")
    documents, account = read(tmp_path)
    assert len(documents) == 10 and account.bad + account.skipped == {"missing in the tar": 2, "failed download": 1}
    assert account.examples["missing in the tar"] == "00007.tar, 10 of 12"
    for content in ("{", "[]", '{"successes": "12"}', "{}"):
        (tmp_path / "00007_stats.json").write_text(content)
        assert read(tmp_path)[1].bad["unreadable _stats.json"] == 1


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    outside = write_tar(tmp_path / "outside.tar", sample(200))
    folder = tmp_path / "inside"
    folder.mkdir()
    write_tar(folder / "a.tar", *(sample(n) for n in range(4)))
    os.symlink(outside, folder / "b.tar")
    os.mkfifo(folder / "c.tar")
    documents, account = read(folder, **LENIENT)
    assert captions(documents) == pictures(0, 1, 2, 3)
    assert account.examples == {"path leaves the folder": "b.tar", "unreadable file": "c.tar"}


def test_facts_of_another_type_are_left_out_and_all_can_be_stored(tmp_path):
    odd = [sample(0, url="a\ud800", original_width=float("nan")), sample(1, url=None), sample(2, original_width=True)]
    del odd[0]["000000000.txt"]
    odd[0]["000000000.json"] = odd[0]["000000000.json"].replace(b"{", b'{"caption": "x\\udfffy",', 1)
    documents = read(write_tar(tmp_path / "a.tar", *odd))[0]
    assert [d.meta for d in sorted(documents, key=lambda d: d.meta["path"])] == [
        {"path": "a.tar/000000000", "url": "a?"},
        {"path": "a.tar/000000001", "original_width": 40},
        {"path": "a.tar/000000002", "url": "https://example.org/2"},
    ]
    json.dumps([[d.texts, d.meta] for d in documents], ensure_ascii=False, allow_nan=False).encode()


def test_nothing_to_read_is_one_sentence(tmp_path):
    assert "has no corpus.path" in sentence(None)
    assert "does not exist" in sentence(tmp_path / "missing")
    assert "holds no .tar" in sentence(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    assert "neither a folder nor a .tar" in sentence(tmp_path / "notes.md")
    write_tar(tmp_path / "empty.tar")
    assert "no usable document" in sentence(tmp_path)
    write_tar(tmp_path / "bad.tar", {"a.jpg": b"no picture", "a.txt": b"caption"})
    assert "not a PNG" in sentence(tmp_path)
