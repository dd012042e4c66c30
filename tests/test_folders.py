"""soco.folders: a folder is replaced as a whole or not at all."""

import os
import pathlib

import pytest

from soco import folders
from soco.folders import carry_over, replaced


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def read(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways of changing the names."""
    if request.param == "two renames":
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    return request.param


def test_a_new_folder(tmp_path):
    target = tmp_path / "some" / "where"
    with replaced(target) as folder:
        assert not target.exists()
        assert folder.parent == target.parent
        write(folder, a_txt="new")
    assert read(target) == {"a.txt": "new"}
    assert os.listdir(target.parent) == ["where"]
    usual = tmp_path / "usual"
    usual.mkdir()
    assert target.stat().st_mode == usual.stat().st_mode


def test_replacing(tmp_path, way):
    target = tmp_path / "out"
    write(target, a_txt="old", model_safetensors="old", note_txt="mine", adapter_safetensors="mine")
    write(target / "runs", log_txt="mine")
    with replaced(target) as folder:
        write(folder, a_txt="new")
        assert read(target)["a.txt"] == "old"
    assert read(target) == {
        "a.txt": "new",
        "note.txt": "mine",
        "adapter.safetensors": "mine",
        "runs/log.txt": "mine",
    }
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder(tmp_path, way):
    target = tmp_path / "out"
    target.mkdir()
    with replaced(target) as folder:
        write(folder, a_txt="new")
    assert read(tmp_path) == {"out/a.txt": "new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_crash_leaves_the_old_one(tmp_path, error):
    target = tmp_path / "out"
    write(target, a_txt="old")

    def write_half():
        with replaced(target) as folder:
            write(folder, a_txt="half")
            raise error

    with pytest.raises(error):
        write_half()
    assert read(tmp_path) == {"out/a.txt": "old"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_crash_between_the_renames(tmp_path, monkeypatch, failing):
    target = tmp_path / "out"
    write(target, a_txt="old")
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    rename, calls = pathlib.Path.rename, []

    def unlucky(self, other):
        calls.append(self)
        if len(calls) == failing:
            raise OSError("no more space")
        return rename(self, other)

    monkeypatch.setattr(pathlib.Path, "rename", unlucky)
    with pytest.raises(OSError, match="no more space"), replaced(target) as folder:
        write(folder, a_txt="new")
    assert read(tmp_path) == {"out/a.txt": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_on_the_disk_before_the_names_change(tmp_path, monkeypatch):
    target = tmp_path / "out"
    fsync, synced = os.fsync, []

    def noted(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with replaced(target) as folder:
        write(folder, a_txt="new")
    assert synced == [
        (str(folder / "a.txt"), False),
        (str(folder), False),
        (str(tmp_path), True),
    ]


def test_through_a_link(tmp_path):
    write(tmp_path / "real", a_txt="old")
    (tmp_path / "link").symlink_to("real")
    with replaced(tmp_path / "link") as folder:
        write(folder, a_txt="new")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == {"a.txt": "new"}


def test_carry_over_copies(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    write(source, config_json="old", tokenizer_json="mine", model_safetensors="old")
    write(source / "runs", log_txt="mine")
    write(target, config_json="new")
    carry_over(source, target)
    assert read(target) == {"config.json": "new", "tokenizer.json": "mine", "runs/log.txt": "mine"}
    assert len(read(source)) == 4


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_files_get_the_usual_permissions(tmp_path):
    """Safetensors writes files that nobody else can read."""
    old = os.umask(0o022)
    try:
        with replaced(tmp_path / "out") as folder:
            (folder / "a").write_text("a")
            (folder / "a").chmod(0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
