"""soco.evaluation against the plainest computation and the recorded numbers of real models."""

import copy
import json
import math
import re
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
    T5Model,
)

from soco import evaluation, surgery
from soco.evaluation import Evaluation, evaluate, small

VOCAB = 50
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def build(kind, model_type, seed=0, **sizes) -> Any:
    torch.manual_seed(seed)
    return kind(AutoConfig.for_model(model_type, **sizes)).eval()


def llama(seed=0, **changes):
    sizes = SIZES | {"initializer_range": 0.5} | changes
    return build(LlamaForCausalLM, "llama", seed, **sizes)


def bert(kind: type = BertForMaskedLM, seed=0, **changes):
    return build(kind, "bert", seed, **SIZES | {"initializer_range": 0.3} | changes)


def ids(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: on a busy machine, threads cost more waiting than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the numbers --------------------------------------------------------------------------------

SHERLOCK = "books/arthur-conan-doyle_the-adventures-of-sherlock-holmes.txt.gz"
STORIES = "text/tinystories_valid_a.txt"
WIKITEXT = "text/wikitext2.valid.tokens.txt"
RECORDED = [
    ("stories260K", STORIES, 4.1200),
    ("stories260K", WIKITEXT, 213.8245),
    ("babyllama105", STORIES, 2.0788),
    ("babyllama105", WIKITEXT, 37.4567),
    ("books-llama-6m", SHERLOCK, 52.3909),
    ("books-llama-1m", SHERLOCK, 22.7288),
    ("books-llama-1m", WIKITEXT, 114.0775),
]


def load(shared_data, name, dtype=torch.float32):
    folder = shared_data / "models" / name
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize(("name", "text", "perplexity"), RECORDED)
def test_recorded_perplexities(name, text, perplexity, shared_data):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared_data / "models" / name)
    model = load(shared_data, name)
    result = evaluate(model, shared_data / text, tokenizer=tokenizer, length=256, windows=100)
    assert result.perplexity == pytest.approx(perplexity, rel=5e-4)
    assert (result.windows, result.tokens, result.dtype) == (100, 25_500, "float32")


def test_bfloat16_on_the_cpu(shared_data):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared_data / "models/books-llama-1m")
    model, dense = (
        load(shared_data, "books-llama-1m", dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    text = shared_data / SHERLOCK
    result = evaluate(model, text, tokenizer=tokenizer, dense=dense, length=256, windows=10)
    assert result.dtype == "bfloat16"
    assert result.kl == pytest.approx(1e-3, abs=9e-4)
    assert result.top1 == pytest.approx(0.975, abs=0.02)


def test_sorting_model_needs_no_tokenizer(shared_data):
    """All 729 inputs of six digits, each with its first five sorted ones after it."""
    model = load(shared_data, "gpt-nano-sort-gpt2")
    digits = torch.cartesian_prod(*[torch.arange(3)] * 6)
    rows = torch.cat([digits, digits.sort().values], dim=1)[:, :11]
    result = evaluate(model, rows)
    assert (result.windows, result.length, result.tokens) == (729, 11, 7290)
    assert result.perplexity == pytest.approx(27.305, rel=1e-4)  # mostly the digits as they come
    assert evaluate(model, rows, dense=copy.deepcopy(model)).top1 == 1


def test_against_the_plainest_computation(device):
    model, dense = llama().to(device), llama(seed=1).to(device)
    windows = ids(7, 12).to(device)
    result = evaluate(model, windows, dense=dense, length=12, batch_size=3)
    with torch.no_grad():
        log_p, log_q = (
            m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (dense, model)
        )
    nll = -log_q.gather(-1, windows[:, 1:, None]).mean()
    assert result.perplexity == pytest.approx(nll.exp().item(), rel=1e-6)
    assert result.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), 1e-5)
    assert result.top1 == (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert result.distance is None
    assert (result.tokens, result.windows, result.length) == (77, 7, 12)


def test_a_model_agrees_with_itself():
    model = llama()
    result = evaluate(model, ids(200), dense=model)
    assert (result.kl, result.top1) == (0, 1)
    alone = evaluate(model, ids(200))
    assert (alone.kl, alone.top1, alone.distance) == (None, None, None)
    assert alone.perplexity == result.perplexity


def test_batches_and_chunks_change_nothing(monkeypatch):
    model, dense = llama(), llama(seed=1)
    wanted = evaluate(model, ids(300), dense=dense, length=10)
    monkeypatch.setattr(evaluation, "_CHUNK_ENTRIES", 7 * VOCAB)
    for size in (1, 7, 30, 100):
        got = evaluate(model, ids(300), dense=dense, length=10, batch_size=size)
        assert got.perplexity == pytest.approx(wanted.perplexity, rel=1e-6)
        assert got.kl == pytest.approx(wanted.kl, rel=1e-5)
        assert got.top1 == wanted.top1


def test_tokens_that_dense_rules_out_count_nothing():
    """A padded vocabulary has logits of -inf, and 0 log 0 is 0."""
    model = llama()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    model.lm_head.bias.data[-1] = -math.inf
    result = evaluate(model, ids(64) % 40, dense=copy.deepcopy(model))
    assert result.kl == 0
    assert result.perplexity == pytest.approx(result.perplexity)  # finite
    assert evaluate(model, torch.full((64,), VOCAB - 1)).perplexity == math.inf


# ---- windows ------------------------------------------------------------------------------------


def test_length_is_the_context_or_what_the_text_has(monkeypatch):
    model = llama()
    assert evaluate(model, ids(100)).length == 32
    assert evaluate(model, ids(20)).length == 20
    assert evaluate(model, ids(3, 9)).length == 9
    assert evaluate(model, ids(3, 40)).windows == 3
    monkeypatch.setattr(surgery, "USUAL_LENGTH", 16)
    assert evaluate(model, ids(100)).length == 16


def test_windows_are_the_first_ones():
    model, text = llama(), ids(100)
    some = evaluate(model, text, length=10, windows=3)
    assert some.windows == 3
    assert some.perplexity == evaluate(model, text[:39], length=10).perplexity
    with pytest.warns(UserWarning, match="100 tokens: 10 windows of 10, fewer than the 11 asked"):
        assert evaluate(model, text, length=10, windows=11).windows == 10


def test_batch_size_goes_by_tokens_and_vocabulary():
    assert evaluation._batch_size(llama(), 256) == 8
    assert evaluation._batch_size(llama(), 11) == 186
    assert evaluation._batch_size(llama(), 4096) == 1
    with torch.device("meta"):
        wide = llama(vocab_size=2**20)
    assert evaluation._batch_size(wide, 256) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ids(1)}, "the evaluation data has 1 tokens, fewer than one window of 2"),
        ({"length": 10, "text": ids(9)}, "has 9 tokens, fewer than one window of 10"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"length": 33}, "length 33 is too much for the model's 32 positions"),
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"text": ids(40) + 20}, "outside of the vocabulary of 50"),
        ({"text": ["some text"]}, "the evaluation data is text, which needs a tokenizer"),
        ({"dense": llama(vocab_size=60)}, "predicts 60 tokens, the model 50: they cannot"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(llama(), **{"text": ids(100), **changes})


def test_nan_is_refused():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the model's logits hold NaN"):
        evaluate(model, ids(100))


# ---- models that are no causal language models --------------------------------------------------


def test_masked_language_model_has_no_perplexity():
    model, dense = bert(), bert(seed=1)
    text = ids(5, 16)
    result = evaluate(model, text, dense=dense, batch_size=2)
    assert result.perplexity is None
    assert result.tokens == 80
    with torch.no_grad():
        log_p, log_q = (m(input_ids=text).logits.double().log_softmax(-1) for m in (dense, model))
        ours, theirs = (m.base_model(input_ids=text).last_hidden_state for m in (model, dense))
    assert result.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), 1e-5)
    distance = (ours - theirs).square().mean() / theirs.var(correction=0)
    assert result.distance == pytest.approx(distance.item(), rel=1e-5)
    assert "no perplexity, since the model does not predict the next token" in str(result)
    assert evaluate(model, text).distance is None


