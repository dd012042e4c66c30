"""Reports: sizes that add up, a round trip through JSON, damage that is named, pictures."""

import dataclasses
import json
import math
import re
import struct
import sys

import pytest
from matplotlib.figure import Figure
from torch import nn

from soco.reporting import (
    MOST_ROWS,
    LayerReport,
    Report,
    format_bytes,
    format_percent,
    kept_grid,
    report,
)

LAYERS = (
    LayerReport("model.layers.0.self_attn.q_proj", (8, 8), 2, 32, 0.5, 1.5),
    LayerReport("model.layers.0.mlp.up_proj", (16, 8), None, 128),
    LayerReport("model.layers.1.self_attn.q_proj", (8, 8), 1, 16, 0.9, 1.0),
    LayerReport("model.layers.1.mlp.up_proj", (16, 8), 3, 72, 0.25, 1.75),
)
HISTORY = {
    "stage": ["coarse"] * 3 + ["refine"] * 3 + ["sparsify"] * 2,
    "loss": [0.1, 0.2, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1],
    "divergence": [0.1, 0.2, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1],
    "kept": [1.0, 0.8, 0.6, 0.7, 0.6, 0.7, 0.6, 0.6],
}


def example(**changes):
    return Report(
        **{
            "method": "soco",
            "ratio": 0.35,
            "layers": LAYERS,
            "model_params_before": 1000,
            "model_params_after": 864,
            "model_bytes_before": 4000,
            "model_bytes_after": 3456,
            "seconds": {"training": 1.25},
            "peak_bytes": 5_000_000,
            "peak_of": "process",
            "warnings": ("few tokens",),
            "history": HISTORY,
            **changes,
        }
    )


def test_sizes_by_hand():
    done = example()
    assert done.params_before == 64 + 128 + 64 + 128
    assert done.params_after == 32 + 128 + 16 + 72
    assert done.removed == pytest.approx(1 - 248 / 384)
    assert [layer.kept for layer in done.layers] == [0.5, 1.0, 0.25, 72 / 128]


def test_round_trip():
    done = example()
    again = Report.from_dict(json.loads(done.to_json()))
    assert again == done
    assert isinstance(again.layers[0].shape, tuple)


def at(path, value):
    """A change of a report's data: the value at ``path``; None takes it away."""
    *way, last = path

    def change(data):
        for step in way:
            data = data[step]
        if value is None:
            del data[last]
        else:
            data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (at(["extra"], 1), "report has an unknown field 'extra'"),
        (at(["method"], None), "report lacks the field 'method'"),
        (at(["layers"], None), "report lacks the field 'layers'"),
        (at(["layers"], []), "report.layers is empty"),
        (at(["layers"], "abc"), "report.layers is of the wrong kind: 'abc'"),
        (at(["layers", 2], [1]), "report.layers[2] is of the wrong kind: [1]"),
        (at(["layers", 1, "shape"], None), "report.layers[1] lacks the field 'shape'"),
        (at(["layers", 0, "size"], 3), "report.layers[0] has an unknown field 'size'"),
        (at(["layers", 0, "shape"], [8]), "report.layers[0].shape is of the wrong kind: [8]"),
        (at(["layers", 0, "shape"], 8), "report.layers[0].shape is of the wrong kind: 8"),
        (at(["layers", 0, "shape", 1], 8.0), "report.layers[0].shape[1] is of the wrong kind: 8.0"),
        (at(["layers", 3, "shape"], [0, 8]), "report.layers[3].shape holds no weight: (0, 8)"),
        (at(["layers", 0, "rank"], "2"), "report.layers[0].rank is of the wrong kind: '2'"),
        (at(["layers", 0, "params"], True), "report.layers[0].params is of the wrong kind: True"),
        (at(["ratio"], "half"), "report.ratio is of the wrong kind: 'half'"),
        (at(["ratio"], False), "report.ratio is of the wrong kind: False"),
        (at(["seconds"], [1.0]), "report.seconds is of the wrong kind: [1.0]"),
        (at(["seconds", "training"], "1"), "report.seconds.training is of the wrong kind: '1'"),
        (at(["warnings"], "few"), "report.warnings is of the wrong kind: 'few'"),
        (at(["warnings", 0], 3), "report.warnings[0] is of the wrong kind: 3"),
        (at(["history"], []), "report.history is of the wrong kind: []"),
        (at(["history", "kept"], 1.0), "report.history.kept is of the wrong kind: 1.0"),
        (at(["history", "kept"], None), "report.history lacks the column 'kept'"),
        (at(["history", "stage"], None), "report.history lacks the column 'stage'"),
        (at(["history", "divergence"], None), "report.history lacks the column 'divergence'"),
        (at(["history", "kept", 5], "a"), "report.history.kept[5] is of the wrong kind: 'a'"),
        (at(["history", "stage", 0], 1), "report.history.stage[0] is of the wrong kind: 1"),
        (
            at(["history", "held_out"], ["a"]),
            "report.history.held_out[0] is of the wrong kind: 'a'",
        ),
        (
            at(["history", "loss", 0], None),
            "report.history has columns of different lengths: "
            "{'stage': 8, 'loss': 7, 'divergence': 8, 'kept': 8}",
        ),
    ],
)
def test_damage_is_named(change, text):
    data = example().to_dict()
    change(data)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Report.from_dict(data)


