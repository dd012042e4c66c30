"""Text by the model itself: as likely as the model says, the same for the same seed, no traces."""

import itertools
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from soco import sampling
from soco.keeping import Filed
from soco.sampling import sample_from_model, writes_text
from soco.workfolder import opened
from tiny_models import tiny_model


def tiny_writer(**changes):
    """A Llama of five tokens with strong opinions."""
    model = tiny_model("llama", vocab_size=5, seed=4, **changes)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10)
        model.lm_head.weight.mul_(10)
    return model


@torch.no_grad()
def chances_of_all(model, start, length):
    """Every sequence (5 ** length, length), and its probability after ``start``."""
    every = torch.tensor(list(itertools.product(range(5), repeat=length)))
    ids = torch.cat([torch.full((len(every), 1), start), every], dim=1)
    logs = model(ids).logits[:, :-1].double().log_softmax(-1).gather(-1, every[..., None])
    return every, logs.sum((1, 2)).exp()


def surprise_of_counts(text, every, chances):
    """Pearson's chi squared in standard deviations from its mean, and the degrees of freedom."""
    place = {tuple(row): index for index, row in enumerate(every.tolist())}
    counts = torch.zeros(len(every), dtype=torch.float64)
    for row in text.tolist():
        counts[place[tuple(row)]] += 1
    expected = chances * len(text)
    common = expected >= 5  # the others together as one class
    expected = torch.cat([expected[common], expected[~common].sum()[None]]).clamp_min(1e-3)
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    freedom = len(counts) - 1
    return ((counts - expected).square() / expected).sum().sub(freedom).item() / math.sqrt(
        2 * freedom
    ), freedom


@pytest.mark.parametrize(
    "preset",
    [
        {},
        {"repetition_penalty": 3.0},
        {"temperature": 0.3, "top_p": 0.5, "top_k": 2, "do_sample": True},
        {"eos_token_id": 2, "forced_eos_token_id": 2, "min_p": 0.3},
        {"suppress_tokens": [0, 1], "no_repeat_ngram_size": 1},
        {"num_beams": 3, "max_length": 5},
    ],
    ids=lambda preset: "-".join(preset) or "plain",
)
def test_sequences_come_as_often_as_the_model_says(preset):
    """Whatever its generation config prefers, and the end token is a token like others."""
    model = tiny_writer(eos_token_id=2)
    for name, value in preset.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    every, chances = chances_of_all(model, 1, 3)
    assert chances.sum().item() == pytest.approx(1)
    text = sample_from_model(model, 3000, 3, start=1, batch_size=1000)
    deviations, freedom = surprise_of_counts(text, every, chances)
    assert freedom > 60
    assert abs(deviations) < 5
    assert (text[:, 0] == 2).any()
    assert model.generation_config is own
    wrong = torch.full_like(chances, 1 / len(chances))
    assert surprise_of_counts(text, every, wrong)[0] > 50  # the test sees a difference


def test_shape_and_dtype():
    model = tiny_model("llama")
    for samples, length, batch_size in ((5, 7, 2), (1, 1, 32), (4, 63, 4)):
        text = sample_from_model(model, samples, length, start=1, batch_size=batch_size)
        assert text.shape == (samples, length)
        assert text.dtype == torch.int64
        assert text.device.type == "cpu"
        assert 0 <= text.min() <= text.max() < 96
    gpt2 = tiny_model("gpt2")
    assert sample_from_model(gpt2, 2, 5).shape == (2, 5)
    t5 = tiny_model("t5")
    assert sample_from_model(t5, 2, 5).shape == (2, 5)


def test_the_same_seed_gives_the_same_text(device):
    model = tiny_model("llama").to(device)
    text = sample_from_model(model, 4, 9, seed=5)
    assert torch.equal(sample_from_model(model, 4, 9, seed=5), text)
    assert not torch.equal(sample_from_model(model, 4, 9, seed=6), text)
    torch.manual_seed(123)
    assert torch.equal(sample_from_model(model, 4, 9, seed=5), text)


