"""Any size from one training, in memory and from a folder."""

import copy

import pytest
import torch

import soco
from soco import resizing
from soco.folders import SPECTRUM
from soco.methods import SoCo
from soco.modules import LowRankLinear, PivotedLinear
from soco.resizing import spectrum_of
from soco.surgery import low_rank_layers
from tiny_models import logits, tiny_model

WINDOWS = torch.randint(3, 96, (12, 16), generator=torch.Generator().manual_seed(2))
RATIOS = (0.2, 0.4, 0.6)


def made(name="llama", ratios=RATIOS, **options):
    method = SoCo(
        steps=options.pop("steps", 4), batch_size=4, fisher_warmup=1,
        deviation=options.pop("deviation", "none"), spacing=options.pop("spacing", None),
    )  # fmt: skip
    model = tiny_model(name)
    soco.compress(
        model, ratios, method=method, calibration=WINDOWS, samples=12, progress=False, **options
    )  # fmt: skip
    return model


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_size_in_memory_and_back(name, pivoted):
    model = made(name, pivoted=pivoted)
    first = logits(model)
    report = soco.report(model)
    assert report.ratio == 0.2
    before = report.params_before
    sizes = []
    for ratio in (0.2, 0.3, 0.4, 0.55, 0.6):
        assert soco.resize(model, ratio) is model
        report = soco.report(model)
        assert report.ratio == ratio
        assert 0 <= report.removed - ratio < 120 / before
        kind = PivotedLinear if pivoted else LowRankLinear
        assert all(type(layer) is kind for layer in low_rank_layers(model).values())
        sizes.append(sum(p.numel() for p in model.parameters()))
        assert report.model_params_after == sizes[-1]
        assert "resize" in report.seconds
    assert sizes == sorted(sizes, reverse=True)
    soco.resize(model, 0.2)
    torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("deviation", ["none", "mean", "vector"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_from_a_folder_it_is_the_same(name, deviation, tmp_path):
    model = made(name, deviation=deviation)
    soco.save(model, tmp_path / "all")
    assert (tmp_path / "all" / SPECTRUM).is_file()
    soco.resize(model, 0.45)
    again = soco.resize(tmp_path / "all", 0.45)
    torch.testing.assert_close(logits(again), logits(model))
    soco.save(again, tmp_path / "small")
    torch.testing.assert_close(logits(soco.load(tmp_path / "small")), logits(model))
    third = soco.resize(tmp_path / "small", 0.2)
    torch.testing.assert_close(logits(third), logits(soco.resize(model, 0.2)))


def test_a_station_is_what_training_for_it_alone_continues_from():
    """The first ratio of several is the one that a run for it alone gives."""
    alone, several = made(ratios=0.2), made(ratios=(0.6, 0.2))
    torch.testing.assert_close(logits(alone), logits(several))
    assert not hasattr(alone, "soco_spectrum")


def test_ratios_far_apart_are_not_only_interpolated(tmp_path):
    """What lies between the ratios that were given is trained for, too."""
    close = made(ratios=(0.2, 0.45), spacing=0.5, steps=8)
    given = made(ratios=(0.2, 0.3, 0.45), steps=8)
    assert spectrum_of(close).ratios == spectrum_of(given).ratios == (0.2, 0.3, 0.45)
    assert soco.report(close).ratio == 0.2
    far = made(ratios=(0.2, 0.45), steps=8)
    for model in (close, given, far):
        soco.resize(model, 0.3)
    torch.testing.assert_close(logits(close), logits(given))
    assert not torch.allclose(logits(close), logits(far))
    soco.save(close, tmp_path)
    torch.testing.assert_close(logits(soco.resize(tmp_path, 0.3)), logits(close))


def test_sizes_in_bytes():
    model = made()
    small = soco.report(soco.resize(model, 0.6)).model_bytes_after
    large = soco.report(soco.resize(model, 0.2)).model_bytes_after
    limit = (small + large) // 2
    soco.resize(model, size=limit)
    report = soco.report(model)
    assert limit - 6000 < report.model_bytes_after <= limit
    assert report.ratio == pytest.approx(report.removed, abs=0.02)
    soco.resize(model, size=f"{limit / 1000}kB")
    assert soco.report(model).model_bytes_after <= limit
    for size, text in ((small - 4000, "is too small"), ("1GB", "is no limit")):
        with pytest.raises(ValueError, match=text):
            soco.resize(model, size=size)


def test_compressed_to_a_size():
    dense = tiny_model("llama")
    whole = sum(p.numel() * p.element_size() for p in dense.parameters())
    limit = int(0.8 * whole)
    for method in ("svd", SoCo(steps=3, batch_size=4, fisher_warmup=1)):
        model = copy.deepcopy(dense)
        soco.compress(
            model, size=limit, method=method, calibration=WINDOWS, samples=12, progress=False
        )
        report = soco.report(model)
        assert limit - 6000 < report.model_bytes_after <= limit
        assert 0 < report.ratio < 1
        assert report.removed >= report.ratio - 1e-9


def test_a_size_counts_the_dtype_that_is_written():
    dense = tiny_model("llama")
    whole = sum(p.numel() * 2 for p in dense.parameters())
    limit = int(0.8 * whole)
    model = copy.deepcopy(dense)
    soco.compress(model, size=limit, stored_as=torch.bfloat16, method="svd", progress=False)
    assert limit - 2000 < sum(p.numel() * 2 for p in model.parameters()) <= limit


def test_a_tied_head_among_the_layers_counts_its_embedding():
    """Compressed, it has a weight of its own, and the embedding stays."""
    model = tiny_model("llama-tied")
    options = {"include": ["*.q_proj", "lm_head"], "method": "svd", "progress": False}
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    soco.compress(model, size=whole, **options)
    after = soco.report(model).model_bytes_after
    assert whole - 2000 < after <= whole


def test_an_error_on_the_way_leaves_the_model(monkeypatch):
    model = made()
    before, config = logits(model), model.config.quantization_config

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(resizing, "mark_compressed", fail)
    with pytest.raises(KeyboardInterrupt):
        soco.resize(model, 0.6)
    assert torch.equal(logits(model), before)
    assert model.config.quantization_config is config


def test_refused():
    model = made()
    for given in ({}, {"ratio": 0.3, "size": "1kB"}):
        with pytest.raises(ValueError, match="give either ratio or size, and not both"):
            soco.resize(model, **given)
    with pytest.raises(ValueError, match=r"learned for ratios from 0.2 to 0.6, and 0.1 is outside"):
        soco.resize(model, 0.1)
    with pytest.raises(ValueError, match="device_map is for a folder"):
        soco.resize(model, 0.3, device_map="cpu")
    with pytest.raises(ValueError, match="the model has no spectrum to resize it by"):
        soco.resize(made(ratios=0.2), 0.3)
    other = made("gpt2")
    other.soco_spectrum = spectrum_of(model)
    with pytest.raises(ValueError, match=r"is of another model: its model\.layers\.0"):
        soco.resize(other, 0.3)


def test_a_folder_without_a_spectrum(tmp_path):
    soco.save(made(ratios=0.2), tmp_path / "one")
    with pytest.raises(ValueError, match=r"holds no soco_spectrum\.safetensors"):
        soco.resize(tmp_path / "one", 0.3)


def test_a_spectrum_does_not_outlive_its_model(tmp_path):
    """A folder that is written anew has the new model's spectrum, or none."""
    soco.save(made(), tmp_path / "x")
    soco.save(made(ratios=0.2), tmp_path / "x")
    assert not (tmp_path / "x" / SPECTRUM).exists()


def test_a_dense_export_has_no_spectrum(tmp_path):
    soco.save(made(), tmp_path / "x")
    soco.export_dense(tmp_path / "x", tmp_path / "dense")
    assert not (tmp_path / "dense" / SPECTRUM).exists()


@pytest.mark.parametrize(
    ("ratio", "options", "text"),
    [
        ((), {}, "ratios must be one or more different numbers"),
        ((0.2, 0.2), {}, "ratios must be one or more different numbers"),
        ((0.2, 1.5), {}, "ratio is the fraction of parameters to remove"),
        ("0.5", {}, "ratio is the fraction of parameters to remove"),
        ((0.2, 0.4), {"method": "svd"}, "several ratios in one run are for method soco: call svd"),
        ((0.2, 0.4), {"refine": True}, "refine changes the factors of one size"),
        ((0.2, 0.4), {"surgeon": True}, "surgeon changes the factors of one size"),
        (0.4, {"size": "1MB"}, "give either ratio or size, and not both"),
        (0.5, {"size": "much"}, "a size is a positive number of bytes"),
        (0.5, {"size": 10}, "size 10 is too small"),
        (0.5, {"effort": "huge"}, "there is no effort 'huge': choose one of fast, balanced, best"),
        (0.5, {"preset": "huge"}, "there is no preset 'huge'"),
        (0.5, {"effort": "fast", "preset": "paper"}, "are two presets: give one"),
        (0.5, {"effort": "fast", "method": "svd"}, 'effort is for method="soco", and svd has none'),
    ],
)
def test_compress_refuses(ratio, options, text):
    model = tiny_model("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=text):
        soco.compress(model, ratio, calibration=WINDOWS, samples=12, progress=False, **options)
    assert torch.equal(logits(model), before)