def test_what_is_no_report_at_all():
    with pytest.raises(ValueError, match=r"^report is of the wrong kind: \[1, 2\]$"):
        Report.from_dict([1, 2])  # type: ignore[arg-type]


def test_damage_is_not_printed_at_length():
    with pytest.raises(ValueError, match="wrong kind") as raised:
        Report.from_dict(example().to_dict() | {"method": [1] * 1000})
    assert len(str(raised.value)) < 100


def test_numbers_that_json_wrote_without_a_point():
    data = example().to_dict() | {"ratio": 1, "seconds": {"training": 2}}
    data["layers"][0]["score_max"] = 2
    done = Report.from_dict(data)
    assert (done.ratio, done.seconds["training"], done.layers[0].score_max) == (1.0, 2.0, 2.0)
    assert all(type(value) is float for value in (done.ratio, *done.seconds.values()))


def test_a_report_with_the_fewest_fields():
    """What every folder written so far has at least; the rest has defaults."""
    data = {
        "method": "svd",
        "ratio": 0.5,
        "layers": [{"name": "h.0.fc", "shape": [8, 4], "rank": None, "params": 32}],
        "model_params_before": 32,
        "model_params_after": 32,
        "model_bytes_before": 128,
        "model_bytes_after": 128,
    }
    done = Report.from_dict(data)
    assert done.layers == (LayerReport("h.0.fc", (8, 4), None, 32),)
    assert (done.history, done.warnings, done.peak_bytes, done.date) == ({}, (), 0, "")
    assert done.table().splitlines()[0].split() == ["layer", "out", "x", "in", "rank", "kept"]


def test_summary_says_what_matters():
    text = example(left_dense=("experts.gate_up_proj",)).summary()
    for part in (
        "4 (3 factored, 1 kept dense)",
        "384 -> 248 (35.42% removed, 35.00% asked for)",
        "1,000 -> 864 parameters, 4.00 kB -> 3.46 kB",
        "training 1.2 s",
        "5.00 MB (process)",
        "1 fused expert weights",
        "few tokens",
    ):
        assert part in text


def test_table_has_a_line_per_layer():
    lines = example().table().splitlines()
    assert len(lines) == 5
    assert lines[1].split() == [
        "model.layers.0.self_attn.q_proj", "8", "x", "8", "2", "50.0%", "0.50", "..", "1.50"
    ]  # fmt: skip
    assert lines[2].split()[4:] == ["dense", "100.0%"]
    assert str(example()) == f"{example().summary()}\n\n{example().table()}"


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_plot(tmp_path):
    example().plot(tmp_path / "trained.png")
    dataclasses.replace(example(), history={}).plot(tmp_path / "closed.png")
    wide, narrow = png_size(tmp_path / "trained.png"), png_size(tmp_path / "closed.png")
    assert wide[0] > narrow[0] > 500


