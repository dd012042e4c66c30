"""The record of a comparison: a round trip through its file, damage that is named, an order."""

import dataclasses
import json

import pytest

from comparisons import failed, made_up
from soco.record import Comparison, exceeds


def with_rows(comparison, *rows):
    return dataclasses.replace(comparison, rows=(*comparison.rows, *rows))


def test_round_trip(tmp_path):
    done = with_rows(made_up(), failed("aa-svd", 0.4))
    path = tmp_path / "new" / "compare.json"
    done.write(path)
    assert Comparison.read(path) == done
    assert [file.name for file in path.parent.iterdir()] == ["compare.json"]
    assert json.loads(path.read_text()) == json.loads(json.dumps(done.to_dict()))


def test_a_row_is_a_line(tmp_path):
    done = made_up()
    done.write(tmp_path / "compare.json")
    lines = (tmp_path / "compare.json").read_text().splitlines()
    assert [line for line in lines if '"svd-llm", "ratio": 0.4' in line] == [
        " " + json.dumps(done.rows[4]) + ","
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(format=2), "the comparison is of format 2, not 1"),
        (lambda d: d.pop("format"), "is of format None"),
        (lambda d: d.pop("shapes"), "has no shapes, or not as a dict"),
        (lambda d: d.update(rows={}), "has no rows, or not as a list"),
        (lambda d: d["rows"].append([]), "has a row without method or ratio"),
        (lambda d: d["rows"][0].pop("ratio"), "has a row without method or ratio"),
        (lambda d: d["rows"][0].pop("ranks"), "has no ranks in its row of svd at 0.2"),
        (lambda d: d["rows"][0].update(method=["x"]), r"has a row of method \['x'\] at ratio 0.2"),
        (lambda d: d["rows"][0].update(ratio="x"), "has a row of method 'svd' at ratio 'x'"),
        (lambda d: d["rows"][0].update(ratio=True), "has a row of method 'svd' at ratio True"),
        (lambda d: d["rows"][0].update(kl="x"), "has kl 'x' in its row of svd at 0.2"),
        (lambda d: d["rows"][0].update(ranks=[]), r"has ranks \[\] in its row of svd at 0.2"),
        (lambda d: d["rows"][0].update(ranks={}), "has ranks and params of different layers in"),
        (
            lambda d: d["rows"][0]["ranks"].update(dict.fromkeys(d["rows"][0]["ranks"], "3")),
            "has ranks '3' of .* in its row of svd at 0.2",
        ),
        (lambda d: d["dense"].pop("bytes"), "has no bytes in its row of the dense model"),
        (lambda d: d["dense"].update(params=1.5), "has params 1.5 in its row of the dense model"),
        (lambda d: d["shapes"].update(a=[1]), r"gives a the shape \[1\]"),
        (lambda d: d["spectra"].update(a={}), "has no spectrum of a that can be drawn"),
        (lambda d: d["spectra"].update(a={"at": [1], "plain": []}), "has no spectrum of a that"),
        (lambda d: d["spectra"].update(a={"at": [1], "plain": ["1"]}), "has no spectrum of a that"),
    ],
)
def test_damage_is_named(change, text):
    data = json.loads(json.dumps(made_up().to_dict()))
    change(data)
    with pytest.raises(ValueError, match=text):
        Comparison.from_dict(data)


def test_rows_by_ratio_best_first_failures_last():
    done = with_rows(made_up(), failed("aa-svd", 0.4), {**made_up().rows[3], "method": "x"})
    assert [row["method"] for row in done.at(0.4)] == ["soco", "svd-llm", "svd", "x", "aa-svd"]
    assert done.ratios == [0.2, 0.4]


def test_the_best_is_one_that_keeps_within_its_ratio():
    done = made_up()
    best = done.best(0.2)
    assert best is not None
    assert best["method"] == "soco"
    assert not exceeds(best)
    best["kept_params"] += 1 + int(best["target_params"] * 0.8) - best["kept_params"]
    assert exceeds(best)
    second = done.best(0.2)
    assert second is not None
    assert second["method"] == "svd-llm"
    assert made_up(rows=(failed("svd", 0.2),)).best(0.2) is None


def test_the_middle_is_of_what_was_made():
    assert made_up(ratios=(0.2, 0.6, 0.4)).middle == 0.4
    assert made_up(ratios=(0.2, 0.4)).middle == 0.2
    assert with_rows(made_up(ratios=(0.2,)), failed("svd", 0.1), failed("svd", 0.15)).middle == 0.2
    assert made_up(rows=()).middle is None


def test_models_without_kl_go_by_distance():
    rows = tuple({**row, "kl": None, "distance": row["kl"]} for row in made_up().rows)
    done = made_up(rows=rows)
    assert done.yardstick == "distance"
    assert done.at(0.2)[0]["method"] == "soco"
    assert made_up().yardstick == "kl"


def test_layers_of_a_row():
    done = made_up()
    layers = done.layers(done.rows[2])
    assert [layer.name for layer in layers] == list(done.shapes)
    assert (layers[0].rank, layers[0].kept) == (None, 1.0)
    assert (layers[1].rank, layers[1].shape, layers[1].params) == (1, (4, 8), 12)
