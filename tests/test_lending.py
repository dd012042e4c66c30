"""soco.lending: the numbers of a model in memory, with one block of it there."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from soco import lending
from soco.lending import Lender
from soco.objectives import objective_for, run_model
from soco.spectral import Components, SpectralLinear
from soco.steps import all_dense, checkpointed
from soco.stored import StoredModel
from soco.surgery import bias_of, find_linears, replaced, transformer_blocks, weight_of
from soco.workfolder import opened
from test_streaming import STREAMED, dense
from tiny_models import tiny_model

IDS = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))
WIDE = torch.float32


@pytest.fixture
def work(tmp_path):
    with opened(tmp_path / "work", {}, keep=True) as folder:
        yield folder


def files_of(model):
    return {name: f"layer-{i}.safetensors" for i, name in enumerate(find_linears(model))}


def lender_of(folder, work, dtype=WIDE, device="cpu"):
    stored = StoredModel(folder)
    return stored, Lender(stored, work, files_of(stored.model), dtype, torch.device(device))


def components(name, weight, dtype=WIDE):
    """Of an exact decomposition."""
    up, sigma, down = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return Components(
        up.to(dtype), down.to(dtype), sigma.float(), sigma.float() + len(name)
    )  # fmt: skip


def spectral(targets, of):
    """Layers that are trained, of what ``of`` gives."""
    return {
        name: SpectralLinear(weight_of(layer), bias_of(layer), of(name), channels=True)
        for name, layer in targets.items()
    }


class Pair:
    """A model with spectral layers in memory, and the same one lent."""

    def __init__(self, tmp_path, work, name="llama", ahead=False, **changes):
        self.model = dense(tmp_path / "dense", name, **changes).eval().requires_grad_(False)
        self.stored, self.lender = lender_of(tmp_path / "dense", work)
        if ahead:
            self.lender._worker = ThreadPoolExecutor(1)
        targets = find_linears(self.model)
        made = {n: components(n, weight_of(layer)) for n, layer in targets.items()}
        for n, each in made.items():
            self.lender.keep(n, each)
        self.whole = spectral(targets, lambda n: Components(*map(torch.clone, made[n])))

    def lent(self):
        """To be made inside of ``lender.lent``."""
        return spectral(find_linears(self.stored.model), self.lender.pop)


def loss_of(model, layers):
    """Outputs, and the gradients of a loss by the scores, blocks computed again for them."""
    for layer in layers.values():
        layer.zero_grad()
    with replaced(model, layers), checkpointed(transformer_blocks(model)):
        outputs = objective_for(model, IDS[:1]).outputs(model, IDS)
        outputs.square().sum().backward()
    return outputs.detach(), [layer.logit.grad.clone() for layer in layers.values()]


def dense_outputs(model, layers):
    with replaced(model, layers), all_dense(layers.values()), torch.no_grad():
        return objective_for(model, IDS[:1]).outputs(model, IDS)


def check_same(one, other):
    assert torch.equal(one[0], other[0])
    for a, b in zip(one[1], other[1], strict=True):
        assert torch.equal(a, b)
        assert float(a.abs().sum()) > 0


@pytest.mark.parametrize("name", STREAMED)
def test_the_dense_model(name, tmp_path, work):
    """Run, and its blocks as empty as before afterwards."""
    model = dense(tmp_path / "dense", name)
    stored, lender = lender_of(tmp_path / "dense", work)
    ran = {}
    with lender.lent(), torch.no_grad():
        ran = run_model(stored.model, IDS)
        model.eval()
        expected = run_model(model, IDS)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ran[key], value)
    assert all(parameter.is_meta for parameter in stored.model.parameters())
    assert not any("forward" in block.__dict__ for block in transformer_blocks(stored.model))


def test_a_trained_model(model_dir, tmp_path, work):
    folder = model_dir("books-llama-1m")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    stored, lender = lender_of(folder, work, model.dtype)
    with lender.lent(), torch.no_grad():
        assert torch.equal(run_model(stored.model, IDS).logits, run_model(model, IDS).logits)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", STREAMED)
def test_spectra_forward_and_back(name, ahead, tmp_path, work):
    """All components, a part in another order, the dense model, another part; bit for bit."""
    pair = Pair(
        tmp_path, work, name, ahead, **({} if name == "bloom" else {"num_hidden_layers": 3})
    )
    with pair.lender.lent():
        layers = pair.lent()
        check_same(loss_of(pair.stored.model, layers), loss_of(pair.model, pair.whole))
        for part in (0.7, 0.4):
            for each in (layers, pair.whole):
                generator = torch.Generator().manual_seed(5)
                for layer in each.values():
                    rank = len(layer.order)
                    order, alive = torch.randperm(rank, generator=generator), int(part * rank)
                    layer.mask.fill_(False).index_fill_(0, order[:alive], True)
                    layer.arrange(order, alive)
            check_same(loss_of(pair.stored.model, layers), loss_of(pair.model, pair.whole))
            ours = dense_outputs(pair.stored.model, layers)
            assert torch.equal(ours, dense_outputs(pair.model, pair.whole))
        for n, layer in layers.items():
            assert layer.up.is_meta
            with pair.lender.whole(n, layer):
                found, bias = layer.fold()
            expected, other = pair.whole[n].fold()
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert (bias is None) == (other is None)
            assert layer.up.is_meta


def test_one_block_at_a_time(tmp_path, work, monkeypatch):
    """Forward and on the way back, whether it is dense or spectral."""
    pair = Pair(tmp_path, work, num_hidden_layers=4)
    held = []
    enter = Lender._enter

    def watching(self, number):
        enter(self, number)
        places = self._stored.model.named_modules()
        found = set()
        for name, module in places:
            tensors = [*module._parameters.values(), *module._buffers.values()]
            large = [t for t in tensors if t is not None and t.dim() > 1 and not t.is_meta]
            if large and ".layers." in name:
                found.add(int(name.split(".")[2]))
        held.append((number, found))

    monkeypatch.setattr(Lender, "_enter", watching)
    with pair.lender.lent():
        layers = pair.lent()
        loss_of(pair.stored.model, layers)
        dense_outputs(pair.stored.model, layers)
    order = [0, 1, 2, 3]
    # The objective is found by a run of its own, before each.
    assert [number for number, _ in held] == [*order, *order, *order[::-1], *order, *order]
    assert all(found == {number} for number, found in held)


def test_a_block_that_runs_again_is_not_read_again(tmp_path, work, monkeypatch):
    """The last one on the way back, unless something changed."""
    pair = Pair(tmp_path, work, num_hidden_layers=2)
    read, seen = Lender._slots, []
    monkeypatch.setattr(
        Lender, "_slots", lambda self, wants: (seen.append(wants[0][0]), read(self, wants))[1]
    )
    with pair.lender.lent():
        layers = pair.lent()
        with replaced(pair.stored.model, layers), torch.no_grad():
            run_model(pair.stored.model, IDS)
            seen.clear()
            pair.lender._enter(1)
            assert seen == []
            layer = layers["model.layers.1.mlp.up_proj"]
            for change in (
                lambda: layer.arrange(layer.order.flip(0), len(layer.order)),
                lambda: setattr(layer, "computed", 3),
                lambda: setattr(layer, "dense", True),
            ):
                change()
                pair.lender._enter(1)
                assert seen == ["model.layers.1"]
                seen.clear()
        pair.lender._enter(1)  # with its dense layers
        assert seen == ["model.layers.1"]


@pytest.mark.parametrize(
    ("entered", "begun"),
    [
        ([0], [1]),
        ([0, 1, 2], [1, 2, 3]),
        ([0, 1, 2, 3], [1, 2, 3]),  # nothing follows the last one
        ([0, 1, 2, 3, 3, 2, 1, 0], [1, 2, 3, 2, 1, 0]),
        ([0, 1, 2, 3, 0, 1], [1, 2, 3, 1, 2]),  # forward again
    ],
)
def test_what_is_read_ahead(entered, begun, tmp_path, work, monkeypatch):
    pair = Pair(tmp_path, work, num_hidden_layers=4)
    seen = []
    monkeypatch.setattr(Lender, "_read_ahead", lambda self, number: seen.append(number))
    with pair.lender.lent():
        for number in entered:
            pair.lender._enter(number)
    assert seen == begun


def test_what_was_read_ahead_and_is_out_of_date_is_not_used(tmp_path, work):
    pair = Pair(tmp_path, work, ahead=True, num_hidden_layers=3)
    with pair.lender.lent():
        layers = pair.lent()
        with replaced(pair.stored.model, layers), torch.no_grad():
            pair.lender._enter(0)  # begins to read block 1
            for layer in (layers["model.layers.1.mlp.up_proj"],):
                layer.arrange(layer.order.flip(0), len(layer.order))
            pair.lender._enter(1)
            whole = pair.whole["model.layers.1.mlp.up_proj"]
            whole.arrange(whole.order.flip(0), len(whole.order))
            assert torch.equal(layer.up, whole.up)
            assert torch.equal(layer.down, whole.down)


@pytest.mark.parametrize(("large", "times"), [(1, 2), (2**40, 0)])
def test_memory_of_large_blocks_goes_back_between_them(large, times, tmp_path, work, monkeypatch):
    """Before the next one is read; there is nothing before the first one."""
    pair, calls = Pair(tmp_path, work, num_hidden_layers=3), []
    monkeypatch.setattr(lending, "_LARGE", large)
    monkeypatch.setattr(lending, "give_back_memory", lambda: calls.append(None))
    with pair.lender.lent(), torch.no_grad():
        run_model(pair.stored.model, IDS)
        assert len(calls) == times


def test_forwards_of_others_come_back(tmp_path, work):
    dense(tmp_path / "dense")
    stored, lender = lender_of(tmp_path / "dense", work)
    block = transformer_blocks(stored.model)[0]
    own = block.forward = block.forward

    def stopped():
        with lender.lent():
            assert block.forward is not own
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert block.__dict__["forward"] is own


def test_vectors_and_what_is_outside_stay(tmp_path, work):
    model = dense(tmp_path / "dense", "gpt2")
    stored, lender = lender_of(tmp_path / "dense", work)
    with lender.lent():
        for name, parameter in stored.model.named_parameters():
            lent = ".h." in name and parameter.dim() > 1
            assert parameter.is_meta == lent
            assert lent or torch.equal(parameter, model.get_parameter(name))
            assert not parameter.requires_grad or parameter.is_meta


def test_in_another_dtype_than_stored(tmp_path, work):
    model = dense(tmp_path / "dense", dtype=torch.bfloat16).float().eval()
    stored, lender = lender_of(tmp_path / "dense", work)
    with lender.lent(), torch.no_grad():
        assert torch.equal(run_model(stored.model, IDS).logits, run_model(model, IDS).logits)


def test_a_value_that_is_not_finite_is_named(tmp_path, work):
    dense(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    held = load_file(file)
    held["model.embed_tokens.weight"][3, 4] = float("nan")
    save_file(held, file, metadata={"format": "pt"})
    _, lender = lender_of(tmp_path / "dense", work)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight"), lender.lent():
        pass


def test_on_a_device(device, tmp_path, work):
    """What is read ahead there is what runs."""
    model = tiny_model("llama", num_hidden_layers=4)
    model.save_pretrained(tmp_path / "dense")
    model = model.to(device).eval().requires_grad_(False)
    stored, lender = lender_of(tmp_path / "dense", work, device=device)
    made = {n: components(n, weight_of(m).cpu()) for n, m in find_linears(model).items()}
    for name, each in made.items():
        lender.keep(name, each)
    ids = IDS.to(device)

    def run(model, layers):
        with replaced(model, layers), checkpointed(transformer_blocks(model)):
            out = run_model(model, ids).logits
            out.square().sum().backward()
        return [out.detach(), *(layer.logit.grad for layer in layers.values())]

    whole = spectral(find_linears(model), lambda n: Components(*(x.to(device) for x in made[n])))
    with lender.lent():
        lent = spectral(find_linears(stored.model), lender.pop)
        for _ in range(3):
            for one, other in zip(run(stored.model, lent), run(model, whole), strict=True):
                torch.testing.assert_close(one, other)
            for layer in (*lent.values(), *whole.values()):
                layer.zero_grad()
                layer.arrange(layer.order.flip(0), len(layer.order) - 2)
