"""One calibration pass, every decomposition once, probes that leave the model as it is."""

import pytest
import torch

import soco.workbench
from soco.calibration import collect
from soco.linalg import whitened_svd
from soco.methods import Plain, TwoSided, Whitened
from soco.objectives import TokenDistribution
from soco.sampling import sample_from_model
from soco.surgery import find_linears, weight_of
from soco.workbench import PROBE_WINDOWS, Workbench
from tiny_models import tiny_model

WINDOWS = torch.randint(3, 96, (12, 10), generator=torch.Generator().manual_seed(2))
Q0, Q1 = (f"model.layers.{block}.self_attn.q_proj" for block in (0, 1))


@pytest.fixture
def bench():
    model = tiny_model("llama", initializer_range=0.3)
    return Workbench(model, find_linears(model), WINDOWS, batch_size=4)


def singles(bench):
    return [(name,) for name in bench.targets]


def test_statistics_are_collected_once(bench, monkeypatch):
    runs = []

    def watched(*args, **options):
        runs.append(sorted(options["kinds"]))
        return collect(*args, **options)

    monkeypatch.setattr(soco.workbench, "collect", watched)
    bench.statistics({"gram", "grad_gram"})
    bench.statistics({"grad_gram"})
    bench.spectra(Whitened(), singles(bench))
    bench.spectra(TwoSided(), singles(bench))
    bench.similarity(singles(bench))
    assert runs == [["grad_gram", "gram"]]
    bench.statistics({"abs_mean"})
    assert runs[1:] == [["abs_mean"]]


def test_every_weight_is_taken_apart_once(bench):
    class Counting:
        needs = frozenset()
        in_loss = False
        calls = 0

        def spectrum(self, weight, stats, *, name):
            Counting.calls += 1
            return whitened_svd(weight, None, name=name)

    basis = Counting()
    first = bench.spectra(basis, singles(bench))
    again = bench.spectra(basis, singles(bench))
    assert Counting.calls == len(bench.targets)
    assert all(first[name] is again[name] for name in first)
    bench.spectra(basis, [(Q0, Q1), *[g for g in singles(bench) if g[0] not in (Q0, Q1)]])
    assert Counting.calls == len(bench.targets) + 1


def test_equal_bases_are_one(bench):
    first = bench.spectra(Whitened("output"), singles(bench))
    assert bench.spectra(Whitened(), singles(bench))[Q0] is first[Q0]
    assert bench.spectra(Whitened("eigen"), singles(bench))[Q0] is not first[Q0]


def test_a_group_is_the_stacked_weight_under_the_summed_gram(bench):
    spectrum = bench.spectra(Whitened(), [(Q0, Q1)])[Q0]
    weight = torch.cat([weight_of(bench.targets[name]).detach() for name in (Q0, Q1)])
    gram = bench.means(Q0)["gram"] + bench.means(Q1)["gram"]
    torch.testing.assert_close(spectrum.sigma, whitened_svd(weight, gram).sigma)
    parts = bench.split((Q0, Q1), spectrum.truncate(3))
    assert parts[Q0].down is parts[Q1].down
    whole = torch.cat([parts[Q0].product(), parts[Q1].product()])
    torch.testing.assert_close(whole, spectrum.truncate(3).product())


def test_means_are_per_token(bench):
    bench.statistics({"gram", "abs_mean", "fisher", "grad_gram"})
    known, raw = bench.means(Q0), bench.statistics(())[Q0]
    assert raw.tokens == WINDOWS.numel()
    torch.testing.assert_close(known["gram"], raw.gram / WINDOWS.numel())
    torch.testing.assert_close(known["abs_mean"], raw.abs_mean / WINDOWS.numel())
    torch.testing.assert_close(known["fisher"], raw.fisher / len(WINDOWS))
    torch.testing.assert_close(known["grad_gram"], raw.grad_gram / WINDOWS.numel())


