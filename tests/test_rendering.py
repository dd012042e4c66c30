"""The report of a comparison: tables in the order of quality, the best in bold, what went wrong."""

import dataclasses
import re
import sys

import pytest

from comparisons import failed, made_up
from soco.rendering import across, markdown, notes, number, ratio_table, render


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_of_a_ratio():
    done = made_up()
    done = dataclasses.replace(done, rows=(*done.rows, failed("aa-svd", 0.4, "a | b")))
    head, _, *lines = ratio_table(done, 0.4).splitlines()
    assert cells(head) == [
        "method", "perplexity", "KL", "top-1", "kept parameters", "removed", "bytes", "seconds",
        "peak memory",
    ]  # fmt: skip
    assert [cells(line)[0] for line in lines] == ["dense", "**soco**", "svd-llm", "svd", "aa-svd"]
    assert cells(lines[0])[1:5] == ["4.000", "-", "-", "448"]
    assert cells(lines[1])[1:4] == ["**8.902**", "**0.800**", "**44.9%**"]
    assert cells(lines[3])[4:] == ["268", "40.18%", "1.47 kB", "1.5", "100.00 MB"]
    assert lines[4].startswith("| aa-svd | failed: a \\| b |")
    assert all(line.replace("\\|", "").count("|") == head.count("|") for line in lines)


def test_a_row_that_keeps_too_much_is_not_the_best():
    done = made_up()
    done.rows[5]["kept_params"] = done.rows[5]["target_params"]
    lines = ratio_table(done, 0.4).splitlines()
    assert [cells(line)[0] for line in lines[3:5]] == ["soco", "**svd-llm**"]
    assert "(too large)" in across(done)
    assert any(
        note.startswith("soco at 40% keeps 448 parameters, more than") for note in notes(done)
    )


def test_across_ratios():
    lines = across(made_up()).splitlines()
    assert [cells(line) for line in (lines[0], *lines[2:])] == [
        ["perplexity / KL", "20% removed", "40% removed"],
        ["dense", "4.000", "4.000"],
        ["soco", "**5.967 / 0.400**", "**8.902 / 0.800**"],
        ["svd-llm", "8.902 / 0.800", "19.81 / 1.600"],
        ["svd", "13.28 / 1.200", "44.09 / 2.400"],
    ]
    assert "13.43 / 0.800" in across(made_up(), "other.txt")


def test_encoders_have_a_distance_and_nothing_else():
    nothing = {"perplexity": None, "kl": None, "top1": None}
    rows = tuple({**row, **nothing, "distance": row["kl"], "texts": {}} for row in made_up().rows)
    done = made_up(rows=rows, dense={**made_up().dense, **nothing})
    assert cells(ratio_table(done, 0.2).splitlines()[0])[:3] == [
        "method", "distance", "kept parameters"
    ]  # fmt: skip
    assert cells(across(done).splitlines()[0])[0] == "distance"
    assert notes(done)[0].startswith("Distance is")


def test_report_and_pictures(tmp_path):
    done = made_up()
    paths = render(done, tmp_path / "out")
    assert [path.name for path in paths] == [
        "report.md", "quality.png", "ranks-0.2.png", "ranks-0.4.png", "spectra.png"
    ]  # fmt: skip
    text = paths[0].read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert sorted(shown) == sorted(path.name for path in paths[1:])
    for part in (
        "# made-up: methods of compression compared",
        "548 parameters, of which 448 are in the 6 layers",
        "- measured on: valid.txt (4 windows, 64 tokens); also other.txt (4 windows, 64 tokens)",
        "- calibration: train.txt (8 windows, 128 tokens), seed 0",
        "- machine: a cpu, cores 2",
        "- command: `soco compare made-up`",
        "## 20% of the parameters removed",
        ratio_table(done, 0.4),
        "## On another text: other.txt",
        across(done, "other.txt"),
        "- Warning: few tokens.",
    ):
        assert part in text


def test_without_matplotlib_there_is_a_report(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="the report has no pictures: plots need matplotlib"):
        paths = render(made_up(), tmp_path)
    assert [path.name for path in paths] == ["report.md"]
    assert "![" not in paths[0].read_text()


def test_what_went_wrong_is_said():
    done = made_up()
    done.rows[0]["warnings"] = ["odd", "odd"]
    done.rows[3]["warnings"] = ["odd"]
    done.rows[1]["machine"] = {"cpu": "another", "cores": 9}
    done = dataclasses.replace(done, rows=(*done.rows, failed("aa-svd", 0.4)))
    said = notes(done)
    assert "Warning of svd: odd." in said
    assert "Made on another machine (another, cores 9): svd-llm at 20%." in said
    assert "aa-svd at 40% failed: no such rank." in said


def test_a_comparison_in_which_all_failed():
    done = made_up(rows=(failed("svd", 0.9),), spectra={})
    assert "| svd | failed: no such rank |" in markdown(done)


def test_numbers_for_people():
    values = (2.10689, 52.39, 1234.5, 3.2e9, 1e308)
    assert [number(value) for value in values] == ["2.107", "52.39", "1234", "3.2e+09", "1e+308"]
