"""Reports: sizes that add up, a round trip through JSON, damage that is named, pictures."""

import dataclasses
import json
import struct

import pytest
from torch import nn

from soco.reporting import LayerReport, Report, format_bytes, format_percent, kept_grid, report

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


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(extra=1), "the report has an unknown field 'extra'"),
        (lambda d: d.pop("method"), "the report is damaged: .*method"),
        (lambda d: d.pop("layers"), "the report is damaged: 'layers'"),
        (lambda d: d["layers"][0].pop("shape"), "the report is damaged: 'shape'"),
        (lambda d: d["layers"][0].update(size=3), "the report is damaged: .*size"),
    ],
)
def test_damage_is_named(change, text):
    data = example().to_dict()
    change(data)
    with pytest.raises(ValueError, match=text):
        Report.from_dict(data)


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


def test_plot_of_odd_models(tmp_path):
    """One layer outside of any block, and more blocks than fit with their numbers."""
    head = LayerReport("lm_head", (8, 8), 2, 32)
    many = tuple(LayerReport(f"h.{i}.attn.c_attn", (8, 24), 2, 64) for i in range(32))
    example(layers=(head,)).plot(tmp_path / "one.png")
    example(layers=(*many, head)).plot(tmp_path / "many.png")
    assert png_size(tmp_path / "one.png") == png_size(tmp_path / "many.png")


def test_grid_has_a_row_for_each_kind_and_a_column_for_each_block():
    head = LayerReport("lm_head", (8, 8), 2, 32)
    kinds, blocks, grid = kept_grid((*LAYERS, head))
    assert kinds == ["self_attn.q_proj", "mlp.up_proj", "lm_head"]
    assert blocks == ["model.layers.0", "model.layers.1", "-"]
    assert [[kept for kept in row if kept == kept] for row in grid] == [
        [0.5, 0.25], [1.0, 72 / 128], [0.5]
    ]  # fmt: skip
    assert [str(kept) for kept in grid[2]] == ["nan", "nan", "0.5"]


def test_no_report():
    with pytest.raises(ValueError, match="this Linear has no report: soco did not compress it"):
        report(nn.Linear(2, 2))


def test_bytes_for_people():
    assert [format_bytes(n) for n in (0, 999, 1000, 1_234_567, 5 * 10**9, 7 * 10**12)] == [
        "0 B", "999 B", "1.00 kB", "1.23 MB", "5.00 GB", "7.00 TB"
    ]  # fmt: skip


def test_fractions_for_people():
    fractions = (0.2, 0.995, 1 / 3, 0.07)
    assert [format_percent(x) for x in fractions] == ["20%", "99.5%", "33.33%", "7%"]
