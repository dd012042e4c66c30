"""What loops share: batches in order, models frozen and given back as they were."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from soco.keeping import Filed
from soco.objectives import TokenDistribution
from soco.steps import (
    EndlessBatches,
    Losses,
    Step,
    Teacher,
    all_dense,
    check_batches,
    checkpointed,
    frozen,
    half_cosine,
)
from soco.workfolder import opened


def test_every_window_comes_once_before_any_comes_again():
    batches = EndlessBatches(7, 3, torch.Generator().manual_seed(0))
    rounds = [torch.cat([next(batches), next(batches)]).tolist() for _ in range(4)]
    assert all(len(set(each)) == 6 for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    again = EndlessBatches(7, 3, torch.Generator().manual_seed(0))
    assert next(again).tolist() == rounds[0][:3]


def test_frozen_gives_modes_and_flags_back():
    first, second = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2).eval()
    first[0].bias.requires_grad_(False)

    def fail():
        with frozen(first, second):
            assert not any(part.training for part in first.modules())
            assert not any(p.requires_grad for p in (*first.parameters(), *second.parameters()))
            first[0].bias.requires_grad_(True)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(part.training for part in first.modules())
    assert not second.training
    assert [p.requires_grad for p in first.parameters()] == [True, False]
    assert all(p.requires_grad for p in second.parameters())


def test_checkpointed_computes_again_in_backward_and_ends():
    calls = []

    class Block(nn.Linear):
        def forward(self, input):
            calls.append(1)
            return super().forward(input).tanh()

    block = Block(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    with checkpointed([block]):
        y = block(x).sum()
        assert len(calls) == 1
        y.backward()
        assert len(calls) == 2
    assert "forward" not in block.__dict__
    seen = x.grad
    x.grad = None
    block(x).sum().backward()
    assert seen is not None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, seen)


def test_a_step_has_no_held_out_loss_unless_measured():
    assert Step("coarse", 1, 2, 0.5, 0.5, 1.0).held_out is None


class Layer:
    dense = False


def test_all_dense_switches_and_switches_back():
    layers = [Layer(), Layer()]
    with all_dense(iter(layers)):
        assert all(layer.dense for layer in layers)
    assert not any(layer.dense for layer in layers)
    with pytest.raises(KeyError), all_dense(layers):
        raise KeyError
    assert not any(layer.dense for layer in layers)


class Counting(nn.Module):
    """An embedding and a head, as a transformers model shows them; it counts what runs."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.scale, self.rows = scale, 0

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        self.rows += len(input_ids)
        return SimpleNamespace(logits=self.head(self.embed(input_ids).tanh()) * self.scale)


WINDOWS = torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(1))


def taught(model, room=2**20, objective=None):
    teacher = Teacher(model, nullcontext, objective or TokenDistribution(), WINDOWS, room)
    choices = [torch.tensor(each) for each in ([0, 3], [3, 0], [1, 0], [5], [5, 1, 3])]
    for chosen in choices:
        with torch.no_grad():
            rows = model.rows
            wanted = teacher.objective.outputs(model, WINDOWS[chosen])
            model.rows = rows
        torch.testing.assert_close(teacher.outputs(chosen), wanted)
    return teacher, model.rows


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_window_runs_through_the_dense_model_once(temperature):
    """Batches of windows that are known, unknown, and both."""
    teacher, rows = taught(Counting(), objective=TokenDistribution(temperature))
    assert rows == 2 + 2 + 1
    assert teacher.kept.keys() == {0, 1, 3, 5}
    assert all(states.shape == (5, 4) for states in teacher.kept.values())


def test_no_more_is_kept_than_there_is_room_for():
    teacher, rows = taught(Counting(), room=2 * 5 * 4 * 4 + 1)
    assert teacher.kept.keys() == {0, 3}
    assert rows == 2 + 2 + 1 + 3


def test_states_in_files(tmp_path):
    """The same; what an earlier run left is known once it is named, and counts for the room."""
    with opened(tmp_path / "work", {}) as work:
        model = Counting()
        files = Filed(work, "state")
        teacher = Teacher(model, nullcontext, TokenDistribution(), WINDOWS, files=files)
        for chosen in ([0, 3], [3, 1]):
            wanted = Teacher(model, nullcontext, TokenDistribution(), WINDOWS)
            found = teacher.outputs(torch.tensor(chosen))
            torch.testing.assert_close(found, wanted.outputs(torch.tensor(chosen)))
        assert len(list(work.path.glob("state-*.pt"))) == 3
        told = teacher.fresh()
        assert told == {0: None, 3: None, 1: None}
        assert teacher.fresh() == {}
        again = Teacher(
            model, nullcontext, TokenDistribution(), WINDOWS, files=Filed(work, "state")
        )
        assert not again.kept
        again.take({0: None, 3: None})
        assert again.room == teacher.room + teacher.kept[1].nbytes
        rows = model.rows
        assert torch.equal(again.states(torch.tensor([0, 3])), teacher.states(torch.tensor([0, 3])))
        again.outputs(torch.tensor([0, 3]))
        assert model.rows == rows


@pytest.mark.parametrize("scale", [1.5, -1.0])
def test_a_head_that_is_not_all_there_is_to_the_outputs(scale):
    """What such a model makes of its head's outputs cannot be known: nothing is kept."""
    teacher, rows = taught(Counting(scale))
    assert not teacher.kept
    assert rows == 2 + 2 + 2 + 1 + 3


def test_the_teacher_asks_in_its_context_and_without_gradients():
    model, inside = Counting(), []

    @contextmanager
    def dense():
        inside.append(True)
        yield
        inside.append(False)

    model.head.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    teacher = Teacher(model, dense, TokenDistribution(), WINDOWS)
    outputs = teacher.outputs(torch.tensor([2]))
    assert inside == [True, False, False, False]  # the head once in the model, once to compare
    assert not outputs.requires_grad
    teacher.outputs(torch.tensor([2]))
    assert inside[4:] == [True, False, False]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch_size": 0}, "batch_size must be a positive whole number, got 0"),
        ({"rounds": 1.5}, "rounds must be a positive whole number, got 1.5"),
        ({"micro_batch": 5}, r"micro_batch must be from 1 to batch_size \(4\), got 5"),
        ({"micro_batch": 0}, r"micro_batch must be from 1 to batch_size \(4\), got 0"),
    ],
)
def test_batches_are_checked(change, text):
    good = {"batch_size": 4, "micro_batch": None, "rounds": 3}
    check_batches(SimpleNamespace(**good), "rounds")
    with pytest.raises(ValueError, match=text):
        check_batches(SimpleNamespace(**{**good, **change}), "rounds")


def test_half_cosine():
    assert [half_cosine(step, 4, 1.0, 0.2) for step in (0, 2, 4)] == pytest.approx([1.0, 0.6, 0.2])


def test_the_callback_is_one_step_behind_until_the_end():
    """Or the step would wait for its own loss."""
    seen = []
    losses = Losses(3, seen.append)
    for value in (1.0, 2.0):
        losses.add("coarse", torch.tensor([value, 0.5]), 0.7)
    assert [step.loss for step in seen] == [1.0]
    losses.wait()
    assert [(s.loss, s.divergence, s.kept, s.step, s.steps) for s in seen] == [
        (1.0, 0.5, 0.7, 1, 3), (2.0, 0.5, 0.7, 2, 3)
    ]  # fmt: skip
