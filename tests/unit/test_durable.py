import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from rlfeed import durable
from rlfeed.errors import CheckpointError, FieldError, RunDirectoryError


def tree(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*")}


@pytest.fixture
def built(tmp_path):
    with durable.build_directory(tmp_path / "built", {"env_steps": 7}) as building:
        (building / "inner").mkdir()
        (building / "inner" / "a.bin").write_bytes(b"abc")
        durable.write_bytes(building / "b.bin", b"")
    return tmp_path / "built"


def test_write_bytes_replaces_and_leaves_nothing_else(tmp_path):
    durable.write_bytes(tmp_path / "f", b"old")
    durable.write_bytes(tmp_path / "f", b"ne", memoryview(b"w"), b"")

    assert (tmp_path / "f").read_bytes() == b"new"
    assert tree(tmp_path) == {"f"}


def test_write_bytes_before_the_rename_the_file_is_synced_and_after_it_the_directory(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", os.fstat(fd).st_ino)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", Path(a).stat().st_ino)), replace(a, b)))
    durable.write_bytes(tmp_path / "f", b"x")
    file, directory = (tmp_path / "f").stat().st_ino, tmp_path.stat().st_ino

    assert events == [("sync", file), ("rename", file), ("sync", directory)]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_bytes_disk_refuses_keeps_the_old_file_and_says_where(tmp_path, monkeypatch, call):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    durable.write_bytes(tmp_path / "f", b"old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match=r"No space left on device.*/f'"):
        durable.write_bytes(tmp_path / "f", b"new")

    assert (tmp_path / "f").read_bytes() == b"old"
    assert tree(tmp_path) == {"f"}


def test_save_state_file_size_limit_keeps_the_old_file(tmp_path):
    durable.save_state(tmp_path / "f", {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            durable.save_state(tmp_path / "f", {"a": np.zeros(1_000_000, np.uint8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert caught.value.errno == errno.EFBIG
    assert durable.load_state(tmp_path / "f") == {"a": 1}
    assert tree(tmp_path) == {"f"}


def test_load_state_truncated_file_is_an_error_that_names_it(tmp_path):
    durable.save_state(tmp_path / "learner.state", {"a": np.arange(1000)})
    os.truncate(tmp_path / "learner.state", 5000)

    with pytest.raises(CheckpointError, match=r"learner\.state: its contents do not have their checksum"):
        durable.load_state(tmp_path / "learner.state")


def test_load_state_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"learner\.state: cannot be read, No such file"):
        durable.load_state(tmp_path / "learner.state")


def test_read_json_of_write_json_gives_the_value(tmp_path):
    durable.write_json(tmp_path / "f", {"a": [1, 2.5, None, "é"]})

    assert durable.read_json(tmp_path / "f") == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize("value", [{"a": object()}, [float("nan")]])
def test_write_json_what_json_cannot_say_is_an_error(tmp_path, value):
    with pytest.raises(FieldError, match="cannot be written as JSON"):
        durable.write_json(tmp_path / "f", value)

    assert tree(tmp_path) == set()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_read_json_damaged_file_is_an_error(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not JSON"):
        durable.read_json(tmp_path / "f")


def test_verify_directory_whole_gives_its_info(built):
    assert durable.verify_directory(built) == {"env_steps": 7}
    assert tree(built) == {"MANIFEST.json", "b.bin", "inner", "inner/a.bin"}
    assert tree(built.parent) == {"built", *(f"built/{name}" for name in tree(built))}


def test_build_directory_before_its_rename_everything_in_it_is_synced(tmp_path, monkeypatch):
    synced, unsynced = set(), {}
    fsync, replace = os.fsync, os.replace

    def record(source, target):
        if Path(source).is_dir():
            unsynced[Path(target).name] = [
                p.name for p in (Path(source), *Path(source).rglob("*")) if p.stat().st_ino not in synced
            ]
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", record)
    with durable.build_directory(tmp_path / "built") as building:
        (building / "inner").mkdir()
        (building / "inner" / "a.bin").write_bytes(b"abc")
        durable.write_hashed(building / "hashed", [b"abc"])

    assert unsynced == {"built": []}
    assert tmp_path.stat().st_ino in synced


def test_build_directory_body_raises_leaves_nothing(tmp_path):
    def build():
        with durable.build_directory(tmp_path / "new") as building:
            (building / "a").write_bytes(b"a")
            raise KeyError

    with pytest.raises(KeyError):
        build()

    assert tree(tmp_path) == set()


def test_build_directory_existing_path_is_refused_and_kept(built):
    before = tree(built)
    with pytest.raises(RunDirectoryError, match="built: exists already"), durable.build_directory(built):
        pass

    assert tree(built) == before


def test_build_directory_symlink_inside_is_refused(tmp_path):
    target = tmp_path / "new"
    with pytest.raises(FieldError, match="link: is not a plain file"), durable.build_directory(target) as building:
        (building / "link").symlink_to(tmp_path)

    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "inner/a.bin").unlink(), r"inner/a\.bin is missing"),
        (lambda d: (d / "inner/a.bin").write_bytes(b"ab"), r"inner/a\.bin has 2 bytes instead of 3"),
        (lambda d: (d / "inner/a.bin").write_bytes(b"abd"), r"inner/a\.bin was changed"),
        (lambda d: (d / "MANIFEST.json").unlink(), r"MANIFEST\.json: cannot be read"),
        (lambda d: (d / "MANIFEST.json").write_bytes(b""), r"MANIFEST\.json: is not JSON"),
        (lambda d: (d / "MANIFEST.json").write_bytes(b"[]"), r"MANIFEST\.json: is not a manifest"),
        (lambda d: (d / "MANIFEST.json").write_bytes(b'{"schema": 9}'), r"MANIFEST\.json: has schema 9; expected 1"),
    ],
)
def test_verify_directory_damaged_is_an_error_that_names_the_file(built, damage, message):
    damage(built)
    with pytest.raises(CheckpointError, match=message):
        durable.verify_directory(built)


def test_verify_directory_several_damages_names_all(built):
    (built / "inner/a.bin").unlink()
    (built / "b.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"b\.bin has 1 bytes instead of 0; inner/a\.bin is missing"):
        durable.verify_directory(built)


def test_verify_directory_changed_info_is_an_error(built):
    manifest = json.loads((built / "MANIFEST.json").read_text())
    manifest["info"]["env_steps"] = 8
    (built / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        durable.verify_directory(built)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "inner/../../secret"])
def test_verify_directory_name_outside_is_an_error(built, name):
    manifest = json.loads((built / "MANIFEST.json").read_text())
    del manifest["sha256"]
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (built / "MANIFEST.json").write_text(json.dumps({**manifest, "sha256": durable._digest(manifest)}))
    with pytest.raises(CheckpointError, match="lies outside it"):
        durable.verify_directory(built)


def test_clean_temporaries_removes_what_killed_writers_left_and_nothing_else(tmp_path):
    for name in (".f.tmp-0123abcd", "f.tmp-0123abcd", ".f.tmp-xyz", ".hidden", "f"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".d.tmp-00000000").mkdir()
    (tmp_path / ".d.tmp-00000000" / "x").write_bytes(b"")
    removed = durable.clean_temporaries(tmp_path)

    assert {p.name for p in removed} == {".f.tmp-0123abcd", ".d.tmp-00000000"}
    assert tree(tmp_path) == {"f.tmp-0123abcd", ".f.tmp-xyz", ".hidden", "f"}


def test_remove_directory_killed_in_the_middle_leaves_only_a_temporary(built, monkeypatch):
    monkeypatch.setattr(durable.shutil, "rmtree", lambda path: None)
    durable.remove_directory(built)

    assert not built.exists()
    monkeypatch.undo()
    assert len(durable.clean_temporaries(built.parent)) == 1


def test_make_directory_creates_parents_and_takes_an_existing_one(tmp_path):
    durable.make_directory(tmp_path / "a" / "b")
    durable.make_directory(tmp_path / "a" / "b")

    assert (tmp_path / "a" / "b").is_dir()


def test_write_hashed_gives_the_digest(tmp_path):
    digest = durable.write_hashed(tmp_path / "f", [b"a", memoryview(b"b"), np.frombuffer(b"c", np.uint8)])

    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of abc
    assert (tmp_path / "f").read_bytes() == b"abc"


def test_write_hashed_disk_refuses_says_where(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="/f'"):
            durable.write_hashed(tmp_path / "f", [bytes(2000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are read to be hashed."""
    names, file_digest = [], durable.hashlib.file_digest

    def record(file, algorithm):
        names.append(Path(file.name).name)
        return file_digest(file, algorithm)

    monkeypatch.setattr(durable.hashlib, "file_digest", record)
    return names


def test_build_directory_known_digests_are_not_computed_again(tmp_path, hashed):
    digests = {}
    with durable.build_directory(tmp_path / "built", digests=digests) as building:
        digests["a"] = durable.write_hashed(building / "a", [b"abc"])
        (building / "b").write_bytes(b"b")

    assert hashed == ["b"]
    assert durable.digests_of(tmp_path / "built").keys() == {"a", "b"}
    durable.verify_directory(tmp_path / "built")
    (tmp_path / "built" / "a").write_bytes(b"abd")
    with pytest.raises(CheckpointError, match="a was changed"):
        durable.verify_directory(tmp_path / "built")


def build_nested(path):
    with durable.build_directory(path, {"env_steps": 7}) as building:
        (building / "a").write_bytes(b"a")
        with durable.build_directory(building / "inner" / "replay") as inside:
            (inside / "rows").write_bytes(b"rows")


def test_build_directory_built_inside_is_hashed_once_and_covered(tmp_path, hashed):
    build_nested(tmp_path / "built")

    assert hashed == ["rows", "a", "MANIFEST.json"]
    assert durable.verify_directory(tmp_path / "built") == {"env_steps": 7}


@pytest.mark.parametrize(
    ("name", "message"),
    [("rows", r"replay: is damaged: rows was changed"), ("MANIFEST.json", r"inner/replay/MANIFEST\.json was changed")],
)
def test_verify_directory_damage_in_a_directory_built_inside_is_found(tmp_path, name, message):
    build_nested(tmp_path / "built")
    file = tmp_path / "built" / "inner" / "replay" / name
    content = bytearray(file.read_bytes())
    content[1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        durable.verify_directory(tmp_path / "built")


def test_verify_directory_linked_files_can_be_spared(built, hashed):
    with durable.build_directory(built.with_name("next")) as building:
        os.link(built / "inner" / "a.bin", building / "a.bin")
        (building / "new").write_bytes(b"new")
    hashed.clear()
    durable.verify_directory(built.with_name("next"), linked=False)

    assert hashed == ["new"]
    durable.verify_directory(built.with_name("next"))
    assert hashed == ["new", "a.bin", "new"]


def test_verify_directory_manifest_in_other_words_is_an_error(built):
    text = (built / "MANIFEST.json").read_bytes()
    (built / "MANIFEST.json").write_bytes(text.replace(b"\n", b" ", 1))
    with pytest.raises(CheckpointError, match="is not as it was written"):
        durable.verify_directory(built)
