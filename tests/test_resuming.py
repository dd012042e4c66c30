"""soco.resuming: a compression in memory that is stopped at any moment ends as if it were not."""

import dataclasses
import json
from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch

import soco
from soco import calibration, keeping, learning, sampling, surgeon
from soco.methods import DobiSVD, SoCo
from soco.refinement import Refinement
from soco.steps import Teacher
from soco.surgeon import SVDSurgeon
from soco.workfolder import PLAN, WorkFolder, discard
from tiny_models import tiny_model

IDS = torch.randint(3, 60, (12, 12), generator=torch.Generator().manual_seed(0))
STEPS = SoCo(steps=12, batch_size=4, micro_batch=2)
TRAINED = dataclasses.replace(STEPS, written=0.5, deviation="vector", channels=True)
OPTIONS = {"calibration": IDS, "samples": 12, "batch_size": 4}


def compress(method, work=None, ratio=0.4, name="llama", **options):
    """The weights, the ranks and the steps of a compressed model."""
    model = tiny_model(name)
    soco.compress(model, ratio, method=method, work=work, **{**OPTIONS, **options})
    report = soco.report(model)
    ranks = {layer.name: layer.rank for layer in report.layers}
    return {key: value.clone() for key, value in model.state_dict().items()}, ranks, report.history


def same(one, other):
    weights, others = one[0], other[0]
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name
    assert one[1:] == other[1:]


class Stopper:
    """Ctrl-C in the middle of a file, after so many."""

    def __init__(self, monkeypatch):
        self.left, self.written = -1, []
        put = WorkFolder._put

        def stopping(work, name, write):
            def partly(path):
                if self.left == 0:
                    path.write_bytes(b"half")
                    raise KeyboardInterrupt
                write(path)

            self.left -= 1
            put(work, name, partly)
            self.written.append(name)

        monkeypatch.setattr(WorkFolder, "_put", stopping)