def test_statistics_go_with_the_decomposition_unless_kept(bench):
    bench.keep = False
    bench.spectra(Whitened(), singles(bench))
    assert not bench._statistics
    assert not bench._spectra


def test_text_is_written_once_by_the_model_itself(bench, monkeypatch):
    runs = []

    def watched(*arguments, **options):
        runs.append(options["seed"])
        return sample_from_model(*arguments, **options)

    monkeypatch.setattr(soco.workbench, "sample_from_model", watched)
    text = bench.written(0.5, 3)
    assert text is bench.written(0.5, 3)
    assert runs == [3]
    expected = sample_from_model(bench.model, 6, WINDOWS.shape[1], keep_start=True, seed=3)
    assert torch.equal(text, expected)
    assert len(bench.written(2.0, 3)) == 24
    assert not torch.equal(bench.written(0.5, 4), text)
    bench.source["source"] = "self"  # that was drawn with the seed, and would be drawn again
    assert torch.equal(bench.written(0.5, 2), expected)
    assert runs[-1] == 3


def test_who_does_not_write():
    """Too few to be one; no text at all; a model that translates, or cannot generate."""
    for name, windows, share in (
        ("llama", WINDOWS, 0.0), ("llama", WINDOWS, 0.01), ("llama", None, 1.0),
        ("t5", WINDOWS, 1.0), ("bert", WINDOWS, 1.0),
    ):  # fmt: skip
        model = tiny_model(name)
        assert Workbench(model, find_linears(model), windows).written(share, 0) is None


def test_a_probe_is_the_divergence_with_one_layer_cut(bench):
    before = {name: p.clone() for name, p in bench.model.state_dict().items()}
    spectrum = bench.spectra(Plain(), [(Q0,)])[Q0]
    found = bench.probe(Plain(), (Q0,), 3)
    ids, objective = WINDOWS[:PROBE_WINDOWS], TokenDistribution()
    with torch.no_grad():
        dense = objective.outputs(bench.model, ids)
        bench.targets[Q0].weight.copy_(spectrum.truncate(3).product())
        student = objective.outputs(bench.model, ids)
        bench.targets[Q0].weight.copy_(before[f"{Q0}.weight"])
    assert found == pytest.approx(float(objective.divergence(dense, student)), rel=1e-4)
    assert found > 0
    assert bench.probe(Plain(), (Q0,), 32) == pytest.approx(0, abs=1e-6)
    after = bench.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_probe_is_asked_once(bench, monkeypatch):
    found = bench.probe(Plain(), (Q0,), 3)
    monkeypatch.setattr(soco.workbench, "replaced", None)
    assert bench.probe(Plain(), (Q0,), 3) == found


def test_similarity_is_the_cosine_of_kernels_on_tokens(bench):
    found = bench.similarity([(Q0,)])[Q0]
    inputs = []
    hook = bench.targets[Q0].register_forward_pre_hook(
        lambda module, given: inputs.append(given[0].flatten(0, -2))
    )
    with torch.no_grad():
        bench.model(WINDOWS)
    hook.remove()
    x = torch.cat(inputs).double()
    y = x @ weight_of(bench.targets[Q0]).detach().double().T
    K, L = x @ x.T, y @ y.T
    assert found == pytest.approx(float((K * L).sum() / (K.norm() * L.norm())), rel=1e-5)


def test_similarity_of_a_scaled_identity_is_one():
    model = tiny_model("llama")
    layers = {Q0: find_linears(model)[Q0]}
    with torch.no_grad():
        weight_of(layers[Q0]).copy_(3 * torch.eye(32))
    found = Workbench(model, layers, WINDOWS).similarity([(Q0,)])
    assert found[Q0] == pytest.approx(1)


def test_without_text_there_are_no_statistics():
    model = tiny_model("llama")
    bench = Workbench(model, find_linears(model), None)
    assert bench.spectra(Plain(), singles(bench)).keys() == bench.targets.keys()
    with pytest.raises(ValueError, match="statistics take calibration text, and there is none"):
        bench.statistics({"gram"})