def test_random_state_is_left_alone(device):
    model = tiny_model("llama").to(device)
    before = torch.random.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    sample_from_model(model, 2, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    after = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    assert all(torch.equal(one, other) for one, other in zip(cuda, after, strict=True))


def test_no_token_is_too_rare_to_be_drawn():
    text = sample_from_model(tiny_model("llama"), 2000, 1, start=1, batch_size=1000)
    assert text.unique().numel() == 96


def test_what_sequences_begin_with(monkeypatch):
    model = tiny_model("llama", vocab_size=8, eos_token_id=[2, 5])  # 0 pads, 1 begins
    firsts = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda x, **more: firsts.append(x) or generate(x, **more)
    )
    sample_from_model(model, 200, 1)
    random = torch.cat(firsts).flatten().tolist()
    assert set(random) == {3, 4, 6, 7}
    sample_from_model(model, 200, 1, seed=1)
    assert torch.cat(firsts)[200:].flatten().tolist() != random
    firsts.clear()
    text = sample_from_model(model, 200, 2, start=5)
    assert torch.cat(firsts).eq(5).all()
    assert not text[:, 0].eq(5).all()  # it is not part of the text


def test_progress_of_sampling():
    done = []
    sample_from_model(tiny_model("llama"), 5, 2, batch_size=2, on_batch=done.append)
    assert done == [2, 4, 5]


@pytest.mark.parametrize("start", [None, 5])
@pytest.mark.parametrize("batches", range(4))
def test_it_goes_on_behind_what_is_there(batches, start, device, tmp_path):
    """The same text, and only what was not there is written."""
    model = tiny_model("llama").to(device)
    options = {"start": start, "batch_size": 2, "seed": 3}
    whole, done = sample_from_model(model, 7, 5, **options), []

    def stop(sequences):
        if sequences > 2 * batches:
            raise KeyboardInterrupt

    with opened(tmp_path / "work", {}, keep=True) as work:
        for _ in range(2):  # what is there is told once more, and not written
            with pytest.raises(KeyboardInterrupt):
                sample_from_model(
                    model, 7, 5, **options, on_batch=stop, drafts=Filed(work, "text").know_all()
                )
        drafts = Filed(work, "text").know_all()
        assert len(drafts) == batches + 1  # the one that was under way was done
        generate, model.generate = model.generate, None
        if batches < 3:
            with pytest.raises(TypeError):
                sample_from_model(model, 7, 5, **options, drafts=Filed(work, "text").know_all())
            model.generate = generate
        again = sample_from_model(model, 7, 5, **options, on_batch=done.append, drafts=drafts)
        model.generate = generate
        assert torch.equal(again, whole)
        assert done == [2, 4, 6, 7]
        assert len(drafts) == 4


def test_models_that_write_nothing():
    for model in (tiny_model("llama").model, tiny_model("albert"), nn.Linear(2, 2)):
        name = type(model).__name__
        with pytest.raises(ValueError, match=rf'"self" takes a model .* and {name} cannot: give a'):
            sample_from_model(model, 2, 2)


def test_an_error_leaves_the_generation_config_alone():
    model = tiny_model("llama")
    own = model.generation_config

    def stop(sequences):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_from_model(model, 2, 2, on_batch=stop)
    assert model.generation_config is own


def test_the_start_may_be_part_of_it():
    model = tiny_model("llama")
    text = sample_from_model(model, 3, 6, start=5, keep_start=True)
    assert text.shape == (3, 6)
    assert bool((text[:, 0] == 5).all())
    without = sample_from_model(model, 3, 5, start=5)
    assert torch.equal(text[:, 1:], without)


def test_who_writes_text_of_the_kind_that_it_reads():
    written = [writes_text(tiny_model(name)) for name in ("llama", "gpt2", "t5", "bert")]
    assert written == [True, True, False, False]
    assert not writes_text(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("llama", 2 * 2 * (2 * 8) * 4),  # two layers, two heads for keys and values of 8, float32
        ("gpt2", 2 * 2 * 32 * 4),
    ],
)
def test_a_batch_has_room_for_keys_and_values(name, each, monkeypatch):
    model, done = tiny_model(name), []
    monkeypatch.setattr(sampling, "CACHE_ROOM", 4 * each * 10 - 1)
    sample_from_model(model, 7, 10, on_batch=done.append)
    assert done == [3, 6, 7]
    monkeypatch.setattr(sampling, "CACHE_ROOM", 1)  # one sequence is always written
    sample_from_model(model, 2, 10, on_batch=done.append)
    assert done[3:] == [1, 2]


@pytest.mark.parametrize(
    ("heads", "length", "sequences"), [(32, 2048, 4), (8, 2048, 16), (8, 16, 64)]
)
def test_a_batch_of_a_large_model(heads, length, sequences):
    """Llama-2-7B in bfloat16 keeps half a mebibyte for every token; GQA with 8 heads a quarter."""
    config = LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=heads
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    assert sampling.sequences_at_once(model, length) == sequences
