"""What a long run keeps: whole files only, one run at a time, and no mix of two runs."""

import json
import subprocess
import sys

import pytest
import torch

from soco.workfolder import PLAN, opened

PLANNED = {"ratio": 0.5, "model": {"a": "1"}}


def test_files_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4).view(2, 2).mT}
    value = (torch.randn(2, 3), [torch.ones(1)], None)
    with opened(tmp_path / "work", PLANNED) as work:
        assert not work.has("x.safetensors")
        work.put_tensors("x.safetensors", tensors)
        work.put_json("x.json", [1, 2])
        work.put_any("x.pt", value)
        found = work.get_tensors("x.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
        assert work.get_json("x.json") == [1, 2]
        again = work.get_any("x.pt")
        assert torch.equal(again[0], value[0])
        assert torch.equal(again[1][0], value[1][0])
        assert again[2] is None
        work.drop("x.*")
        assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["lock", PLAN]
    assert not (tmp_path / "work").exists()


def stopped(path, plan=PLANNED):
    """A work folder of a run that did not end."""
    with pytest.raises(KeyboardInterrupt), opened(path, plan) as work:  # noqa: PT012
        work.put_json("done.json", 1)
        raise KeyboardInterrupt
    return path


def test_goes_on_after_a_stop(tmp_path):
    path = stopped(tmp_path / "work")
    (path / ".half.part").write_text("half")
    (path / ".tmpexH5An").write_text("what safetensors leaves of a file when it is killed")
    with opened(path, PLANNED) as work:
        assert work.get_json("done.json") == 1
        assert sorted(p.name for p in path.iterdir()) == ["done.json", "lock", PLAN]
    assert not path.exists()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"ratio": 0.4, "model": {"a": "1"}}, "ratio is 0.5 there and 0.4 here"),
        ({"ratio": 0.5, "model": {"a": "2"}}, 'model.a is "1" there and "2" here'),
        ({"ratio": 0.5, "model": {}}, 'model.a is "1" there and not given here'),
        ({**PLANNED, "seed": 1}, "seed is not given there and 1 here"),
    ],
)
def test_the_first_difference_is_named(plan, message, tmp_path):
    path = stopped(tmp_path / "work")
    with pytest.raises(ValueError, match=message), opened(path, plan):
        pass
    with opened(path, PLANNED) as work:
        assert work.get_json("done.json") == 1


def test_tuples_are_lists_in_a_plan(tmp_path):
    path = stopped(tmp_path / "work", {"layers": ("a", "b")})
    with opened(path, {"layers": ["a", "b"]}) as work:
        assert work.has("done.json")


HOLD = """
import sys, time
from pathlib import Path
from soco.workfolder import opened
with opened(Path(sys.argv[1]), {"ratio": 0.5, "model": {"a": "1"}}):
    print("in", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time(tmp_path):
    """And whoever is killed holds it no longer."""
    path = tmp_path / "work"
    command = [sys.executable, "-c", HOLD, path]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert run.stdout is not None
    assert run.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match=f"another run works in {path}"), opened(path, PLANNED):
        pass
    run.kill()
    run.communicate()
    with opened(path, PLANNED) as work:
        assert work.has(PLAN)


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with (
        pytest.raises(ValueError, match=r"holds thesis.tex and is no work folder"),
        opened(tmp_path, PLANNED),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_others_put_there_stays(tmp_path):
    path = stopped(tmp_path / "work")
    (path / "notes.txt").write_text("mine")
    with opened(path, PLANNED):
        pass
    assert [p.name for p in path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "read"),
    [("x.json", "get_json"), ("x.safetensors", "get_tensors"), ("x.pt", "get_any")],
)
@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 40, b"broken"])
def test_damage_is_named(content, name, read, tmp_path):
    with opened(tmp_path / "work", PLANNED) as work:
        (work.path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged: delete the folder .*work to"):
            getattr(work, read)(name)


def test_a_damaged_plan(tmp_path):
    path = stopped(tmp_path / "work")
    (path / PLAN).write_text("{")
    with pytest.raises(ValueError, match=r"plan.json is damaged"), opened(path, PLANNED):
        pass
    (path / PLAN).write_text("[1]")
    with pytest.raises(ValueError, match=r"plan.json is damaged"), opened(path, PLANNED):
        pass


class Unpickled:
    """What runs code when it is read by pickle."""

    def __reduce__(self):
        """Code."""
        return (print, ("executed",))


def test_no_pickle_is_executed(tmp_path, capsys):
    with opened(tmp_path / "work", PLANNED) as work:
        torch.save(Unpickled(), work.path / "x.pt")
        with pytest.raises(ValueError, match="damaged"):
            work.get_any("x.pt")
    assert "executed" not in capsys.readouterr().out


def test_what_cannot_be_written_leaves_nothing_half(tmp_path, monkeypatch):
    with opened(tmp_path / "work", PLANNED) as work:
        work.put_json("x.json", 1)
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"x.json cannot be written \(No space left"):
            work.put_json("x.json", 2)
        monkeypatch.undo()
        assert work.get_json("x.json") == 1
        assert not list(work.path.glob(".*.part"))


def full(*_):
    raise OSError(28, "No space left on device")


def test_bad_input_leaves_nothing_and_damage_all(tmp_path):
    path = tmp_path / "work"
    with pytest.raises(ValueError, match="bad"), opened(path, PLANNED) as work:  # noqa: PT012
        work.put_json("done.json", 1)
        raise ValueError("bad")
    assert not path.exists()
    stopped(path)
    (path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"), opened(path, PLANNED) as work:
        work.get_json("x.json")
    assert (path / "done.json").is_file()
    with pytest.raises(OSError, match="full"), opened(path, PLANNED):
        raise OSError("full")
    assert (path / "done.json").is_file()


def test_the_plan_is_readable(tmp_path):
    path = stopped(tmp_path / "work")
    assert json.loads((path / PLAN).read_text()) == PLANNED
