"""Pictures of comparisons: every entry is there, named, told apart, and nothing overlaps."""

import dataclasses
import itertools
import struct
import sys

import numpy as np
import pytest
from matplotlib.text import Text

from comparisons import failed, made_up
from soco import plots
from soco.comparison import DEFAULT_METHODS
from soco.methods import METHODS


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, to look into."""
    found = []

    def keep(*sizes, **options):
        found.append(new_figure(*sizes, **options))
        return found[-1]

    new_figure = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", keep)
    return found


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("gap", [0.02, 0.1, 0.2])
def test_spread_is_the_nearest_of_all_that_keep_the_gap(gap):
    """Against a search over a grid, for three places."""
    grid = np.linspace(0, 1, 51)
    for places in np.random.default_rng(0).uniform(0, 1, (5, 3)):
        found = np.array(plots.spread(list(places), gap))
        order = np.argsort(places)
        assert (np.diff(found[order]) >= gap - 1e-12).all()
        assert found.min() >= -1e-12
        assert found.max() <= 1 + 1e-12
        cost = ((found - places) ** 2).sum()
        for a, b, c in itertools.product(grid, repeat=3):
            if b - a >= gap and c - b >= gap:
                assert cost <= ((np.array([a, b, c]) - places[order]) ** 2).sum() + 1e-9


def test_spread_without_room_is_even():
    assert plots.spread([0.9, 0.1, 0.5], 0.7) == pytest.approx([1.0, 0.0, 0.5])
    assert plots.spread([2.0], 0.1) == [1.0]
    assert plots.spread([], 0.1) == []


def test_all_methods_and_their_variants_look_different():
    entries = [*METHODS, "svd-llm@energy", "svd-llm@energy+pivoted", "soco+pivoted"]
    found = plots.looks(made_up(methods=entries))
    looks = [(look.color, look.marker, look.line) for look in found.values()]
    assert len(set(looks)) == len(entries)
    assert {found["svd-llm"].color} == {found["svd-llm@energy"].color}


def test_methods_have_a_colour_each():
    methods = [name for name in METHODS if name != "soco"]
    for chosen in (methods, methods[-9:], ["svd", "kfac-svd", "fwsvd", "aa-svd"]):
        looks = plots.looks(made_up(methods=(*chosen, "soco")))
        assert len({look.color for look in looks.values()}) == len(chosen) + 1


def test_a_line_that_ends_early_has_its_name_there(figures, tmp_path):
    done = made_up(methods=("svd", "soco"), ratios=(0.2, 0.4, 0.6))
    rows = [row for row in done.rows if row["method"] == "soco" or row["ratio"] == 0.2]
    plots.draw_quality(dataclasses.replace(done, rows=tuple(rows)), tmp_path / "quality.png")
    names = {text.get_text(): text for text in figures[0].axes[1].texts}
    assert names["svd"].arrow_patch is None
    assert names["soco"].arrow_patch is not None


def test_soco_and_the_best_stand_out():
    looks = plots.looks(made_up(methods=("soco", "svd", "svd-llm")))
    assert [entry for entry, look in looks.items() if look.strong] == ["soco", "svd-llm"]
    assert looks["soco"].color != looks["svd-llm"].color
    looks = plots.looks(made_up(methods=("svd", "svd-llm", "soco")))
    assert [entry for entry, look in looks.items() if look.strong] == ["soco"]


def test_a_method_looks_the_same_in_every_comparison():
    """Unless another one has its colour already."""
    first = next(name for name in METHODS if name != "soco")
    few = plots.looks(made_up(methods=("svd-llm", first, "soco")))
    many = plots.looks(made_up(methods=(*METHODS, "soco")))
    assert few[first].color == many[first].color
    assert few["soco"] == many["soco"]


@pytest.mark.parametrize("ratios", [(0.5,), (0.2, 0.4, 0.6)])
def test_quality_names_every_entry_once_and_no_name_covers_another(figures, tmp_path, ratios):
    methods = list(dict.fromkeys([*DEFAULT_METHODS, "svd-llm@energy+pivoted"]))
    plots.draw_quality(made_up(methods=methods, ratios=ratios), tmp_path / "quality.png")
    (figure,) = figures
    figure.draw_without_rendering()  # at its own resolution
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "perplexity", "KL to the dense model (nats per token)"
    ]  # fmt: skip
    for axes in figure.axes:
        names = [text.get_text().split(" ")[0] for text in axes.texts]
        dense = ["dense"] if axes is figure.axes[0] else []
        assert sorted(names) == sorted([*methods, *dense])
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to it
        boxes.sort(key=lambda box: box.y0)
        for lower, upper in itertools.pairwise(boxes):
            assert lower.y1 <= upper.y0 + 1.5  # pixels; a name has air above it
        # Names are inside of the picture, and beside the next panel.
        assert max(box.x1 for box in boxes) < figure.bbox.x1
        assert len(axes.lines) == len(methods) + len(dense)
        assert axes.get_yscale() == "log"


def test_quality_goes_from_many_parameters_to_few(figures, tmp_path):
    done = made_up(methods=("svd",), ratios=(0.6, 0.2))
    plots.draw_quality(done, tmp_path / "quality.png")
    axes = figures[0].axes[1]
    assert list(axes.lines[0].get_ydata()) == [row["kl"] for row in reversed(done.rows)]
    left, right = axes.get_xlim()
    assert left > right
    assert [tick.get_text().split("\n")[0] for tick in axes.get_xticklabels()] == ["80%", "40%"]


def test_quality_says_what_is_beyond_its_edge(figures, tmp_path):
    done = made_up(methods=("svd", "soco"), ratios=(0.5,))
    done.rows[0]["perplexity"] = 1e308
    plots.draw_quality(done, tmp_path / "quality.png")
    axes = figures[0].axes[0]
    assert "svd ↑1e+308" in [text.get_text() for text in axes.texts]
    assert axes.get_ylim()[1] < 1e6


def test_sizes_far_apart_do_not_hide_each_other(figures, tmp_path):
    """The edge is far above the best of the size at which all are worst."""
    done = made_up(methods=("svd", "soco"), ratios=(0.2, 0.6))
    for row in done.rows:
        row["kl"] = (1e-11 if row["ratio"] == 0.2 else 1e-5) * (3 if row["method"] == "svd" else 1)
    plots.draw_quality(done, tmp_path / "quality.png")
    axes = figures[0].axes[1]
    found = sorted(tuple(line.get_ydata()) for line in axes.lines[:2])
    assert found == [pytest.approx((1e-11, 1e-5)), pytest.approx((3e-11, 3e-5))]
    assert not any("↑" in text.get_text() for text in axes.texts)


def test_ranks_are_a_panel_for_each_entry_with_dense_layers_marked(figures, tmp_path):
    done = made_up()
    done = dataclasses.replace(done, rows=(*done.rows, failed("aa-svd", 0.4)))
    plots.draw_ranks(done, 0.4, tmp_path / "ranks.png")
    panels = [axes for axes in figures[0].axes if axes.images]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == ["soco (KL 0.8)", "svd-llm (KL 1.6)", "svd (KL 2.4)"]
    dots = [
        axes.collections[0].get_offsets().tolist() if axes.collections else [] for axes in panels
    ]
    assert dots == [[[0, 0]], [], []]
    soco = done.layers(done.rows[5])
    assert panels[0].images[0].get_array().T.flatten().tolist() == pytest.approx(
        [layer.kept for layer in soco]
    )


def test_spectra_mark_the_rank_of_each_entry_at_the_middle_ratio(figures, tmp_path):
    done = made_up(ratios=(0.2, 0.4, 0.6))
    plots.draw_spectra(done, tmp_path / "spectra.png")
    axes = [each for each in figures[0].axes if each.get_visible()]
    assert len(axes) == 6  # a spectrum and its marks, for each of three kinds
    assert [len(each.lines) for each in axes] == [3] * 3 + [3] * 3
    marks = axes[3]
    assert [label.get_text() for label in marks.get_yticklabels()] == ["soco", "svd-llm", "svd"]
    name = "model.layers.1.attn.q_proj"
    ranks = {row["method"]: row["ranks"][name] for row in done.at(0.4)}
    assert [line.get_xdata()[0] for line in marks.lines] == list(ranks.values())


def test_all_pictures(tmp_path):
    done = made_up(ratios=(0.25, 0.5))
    names = ["quality.png", "ranks-0.25.png", "ranks-0.5.png", "spectra.png"]
    assert [path.name for path in plots.draw(done, tmp_path)] == names
    assert all(png_size(tmp_path / name)[0] > 400 for name in names)
    assert plots.draw(made_up(rows=(failed("svd", 0.2),)), tmp_path) == []
    without = dataclasses.replace(done, spectra={})
    assert [path.name for path in plots.draw(without, tmp_path)] == names[:-1]


def test_deep_models_and_encoders(tmp_path):
    deep = made_up(methods=("svd",), ratios=(0.5,), blocks=33)
    assert png_size(plots.draw(deep, tmp_path)[1])[0] > 400
    rows = tuple(
        {**row, "perplexity": None, "kl": None, "distance": row["kl"]} for row in made_up().rows
    )
    encoder = made_up(rows=rows, dense={**made_up().dense, "perplexity": None})
    assert len(plots.draw(encoder, tmp_path)) == 4


@pytest.mark.parametrize("kinds", [1, 3])
def test_titles_and_legends_fit(figures, tmp_path, kinds):
    done = made_up(methods=("svd",), ratios=(0.25, 0.5))
    done = dataclasses.replace(done, spectra=dict(list(done.spectra.items())[:kinds]))
    plots.draw(done, tmp_path)
    for figure in figures:
        figure.draw_without_rendering()
        for artist in (*figure.texts, *figure.legends, figure._suptitle):
            if artist is not None:
                box = artist.get_window_extent()
                assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install"):
        plots.draw(made_up(), tmp_path)
