"""soco.dismantling: who takes what apart, and when. That it is right: test_streaming.py."""

import pytest

from soco import dismantling
from soco.methods import BasisSharing, SoCo
from test_streaming import dense, stream

pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer calibration tokens")


@pytest.fixture
def apart(monkeypatch):
    """The units that are taken apart, in their order."""
    take_apart, found = dismantling.Dismantling._take_apart, []

    def watching(self, group, seen):
        found.append(group)
        take_apart(self, group, seen)

    monkeypatch.setattr(dismantling.Dismantling, "_take_apart", watching)
    return found


def layers(block):
    return [
        f"model.layers.{block}.{name}"
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    ]  # fmt: skip


def test_a_unit_with_the_last_of_its_layers(apart, tmp_path):
    dense(tmp_path / "dense", num_hidden_layers=3)
    stream(tmp_path / "dense", tmp_path / "out", 0.2, method=BasisSharing())
    alone = ("o_proj", "down_proj")
    first, second, third = (layers(block) for block in range(3))
    pairs = list(zip(first, second, strict=True))
    assert apart == [
        *((name,) for name in first if name.endswith(alone)),
        *((name[1:] if name[1].endswith(alone) else name) for name in pairs),
        *((name,) for name in third),
    ]


def test_layers_that_will_be_dense_are_left_alone(apart, tmp_path):
    """Uniform ranks are known before; at next to nothing removed they are those of dense layers."""
    dense(tmp_path / "dense")
    stream(tmp_path / "dense", tmp_path / "out", 0.001, allocator="uniform")
    known = set(apart)
    apart.clear()
    stream(tmp_path / "dense", tmp_path / "other", 0.001, allocator="energy")
    assert known < set(apart)


def test_a_mean_is_kept_where_it_is_wanted(tmp_path, monkeypatch):
    dense(tmp_path / "dense")
    asked, mean = [], dismantling.Dismantling.mean

    def watching(self, name):
        asked.append(name)
        return mean(self, name)

    monkeypatch.setattr(dismantling.Dismantling, "mean", watching)
    few = SoCo(steps=2, fisher_warmup=1, batch_size=2, written=0.0, deviation="mean")
    stream(tmp_path / "dense", tmp_path / "out", method=few)
    assert asked == [*layers(0), *layers(1)]
