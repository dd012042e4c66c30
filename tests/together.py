"""What several processes do in test_processes.py: ``python tests/together.py OUTPUT``, launched.

Every process writes what it got to OUTPUT/<number of processes>-<its number>.pt.
"""

import sys
from contextlib import suppress
from pathlib import Path

import torch

import soco
from soco import keeping, processes
from soco.calibration import collect
from soco.experts import experts_split
from soco.methods import SoCo
from soco.refinement import Refinement
from soco.surgery import find_linears
from tiny_models import tiny_mixture, tiny_model

KINDS = {"gram", "mean", "abs_mean", "stacked_gram", "root", "fisher", "grad_gram"}
KINDS |= {"sampled_grad_gram"}


def text(sequences, length=12, seed=0):
    return torch.randint(3, 60, (sequences, length), generator=torch.Generator().manual_seed(seed))


def statistics(model, windows):
    found = collect(model, find_linears(model), windows, 2, kinds=KINDS)
    return {
        name: {**each.parts(), "tokens": each.tokens, "sequences": each.sequences}
        for name, each in found.items()
    }


def compressed(method, **options):
    model = soco.compress(
        tiny_model("llama"), 0.4, method=method, calibration=text(12), samples=12, batch_size=2,
        **options,
    )  # fmt: skip
    report = soco.report(model)
    ranks = {layer.name: layer.rank for layer in report.layers}
    return ranks, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def streamed(folder, method, **options):
    name = getattr(method, "name", method)
    dense, small = folder / "dense", folder / f"small-{processes.count()}-{name}"
    if processes.number() == 0 and not dense.is_dir():
        tiny_model("llama").save_pretrained(dense)
    processes.wait()
    soco.compress_folder(
        dense, small, 0.4, method=method, calibration=text(9), samples=9, batch_size=2, **options
    )  # fmt: skip
    left = sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("small"))
    return soco.load(small).state_dict(), left


def apart(folder):
    """From a folder, in files that are small enough to be shared out."""
    out = folder / f"parts-{processes.count()}"
    found = soco.decompose(folder / "dense", out, kept=0.5, progress=False)
    left = sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("parts"))
    return {name: svd._asdict() for name, svd in found.items()}, len(list(out.iterdir())), left


def measured(**options):
    """A model far from the dense one, on a text of five windows."""
    model = tiny_model("llama", seed=3)
    found = soco.evaluate(
        model, text(5), dense=tiny_model("llama"), length=12, progress=False, **options
    )  # fmt: skip
    return {**found.to_dict(), "seconds": 0.0}


def encoded():
    model = tiny_model("bert", seed=3)
    found = soco.evaluate(
        model.bert, text(5), dense=tiny_model("bert").bert, length=12, batch_size=1
    )
    return {**found.to_dict(), "seconds": 0.0}


def lonely():
    """What one process does, while the others do not take part."""
    with processes.alone():
        assert (processes.count(), processes.number()) == (1, 0)
        if processes.first_to("be alone"):
            compressed("svd-llm")
            measured()


def stopped(folder):
    """Stopped where a second state of statistics, training, and refinement is written; going on."""
    keeping.EVERY, save, stops = 0.0, keeping.Keeper.save, []

    def stopping(self, state, part):
        if self._name not in stops and self._moment == 1:
            stops.append(self._name)
            raise KeyboardInterrupt
        save(self, state, part)

    keeping.Keeper.save = stopping
    options = {"refine": Refinement(steps=8, evaluate_every=4), "work": folder}
    found = None
    while found is None:
        with suppress(KeyboardInterrupt):
            found = compressed(SoCo(steps=6, written=0.0), **options)
    keeping.Keeper.save = save
    return found, stops


def main():
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    with soco.together():
        mixture = tiny_mixture("mixtral")
        with experts_split(mixture):
            of_mixture = statistics(mixture, text(5))
        steps = SoCo(steps=24, written=0.0)
        found = {
            "numbers": (processes.number(), processes.count()),
            "statistics": statistics(tiny_model("llama"), text(7)),
            "few": statistics(tiny_model("llama"), text(1)),
            "encoder": statistics(tiny_model("bert"), text(5)),
            "mixture": of_mixture,
            "svd": compressed("svd"),
            "svd-llm": compressed("svd-llm", stats=output / f"stats-{processes.count()}"),
            "again": compressed("svd-llm", stats=output / f"stats-{processes.count()}"),
            "soco": compressed(steps),
            "best": compressed(
                SoCo(steps=6, written=0.0), refine=Refinement(steps=8, evaluate_every=4)
            ),
            "refine": compressed("svd-llm", refine=Refinement(steps=8, evaluate_every=4)),
            "streamed": streamed(output, "svd-llm", allocator="energy"),
            "streamed back": streamed(output, "kfac-svd", allocator="energy"),
            "streamed training": streamed(output, SoCo(steps=12)),
            "streamed fits": streamed(output, "adasvd", allocator="energy"),
            "streamed walk": streamed(output, "aa-svd", allocator="energy"),
            "streamed bases": streamed(output, "basis-sharing", allocator="energy"),
            "apart": apart(output),
            "measured": measured(batch_size=1),
            "in one batch": measured(batch_size=8),
            "encoder measured": encoded(),
            "stopped": stopped(output / f"work-{processes.count()}"),
        }
        lonely()
    assert processes.count() == 1
    torch.save(found, output / f"{found['numbers'][1]}-{found['numbers'][0]}.pt")


if __name__ == "__main__":
    main()