@pytest.fixture
def axes(monkeypatch, tmp_path):
    """``axes(report)``: what a picture of the report consists of: its axes by the x label."""

    def draw(done):
        drawn = []
        save = Figure.savefig
        monkeypatch.setattr(
            Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
        )
        done.plot(tmp_path / "picture.png")
        return {each.get_xlabel(): each for each in reversed(drawn[-1].axes)}

    return draw


def layer(name, kept=0.5):
    """A layer of 64 parameters; the rank is not drawn."""
    return LayerReport(name, (8, 8), None if kept == 1 else 2, round(64 * kept))


def heat(axes, layers, **changes):
    """Row names, column names, values and written numbers of the left picture."""
    drawn = axes(example(layers=tuple(layers), history={}, **changes))
    left = next(each for each in drawn.values() if each.images)
    return (
        [label.get_text() for label in left.get_yticklabels()],
        [label.get_text() for label in left.get_xticklabels()],
        left.images[0].get_array().filled(-1).tolist(),
        [text.get_text() for text in left.texts],
    )


def test_picture_of_blocks(axes):
    rows, columns, values, texts = heat(
        axes, [layer("h.0.a"), layer("h.0.b", 1), layer("h.1.a", 0.25), layer("h.1.c", 0.75)]
    )
    assert (rows, columns) == (["a", "b", "c"], ["0", "1"])
    assert values == [[0.5, 0.25], [1.0, -1], [-1, 0.75]]  # -1: there is no such layer
    assert texts == ["50%", "25%", "dense", "75%"]


def test_picture_of_a_layer_outside_of_the_blocks(axes):
    rows, columns, values, texts = heat(axes, [layer("lm_head", 0.75)])
    assert (rows, columns, values, texts) == (["lm_head"], [], [[0.75]], ["75%"])
    rows, columns, values, texts = heat(
        axes, [*(layer(f"h.{i}.a") for i in range(3)), layer("lm_head", 0.75)]
    )
    assert (rows, columns) == (["a", "lm_head"], ["0", "1", "2"])
    assert values[1] == [0.75] * 3
    assert texts == ["50%"] * 3 + ["75%"]


def test_picture_of_many_blocks_has_fewer_numbers(axes):
    rows, columns, values, texts = heat(
        axes, [*(layer(f"h.{i}.a") for i in range(40)), layer("head", 0.75)]
    )
    assert columns == [str(i) for i in range(0, 40, 3)]
    assert (rows, len(values[0]), texts) == (["a", "head"], 40, ["75%"])


def test_picture_of_several_lists_of_blocks_names_them(axes):
    rows, columns, values, _ = heat(
        axes,
        [layer(f"{side}.block.{i}.q") for side in ("encoder", "decoder") for i in range(3)]
        + [layer("decoder.block.0.cross", 0.25)],
    )
    assert rows == ["q", "cross"]
    assert columns == ["0", "1\nencoder.block", "2", "0", "1\ndecoder.block", "2"]
    assert values[1] == [-1, -1, -1, 0.25, -1, -1]


def test_picture_draws_experts_as_one_when_they_are_many(axes):
    """The mean over experts is one of parameters: a bigger expert counts for more."""
    few = [layer(f"h.0.experts.{i}.up") for i in range(MOST_ROWS)]
    assert heat(axes, few)[0] == [f"experts.{i}.up" for i in range(MOST_ROWS)]
    big = LayerReport("h.0.experts.24.up", (64, 8), None, 512)
    rows, _, values, _ = heat(axes, [*few, big, layer("h.0.conv2.q", 0.25)])
    assert rows == ["experts.*.up", "conv2.q"]
    assert values == [[pytest.approx((24 * 32 + 512) / (24 * 64 + 512))], [0.25]]


def history(divergence):
    return {
        "stage": ["coarse"] * len(divergence),
        "divergence": divergence,
        "kept": [0.5] * len(divergence),
    }