def test_model_without_a_head_is_compared_by_its_states():
    model = bert(BertModel)
    result = evaluate(model, ids(5, 16), dense=bert(BertModel, seed=1))
    assert (result.perplexity, result.kl, result.top1) == (None, None, None)
    assert result.distance
    assert evaluate(model, ids(5, 16), dense=copy.deepcopy(model)).distance == 0
    small = bert(BertModel, hidden_size=8)
    with pytest.raises(ValueError, match="hidden states of 16 numbers, the model of 8"):
        evaluate(small, ids(2, 16), dense=model)


def test_encoder_decoder_has_no_perplexity():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    kinds = ((T5ForConditionalGeneration, 0, None), (T5Model, None, 0))
    for kind, kl, distance in kinds:
        model = build(kind, "t5", vocab_size=VOCAB, **sizes)
        result = evaluate(model, ids(3, 12), dense=copy.deepcopy(model))
        assert (result.perplexity, result.kl, result.distance) == (None, kl, distance)


# ---- manners ------------------------------------------------------------------------------------


def test_modes_and_gradients_are_left_alone():
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = build(GPT2LMHeadModel, "gpt2", vocab_size=VOCAB, **sizes).train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    dense = copy.deepcopy(model)
    first = evaluate(model, ids(300), dense=dense)
    second = evaluate(model, ids(300), dense=dense)
    assert first.kl == second.kl == 0  # no dropout
    for each in (model, dense):
        assert {name: module.training for name, module in each.named_modules()} == modes
        assert all(p.grad is None and p.requires_grad for p in each.parameters())

    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="hold NaN"):
        evaluate(model, ids(300))
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_no_bar_where_nobody_looks(capsys, monkeypatch):
    evaluate(llama(), ids(100))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    evaluate(llama(), ids(100))  # too quick to need one
    assert "evaluating" not in capsys.readouterr().err


def test_result_reads_well():
    result = evaluate(llama(), ids(2000), dense=llama(seed=1), length=20)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert Evaluation(**result.to_dict()) == result
    shown = Evaluation(4.12, 25_500, 100, 256, "float32", 0.01234, 0.97561, None, 3.14)
    assert str(shown) == (
        "perplexity 4.1200 over 25,500 tokens in 100 windows of 256, float32, 3.1 s; "
        "KL to the dense model 0.0123 nats per token, same first choice for 97.56%"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.235"),
        (0.1, "0.100"),
        (0.0312345, "0.0312"),
        (0.00123456, "0.00123"),
        (0.000123456, "0.000123"),
        (2.16789e-11, "2.17e-11"),
        (0.0, "0.000"),
    ],
)
def test_small_numbers_have_three_digits(value, text):
    assert small(value) == text
