"""soco.refitting: fits of layers in files. That they are those in memory: test_streaming.py."""

import pytest
import torch

from soco import refitting
from soco.lending import Lender
from soco.methods import AASVD, AdaSVD
from soco.sequential import Walk
from soco.surgery import transformer_blocks
from test_streaming import dense, stream

pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer calibration tokens")


def blocks_in_memory(model):
    """Those of which a matrix has values."""
    return {
        number
        for number, block in enumerate(transformer_blocks(model))
        if any(not p.is_meta and p.dim() > 1 for p in block.parameters())
    }


def test_two_blocks_at_a_time(tmp_path, monkeypatch):
    """The one that is fitted, and the compressed one before it, whose outputs it gets."""
    dense(tmp_path / "dense", num_hidden_layers=5)
    held, entered, read = [], [], []
    run, enter, fill = Walk._run, Lender._enter, Lender._fill

    def watching(self, *arguments):
        found = run(self, *arguments)
        held.append(blocks_in_memory(self.model))
        return found

    def counting(self, number):
        entered.append(number)
        enter(self, number)

    def filling(self, slots):
        read.append(entered[-1])
        fill(self, slots)

    monkeypatch.setattr(Walk, "_run", watching)
    monkeypatch.setattr(Lender, "_enter", counting)
    monkeypatch.setattr(Lender, "_fill", filling)
    stream(tmp_path / "dense", tmp_path / "out", method="aa-svd", batch_size=3)
    # Three batches (the first sequence is one) in either model, of which the dense one runs before.
    assert held[:6] == 6 * [{0}]
    assert held[6:] == [each for n in range(1, 5) for _ in range(3) for each in ({n}, {n - 1, n})]
    blocks = [3 * [n, n - 1, n] for n in range(1, 5)]
    assert entered == [*(6 * [0]), *(number for block in blocks for number in block)]
    assert read == [0, 1, 2, 3, 4]  # once, for all batches


def test_what_blocks_put_out_goes_when_it_was_read(tmp_path, monkeypatch):
    dense(tmp_path / "dense", num_hidden_layers=5)
    block, left = refitting.Fits._block, []

    def watching(self, walk, parts, place, *arguments):
        block(self, walk, parts, place, *arguments)
        files = (file.name.split("-")[1:3] for file in self.work.path.glob("walk-*"))
        left.append({(int(stream), int(of)) for stream, of in files})

    monkeypatch.setattr(refitting.Fits, "_block", watching)
    stream(tmp_path / "dense", tmp_path / "out", method="aa-svd")
    assert left == [{(0, 0)}, *({(0, n), (1, n - 1)} for n in range(1, 5))]


@pytest.mark.parametrize(
    ("method", "fit"), [(AASVD(), "refit"), (AdaSVD(), "factor")], ids=["aa-svd", "adasvd"]
)
def test_no_layer_is_fitted_twice(method, fit, tmp_path, monkeypatch):
    """Stopped in the middle of a block: the same call begins with the layer that was under way."""
    dense(tmp_path / "dense", num_hidden_layers=2)
    own, seen = getattr(type(method), fit), []

    def stopping(self, weight, *arguments, **options):
        seen.append(float(weight.double().sum()))
        if len(seen) == 10:
            raise KeyboardInterrupt
        return own(self, weight, *arguments, **options)

    monkeypatch.setattr(type(method), fit, stopping)
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "dense", tmp_path / "out", method=method, allocator="uniform")
    stream(tmp_path / "dense", tmp_path / "out", method=method, allocator="uniform")
    assert len(seen) == 14 + 1
    assert seen[9] == seen[10]
    assert len(set(seen)) == 14


def test_layers_that_stay_dense_are_not_fitted(tmp_path, monkeypatch):
    dense(tmp_path / "dense")
    seen, own = [], AASVD.refit

    def counting(self, *arguments, **options):
        seen.append(options["name"])
        return own(self, *arguments, **options)

    monkeypatch.setattr(AASVD, "refit", counting)
    report = stream(tmp_path / "dense", tmp_path / "out", 0.15, method="aa-svd", allocator="energy")
    factored = [f"{layer.name}.weight" for layer in report.layers if layer.rank is not None]
    assert 0 < len(factored) < 14
    assert seen == factored
    assert torch.isfinite(torch.tensor(report.removed))