@pytest.mark.parametrize(
    ("divergence", "scale", "drawn"),
    [
        ([0.0, -1e-9, 0.001, 0.1], "log", [math.nan, math.nan, 0.001, 0.1]),
        ([math.nan, 1e-6, math.inf, 10.0], "log", [math.nan, 1e-6, math.inf, 10.0]),
        ([0.0, 0.1, 0.15], "linear", [0.0, 0.1, 0.15]),
        ([0.0, -1e-9], "linear", [0.0, -1e-9]),
        ([0.01], "linear", [0.01]),
    ],
)
def test_picture_of_odd_divergences(axes, divergence, scale, drawn):
    steps = axes(example(history=history(divergence)))["step"]
    assert steps.get_yscale() == scale
    assert steps.lines[0].get_ydata() == pytest.approx(drawn, nan_ok=True)


def test_picture_shows_the_held_out_text_where_it_was_measured(axes):
    tuned = {
        "stage": ["coarse"] * 2 + ["tuning"] * 4,
        "loss": [0.3, 0.2, 0.2, 0.15, 0.15, 0.1],
        "divergence": [0.2, 0.2, 0.2, 0.15, 0.15, 0.1],
        "kept": [0.5] * 6,
        "held_out": [None, None, 0.25, None, 0.005, None],
    }
    steps = axes(example(history=tuned))["step"]
    assert steps.get_legend_handles_labels()[1] == ["on held-out text"]
    assert steps.lines[1].get_xydata().tolist() == [[3, 0.25], [5, 0.005]]
    assert steps.get_yscale() == "log"  # for the sake of the held-out text

    # What a loss is on held-out text that is not the divergence alone has no place on its axis.
    steps = axes(example(history=tuned | {"loss": [0.3] * 6}))["step"]
    assert steps.get_legend() is None
    assert len(steps.lines) == 1


def test_picture_names_the_stages_there_is_room_for(axes):
    stages = ["coarse"] * 50 + ["refine"] * 1 + ["sparsify"] * 49
    long = {"stage": stages, "divergence": [0.1] * 100, "kept": [0.5] * 100}
    steps = axes(example(history=long))["step"]
    assert [text.get_text() for text in steps.texts] == ["coarse", "sparsify"]
    assert [text.get_text() for text in axes(example())["step"].texts] == list(
        dict.fromkeys(HISTORY["stage"])
    )


def test_picture_shows_the_stages_of_every_size(axes):
    """Several budgets in one training: the stages come again."""
    stages = ["coarse"] * 40 + ["sparsify"] * 30 + ["coarse"] * 10 + ["sparsify"] * 20
    long = {"stage": stages, "divergence": [0.1] * 100, "kept": [0.5] * 100}
    steps = axes(example(history=long))["step"]
    assert [(text.get_text(), text.xy[0]) for text in steps.texts] == [
        ("coarse", 20.5), ("sparsify", 55.5), ("coarse", 75.5), ("sparsify", 90.5)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["picture", "picture.jpg", "picture.txt"])
def test_pictures_of_other_kinds_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"pictures are \.png, \.svg, \.pdf files, got "):
        example().plot(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "soco-llm\[plots\]"'):
        example().plot(tmp_path / "picture.png")


def test_grid_has_a_row_for_each_kind_and_a_column_for_each_block():
    head = LayerReport("lm_head", (8, 8), 2, 32)
    kinds, blocks, grid = kept_grid((*LAYERS, head))
    assert kinds == ["self_attn.q_proj", "mlp.up_proj", "lm_head"]
    assert blocks == ["model.layers.0", "model.layers.1"]
    assert grid == [[0.5, 0.25], [1.0, 72 / 128], [0.5, 0.5]]


def test_no_report():
    with pytest.raises(ValueError, match="this Linear has no report: soco did not compress it"):
        report(nn.Linear(2, 2))


def test_bytes_for_people():
    assert [format_bytes(n) for n in (0, 999, 1000, 999_999, 1_234_567, 5 * 10**9, 7 * 10**12)] == [
        "0 B", "999 B", "1.00 kB", "1.00 MB", "1.23 MB", "5.00 GB", "7.00 TB"
    ]  # fmt: skip


def test_fractions_for_people():
    fractions = (0.2, 0.995, 1 / 3, 0.07)
    assert [format_percent(x) for x in fractions] == ["20%", "99.5%", "33.33%", "7%"]