CASES = {
    "svd-llm": dict(method="svd-llm"),
    "saes": dict(method="saes"),
    "aa-svd": dict(method="aa-svd"),
    "adasvd": dict(method="adasvd"),
    "basis-sharing": dict(method="basis-sharing"),
    "dobi-svd": dict(method=DobiSVD(steps=4, batch_size=4, micro_batch=2)),
    "surgeon": dict(method="svd", surgeon=SVDSurgeon(rounds=2, batch_size=2, labels=1, samples=8)),
    "sensitivity": dict(method="svd", allocator="sensitivity"),
    "lems": dict(method="svd-llm", allocator="lems"),
    "soco": dict(method=TRAINED),
    "several sizes": dict(method=STEPS, ratio=(0.3, 0.5)),
    "refine": dict(method="svd-llm", refine=Refinement(steps=6, evaluate_every=2, batch_size=4)),
    "best": dict(method=STEPS, refine=Refinement(steps=4, evaluate_every=2, batch_size=4)),
    "learned ranks": dict(method="svd", allocator="learned"),
    "own text": dict(method="svd-llm", calibration="self", length=12),
    "bfloat16": dict(method="svd-llm", refine=Refinement(steps=4, batch_size=4), name="gpt2"),
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_at_every_file(case, tmp_path, monkeypatch):
    """A state is written at every step here; then the same call goes on."""
    monkeypatch.setattr(keeping, "EVERY", 0.0)
    monkeypatch.setattr(sampling, "CACHE_ROOM", 2**15)  # a few sequences at a time
    monkeypatch.setattr(learning, "SoCo", lambda **given: SoCo(steps=6, written=0.0, **given))
    options = CASES[case]
    once = compress(**options)
    stopper, work = Stopper(monkeypatch), tmp_path / "work"
    same(compress(**options, work=work), once)  # what is kept changes nothing
    files = len(stopper.written)
    assert files > 10
    same(compress(**options, work=work), once)  # nor what is found
    discard(work)
    assert not work.exists()
    for every in (4, 9):  # the first one that is not written; a state takes three
        stops = 0
        for _ in range(3 * files):
            stopper.left = every
            with suppress(KeyboardInterrupt):
                same(compress(**options, work=work), once)
                break
            stops += 1
        assert stops > 0
        assert stops < 3 * files
        stopper.left = -1
        discard(work)


def test_statistics_go_on_in_the_middle(tmp_path, monkeypatch):
    """No batch runs twice but the one that was under way, and no state of them stays."""
    monkeypatch.setattr(keeping, "EVERY", 0.0)
    once, work = compress("fwsvd"), tmp_path / "work"
    save, batch, ran = keeping.Keeper.save, calibration._Pass.batch, []

    def stopping(self, state, part):
        assert self._name == "statistics-fisher-gram"
        save(self, state, part)
        raise KeyboardInterrupt

    def counting(self, number, *others):
        ran.append(number)
        batch(self, number, *others)

    monkeypatch.setattr(keeping.Keeper, "save", stopping)
    monkeypatch.setattr(calibration._Pass, "batch", counting)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress("fwsvd", work=work)
    same(compress("fwsvd", work=work), once)
    assert ran == [0, 1, 2]
    assert not [path.name for path in work.iterdir() if path.name.startswith("statistics-")]


@pytest.mark.parametrize(
    "options",
    [dict(method=STEPS), dict(method=TRAINED), dict(method=STEPS, calibration="self", length=12)],
    ids=["plain", "more text", "own text"],
)
def test_nothing_is_done_twice(options, tmp_path, monkeypatch):
    """A run that goes on writes no text, collects, takes apart and trains nothing."""
    work = tmp_path / "work"
    first = compress(**options, work=work)

    def never(*_, **__):
        raise AssertionError("again")

    for place in (
        "preparation.sample_from_model", "workbench.sample_from_model", "workbench.collect",
        "methods.bases.two_sided_svd", "training._pass",
    ):  # fmt: skip
        monkeypatch.setattr(f"soco.{place}", never)
    same(compress(**options, work=work), first)
    assert work.is_dir()


@pytest.mark.parametrize(
    ("case", "places"),
    {
        "saes": ["sequential.Walk.collect"],
        "basis-sharing": ["sequential.Walk.collect"],
        "adasvd": ["methods.fitted.AdaSVD.factor"],
        "dobi-svd": ["truncation._pass"],
        "sensitivity": ["workbench.replaced"],
        "lems": ["workbench.replaced"],
    }.items(),
)
def test_no_fit_is_done_twice(case, places, tmp_path, monkeypatch):
    work = tmp_path / "work"
    first = compress(**CASES[case], work=work)
    never = AssertionError("again")
    for place in places:
        monkeypatch.setattr(f"soco.{place}", Mock(side_effect=never))
        with pytest.raises(AssertionError, match="again"):  # it is what would be called
            compress(**CASES[case])
    same(compress(**CASES[case], work=work), first)


def test_the_surgeon_goes_on_in_the_middle(tmp_path, monkeypatch):
    """After every batch a state is written, and nothing runs again but what follows."""
    monkeypatch.setattr(keeping, "EVERY", 0.0)
    once, work, options = compress(**CASES["surgeon"]), tmp_path / "work", CASES["surgeon"]
    seen, draw, save = [], surgeon.draw_seeds, keeping.Keeper.save

    def counting(*given):
        seen.append(given)
        return draw(*given)

    def stopping(self, state, part):
        save(self, state, part)
        raise KeyboardInterrupt

    monkeypatch.setattr(surgeon, "draw_seeds", counting)
    monkeypatch.setattr(keeping.Keeper, "save", stopping)
    stops = 0
    for _ in range(20):
        with suppress(KeyboardInterrupt):
            same(compress(**options, work=work), once)
            break
        stops += 1
    # Seven sequences (one is held out) in batches of two, twice: no state behind the last ones.
    assert (stops, len(seen)) == (2 * 3, 2 * 4)


@pytest.mark.parametrize(
    "options",
    [dict(method=STEPS), dict(method="svd-llm", refine=Refinement(steps=12, batch_size=4))],
    ids=["scores", "factors"],
)
def test_what_the_dense_model_gave_is_kept(options, tmp_path, monkeypatch):
    """After every window came once it does not run again, whatever was stopped."""
    monkeypatch.setattr(keeping, "EVERY", 0.0)
    outputs, save, calls, left = Teacher.outputs, keeping.Keeper.save, [], [9]

    def counting(self, chosen):
        calls.append([index for index in chosen.tolist() if index not in self.kept])
        return outputs(self, chosen)

    def stopping(self, state, part):
        save(self, state, part)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Teacher, "outputs", counting)
    monkeypatch.setattr(keeping.Keeper, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        compress(**options, work=tmp_path / "work")
    assert any(calls)
    calls.clear()
    compress(**options, work=tmp_path / "work")
    assert len(calls) > 2
    assert not any(calls)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (dict(ratio=0.5), r"ratios is \[0.4\] there and \[0.5\] here"),
        (dict(method="svd"), 'method is "svd-llm" there and "svd" here'),
        (dict(samples=8), "calibration.samples is 12 there and 8 here"),
        (dict(seed=1), "seed is 0 there and 1 here"),
        (dict(include="*mlp*"), r'layers.include is not given there and \["\*mlp\*"\] here'),
        (dict(name="mistral"), "model.config is "),
        (dict(calibration=IDS.flip(0)), "a run on another calibration text"),
        (dict(refine=True), "settings.refine"),
    ],
)
def test_another_run_does_not_go_on_there(tmp_path, changes, difference):
    work = tmp_path / "work"
    compress("svd-llm", work)
    held = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    with pytest.raises(ValueError, match=difference):
        compress(**{"method": "svd-llm", "work": work, **changes})
    assert held == {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}


def test_a_workbench_has_no_work_folder(tmp_path):
    model = tiny_model("llama")
    bench = soco.prepare(model, calibration=IDS, samples=12)
    with pytest.raises(ValueError, match="give either shared or work"):
        soco.compress(model, shared=bench, method="svd", work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_bad_input_leaves_nothing(tmp_path):
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        soco.compress(model, method="svd", work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_damaged_work_is_named(tmp_path):
    work = tmp_path / "work"
    compress(STEPS, work)
    state = next(path for path in work.glob("training-?-0.pt"))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{state.name} is damaged"):
        compress(STEPS, work)
    assert json.loads((work / PLAN).read_text())["method"] == "soco"


@pytest.mark.parametrize(
    "options", [dict(method=TRAINED), dict(method="svd-llm", calibration="self", length=12)]
)
def test_drafts_go_when_a_text_is_whole(options, tmp_path):
    """Batch by batch it was kept; then there is one file of it."""
    compress(**options, work=tmp_path / "work")
    texts = [path.name for path in (tmp_path / "work").iterdir() if "text-" in path.name]
    assert not [name for name in texts if name.endswith(".pt")]
    assert len([path for path in (tmp_path / "work").glob("*text*.safetensors")]) == 1
