"""soco.keeping: states that are whole, and parts that add up, whatever was being written."""

from contextlib import suppress

import pytest
import torch

from soco import keeping
from soco.keeping import Filed, Keeper, moved
from soco.workfolder import opened


def loaded(keeper):
    """The state and the parts."""
    found = keeper.load()
    assert found is not None
    return found


@pytest.fixture
def work(tmp_path):
    with opened(tmp_path / "work", {}, keep=True) as folder:
        yield folder


def test_the_last_state_and_all_parts(work):
    keeper = Keeper(work, "loop")
    assert keeper.load() is None
    keeper.save({"step": 1, "x": torch.ones(2)}, {3: torch.zeros(1)})
    keeper.save({"step": 2, "x": torch.ones(2)}, {})
    keeper.save({"step": 3, "x": (torch.ones(2), None, 0.5)}, {4: torch.ones(1)})
    state, parts = loaded(Keeper(work, "loop"))
    assert state["step"] == 3
    assert state["x"][1:] == (None, 0.5)
    assert [list(part) for part in parts] == [[3], [4]]
    assert len(list(work.path.glob("loop-?-0.pt"))) == 1
    assert Keeper(work, "other").load() is None


@pytest.mark.parametrize("files", [0, 1, 2])
def test_stopped_while_a_state_is_written(work, monkeypatch, files):
    """The one before it counts, with its parts; and what was left over is overwritten."""
    Keeper(work, "loop").save({"step": 1}, {0: torch.zeros(1)})
    put, left = type(work)._put, [files]

    def stopping(self, name, write):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        put(self, name, write)

    with monkeypatch.context() as patch:
        patch.setattr(type(work), "_put", stopping)
        keeper = Keeper(work, "loop")
        keeper.load()
        with suppress(KeyboardInterrupt):
            keeper.save({"step": 2}, {1: torch.zeros(1)})
    keeper = Keeper(work, "loop")
    state, parts = loaded(keeper)
    assert (state["step"], len(parts)) == (1, 1)
    keeper.save({"step": 3}, {2: torch.zeros(1)})
    state, parts = loaded(Keeper(work, "loop"))
    assert (state["step"], [list(part) for part in parts]) == (3, [[0], [2]])


def test_when_it_is_due(work, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(keeping.time, "monotonic", lambda: now[0])
    keeper = Keeper(work, "loop", every=60)
    assert not keeper.due()
    now[0] = 159.0
    assert not keeper.due()
    now[0] = 160.0
    assert keeper.due()
    keeper.save({}, {})
    assert not keeper.due()


def test_states_that_take_long_are_written_less_often(work, monkeypatch):
    """At most a tenth of the time goes into them."""
    now = [0.0]
    monkeypatch.setattr(keeping.time, "monotonic", lambda: now[0])
    put = type(work)._put
    slow = [9.0]

    def slowly(self, name, write):
        now[0] += slow[0] if name.endswith(".pt") else 0.0
        put(self, name, write)

    monkeypatch.setattr(type(work), "_put", slowly)
    keeper, always = Keeper(work, "loop", every=60), Keeper(work, "other", every=0)
    for each in (keeper, always):
        each.save({}, {})
    assert always.due()
    now[0] = 98.9
    assert not keeper.due()
    now[0] = 99.0
    assert keeper.due()
    slow[0] = 1.0
    keeper.save({}, {})  # at 100
    now[0] = 160.0
    assert keeper.due()


def test_forgotten(work):
    """Nothing is left of it; what is of others stays."""
    keeper, longer = Keeper(work, "loop"), Keeper(work, "loop-2")
    for each in (keeper, longer):
        each.save({"step": 1}, {0: torch.zeros(1)})
        each.save({"step": 2}, {1: torch.zeros(1)})
    keeper.forget()
    left = {path.name for path in work.path.iterdir() if path.name.startswith("loop")}
    assert left == {"loop-2.json", "loop-2-2-0.pt", "loop-2-part-0-0.pt", "loop-2-part-1-0.pt"}
    assert keeper.load() is None
    keeper.forget()  # there is nothing
    keeper.save({"step": 5}, {})
    assert loaded(Keeper(work, "loop"))[0] == {"step": 5}
    assert len(loaded(longer)[1]) == 2


def test_moved(device):
    value = {"a": [torch.ones(1), 3], "b": (torch.zeros(2), "x", None)}
    there = moved(value, torch.device(device))
    assert there["a"][0].device.type == torch.device(device).type
    assert (there["a"][1], there["b"][1:]) == (3, ("x", None))


def test_tensors_in_files(work):
    """Known are those that were put there, or named."""
    found = Filed(work, "state")
    found[3], found[1] = torch.ones(2), torch.zeros(3)
    assert list(found) == [1, 3]
    assert torch.equal(found[3], torch.ones(2))
    assert found.get(2) is None
    again = Filed(work, "state")
    assert len(again) == 0
    with pytest.raises(KeyError):
        again[3]
    again.know(3)
    assert torch.equal(again[3], torch.ones(2))
    del again[3]
    assert 3 not in again
    assert [file.name for file in work.path.glob("state*")] == ["state-1-0.pt"]
    (work.path / "state-1-0.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"state-1-0.pt is damaged"):
        found[1]
