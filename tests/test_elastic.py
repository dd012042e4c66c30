"""A spectrum of several sizes: exact at its stations, sensible between, and checked in files."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from soco.choosing import choose_components
from soco.elastic import Components, ElasticSpectrum, elastic_spectrum
from soco.linalg import Factors, whitened_svd
from soco.ranks import layer_params, parameter_budget
from soco.spectral import BESIDES, Snapshot, SpectralLinear
from soco.surgery import layout_of

SHAPES = {"a": (12, 8), "b": (8, 12), "c": (10, 10)}
RATIOS = (0.2, 0.5, 0.7)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learned(*, pivoted=False, bias=True, logits=None, **options):
    """Layers as a training for several budgets leaves them, and the spectrum made of them."""
    torch.manual_seed(0)
    targets = {n: nn.Linear(cols, rows, bias=bias) for n, (rows, cols) in SHAPES.items()}
    layers = {
        n: SpectralLinear(t.weight, t.bias, whitened_svd(t.weight.detach(), None), **options)
        for n, t in targets.items()
    }
    budgets = tuple(parameter_budget(SHAPES, ratio) for ratio in RATIOS)
    snapshots, plain = [], []
    for turn, budget in enumerate(budgets):
        fisher = {}
        for place, (name, layer) in enumerate(layers.items()):
            with torch.no_grad():
                layer.logit.copy_(normal(len(layer.logit), seed=10 * turn + place))
                if logits is not None and turn:
                    layer.logit[:] = logits
                for part in BESIDES:
                    if (value := getattr(layer, part)) is not None:
                        value.copy_(0.1 * normal(len(value), seed=99 + turn))
            worth = 0.8 ** torch.arange(len(layer.gain)) * (
                1 + normal(len(layer.gain), seed=turn).abs()
            )
            fisher[name] = worth / layer.scores().detach().square().clamp_min(1e-30)
        orders = choose_components(layers, fisher, budget, pivoted)
        for name, layer in layers.items():
            layer.arrange(orders[name], int(layer.mask.sum()))
        snapshots.append(
            {
                n: Snapshot(
                    layer.scores().detach(), layer.logit.detach().clone(),
                    layer.scores().detach() ** 2 * fisher[n] / 2, layer.mask.clone(),
                    **{
                        part: value.detach().clone()
                        for part in BESIDES
                        if (value := getattr(layer, part)) is not None
                    },
                )
                for n, layer in layers.items()
            }
        )  # fmt: skip
        plain.append({n: layer.fold() for n, layer in layers.items()})
    spectrum = elastic_spectrum(RATIOS, budgets, targets, layers, snapshots, pivoted=pivoted)
    return spectrum, plain


def product(weight):
    return weight.product() if isinstance(weight, Factors) else weight


def size(found, pivoted):
    return sum(
        layer_params(SHAPES[n], w.up.shape[1], pivoted) if isinstance(w, Factors) else w.numel()
        for n, (w, _) in found.items()
    )


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("options", [{}, {"deviation": True}, {"channels": True}, {"mean": True}])
def test_at_a_station_it_is_what_was_trained(options, pivoted):
    if "mean" in options:
        spectrum, plain = learned_with_means(pivoted)
    else:
        spectrum, plain = learned(pivoted=pivoted, **options)
    for budget, wanted in zip(spectrum.budgets, plain, strict=True):
        found = spectrum.at(budget)
        assert found.keys() == SHAPES.keys()
        for name, (weight, bias) in found.items():
            assert isinstance(weight, Factors) == isinstance(wanted[name][0], Factors)
            torch.testing.assert_close(product(weight), product(wanted[name][0]))
            torch.testing.assert_close(bias, wanted[name][1])


def learned_with_means(pivoted):
    """Every layer has a mean of its own size."""
    original = SpectralLinear.__init__

    def given(self, weight, bias, spectrum, **options):
        mean = normal(weight.shape[1], seed=5)
        original(self, weight, bias, spectrum, mean=(mean, weight @ mean), **options)

    SpectralLinear.__init__ = given
    try:
        return learned(pivoted=pivoted)
    finally:
        SpectralLinear.__init__ = original


@pytest.mark.parametrize("pivoted", [False, True])
def test_between_stations_every_budget_is_met(pivoted):
    spectrum, _ = learned(pivoted=pivoted)
    widest = max(map(sum, SHAPES.values()))
    for budget in range(spectrum.budgets[-1], spectrum.budgets[0] + 1, 3):
        used = size(spectrum.at(budget), pivoted)
        assert used <= budget
        assert budget - used < widest


def test_between_stations_scores_and_values_are_geometric_means():
    up, down = torch.eye(4), torch.eye(4)
    layer = Components(
        "linear", up[:, :3], down[:3], torch.tensor([2.0, 1.0, 1.0]),
        scores=torch.tensor([[1.0, 1.0, 1.0], [4.0, 1.0, 1.0], [4.0, 1.0, 1.0]]),
        values=torch.tensor([[1.0, 9.0, 5.0], [1.0, 1.0, 5.0], [1.0, 0.0, 0.0]]),
        alive=torch.ones(3, 3, dtype=torch.bool),
    )  # fmt: skip
    other = replace(layer, scores=torch.ones(3, 3), values=torch.ones(3, 3))
    spectrum = ElasticSpectrum((0.1, 0.2, 0.5), (48, 32, 16), False, {"x": layer, "y": other})
    weight, bias = spectrum.at(40)["x"]  # values 1, 3, 5 and scores 2, 1, 1, half-way
    assert bias is None
    torch.testing.assert_close(product(weight).diagonal()[:3].sort().values[:2], torch.ones(2))
    lonely = ElasticSpectrum((0.1, 0.5), (16, 8), False, {"x": layer_of(layer, [0, 1])})
    weight, _ = lonely.at(12)["x"]  # one component: the second, worth 3
    assert isinstance(weight, Factors)
    assert weight.up.shape[1] == 1
    torch.testing.assert_close(product(weight).diagonal(), torch.tensor([0.0, 0.0, 1.0, 0.0]))


def layer_of(layer, stations):
    parts = {name: getattr(layer, name)[stations] for name in ("scores", "values", "alive")}
    return replace(layer, **parts)


def test_all_components_that_are_at_hand_are_no_dense_weight():
    """A layer that had three of four components at the first station has no others to be dense."""
    layer = Components(
        "linear", torch.eye(4)[:, :3], torch.eye(4)[:3], torch.ones(3),
        scores=torch.ones(1, 3), values=torch.ones(1, 3), alive=torch.ones(1, 3) > 0,
    )  # fmt: skip
    spectrum = ElasticSpectrum((0.1,), (16,), False, {"x": layer})
    weight, _ = spectrum.at(16)["x"]
    assert isinstance(weight, Factors)
    assert weight.up.shape == (4, 3)
    torch.testing.assert_close(product(weight), torch.diag(torch.tensor([1.0, 1, 1, 0])))


def test_outside_of_what_was_learned():
    spectrum, _ = learned()
    for ratio in (0.1, 0.75):
        with pytest.raises(ValueError, match=r"learned for ratios from 0.2 to 0.7, and 0.\d+ is"):
            spectrum.budget(ratio)
    wrong: list[Any] = [0, 1.0, "0.3", None]
    for ratio in wrong:
        with pytest.raises(ValueError, match="ratio is the fraction of parameters to remove"):
            spectrum.budget(ratio)
    for budget in (spectrum.budgets[-1] - 1, spectrum.budgets[0] + 1):
        with pytest.raises(ValueError, match=r"in the compressed layers, and [0-9,]+ is"):
            spectrum.at(budget)
    assert spectrum.budget(0.7) == spectrum.budgets[-1]


# ---- files


@pytest.mark.parametrize("options", [{}, {"deviation": True}, {"channels": True}, {"bias": False}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_file_holds_it_all(options, dtype, tmp_path):
    spectrum, _ = learned(pivoted=True, **options)
    spectrum.save(tmp_path / "x.safetensors", dtype)
    again = ElasticSpectrum.load(tmp_path / "x.safetensors")
    assert (again.ratios, again.budgets, again.pivoted) == (
        spectrum.ratios, spectrum.budgets, True
    )  # fmt: skip
    assert again.layers.keys() == spectrum.layers.keys()
    for name, layer in again.layers.items():
        mine = spectrum.layers[name]
        assert layer.layout == mine.layout
        assert layer.tensors().keys() == mine.tensors().keys()
        for part, value in layer.tensors().items():
            narrow = dtype is not None and part in ("up", "down", "bias")
            wanted = torch.bool if part == "alive" else dtype if narrow else torch.float32
            assert value.dtype == wanted
            assert torch.equal(value, mine.tensors()[part].to(value.dtype))


def test_a_score_that_came_to_nothing_is_written_and_read(tmp_path):
    """The sigmoid of a large negative number is 0 in float32; the file holds positive scores."""
    spectrum, _ = learned(logits=-200.0)
    spectrum.save(tmp_path / "x.safetensors")
    again = ElasticSpectrum.load(tmp_path / "x.safetensors")
    assert float(again.layers["a"].scores.min()) < 1e-30


def broken(tmp_path, change):
    """A file after ``change`` of its tensors and its description."""
    spectrum, _ = learned(pivoted=True, deviation=True)
    file = tmp_path / "x.safetensors"
    spectrum.save(file)
    tensors = load_file(file)
    with safe_open(str(file), "pt") as held:
        described = json.loads(held.metadata()["soco"])
    change(tensors, described)
    save_file(tensors, str(file), {"soco": json.dumps(described)})
    return file


def of_tensors(key, value):
    def change(tensors, described):
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key]) if callable(value) else value

    return change


def of_description(key, value):
    return lambda tensors, described: described.update({key: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (of_tensors("a.up", None), "lacks a.up"),
        (of_tensors("b.values", None), "lacks b.values"),
        (of_tensors("a.up", torch.ones(3)), "a.up and a.down must be matrices"),
        (of_tensors("a.gain", torch.ones(30)), r"a.gain must be \[\d+\], got \[30\]"),
        (of_tensors("a.alive", lambda x: x.float()), "a.alive must say of each station what"),
        (of_tensors("a.alive", lambda x: x & False), "a.alive must say of each station what"),
        (of_tensors("a.down", torch.ones(30, 8)), "a has 30 components, which do not fit"),
        (of_tensors("a.scores", lambda x: x[:2]), r"a.scores must be \[3, \d+\], got \[2, \d+\]"),
        (of_tensors("a.scores", lambda x: -x), "a has scores that are not positive"),
        (of_tensors("a.values", lambda x: -x), "or negative values"),
        (of_tensors("c.up", lambda x: x / 0), "c.up holds what is not a finite number"),
        (of_tensors("c.up", lambda x: x.long()), "c.up holds what is not a finite number"),
        (of_tensors("c.mean", torch.ones(10)), "c must have both of mean and mean_output, or none"),
        (of_tensors("d.up", torch.ones(10, 2)), "holds d.up, which belongs to no layer"),
        (of_description("format", "other"), "is not a spectrum written by soco"),
        (of_description("version", 2), "has version 2, this soco reads version 1"),
        (of_description("ratios", [0.2]), "must give a budget for every ratio"),
        (of_description("ratios", [0.5, 0.2, 0.7]), "ratios must be between 0 and 1 and ascend"),
        (of_description("ratios", [0.5, 0.6, "x"]), "ratios must be between 0 and 1 and ascend"),
        (of_description("budgets", [3, 2, -1]), "budgets must be positive and descend"),
        (of_description("layouts", {"a": "cube"}), "layouts must name layers as linear or conv1d"),
        (of_description("layouts", {}), "layouts must name layers as linear or conv1d"),
        (of_description("pivoted", 1), "pivoted must be true or false, got 1"),
    ],
)  # fmt: skip
def test_every_defect_has_its_own_message(change, text, tmp_path):
    with pytest.raises(ValueError, match=text) as caught:
        ElasticSpectrum.load(broken(tmp_path, change))
    assert "x.safetensors" in str(caught.value)


def test_files_that_are_none(tmp_path):
    file = tmp_path / "soco_spectrum.safetensors"
    with pytest.raises(ValueError, match=r"holds no soco_spectrum\.safetensors: only a model"):
        ElasticSpectrum.load(file)
    save_file({"x": torch.ones(2)}, str(file))
    with pytest.raises(ValueError, match="is not a spectrum written by soco"):
        ElasticSpectrum.load(file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is truncated"):
        ElasticSpectrum.load(file)


def test_layouts():
    assert layout_of(nn.Linear(2, 2)) == "linear"
