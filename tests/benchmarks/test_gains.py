"""The picture and the table of all planned comparisons say the same."""

from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "docs" / "results.md"


@pytest.fixture
def gains(load):
    return load("gains")


def test_the_table_in_the_docs_has_every_planned_comparison(gains):
    lines = [line for line in RESULTS.read_text().splitlines() if line.startswith("| [")]
    found = gains.planned_gains().values()
    assert len(lines) == len(found)
    for gain, line in zip(found, lines, strict=True):
        cells = [cell.strip() for cell in line.split("|")]
        assert f"{gain.difference:+.3f}, {gain.low:+.3f} to {gain.high:+.3f}" in cells
        assert f"{sum(seed > 0 for seed in gain.by_seed)} of {len(gain.by_seed)}" in cells
        verdict = {gains.BETTER: "**yes**", gains.OPEN: "no", gains.WORSE: "**worse**"}[gain.color]
        assert cells[-2] == verdict


def test_a_gain_needs_all_seeds(gains):
    surely = {"difference": 0.02, "low": 0.01, "high": 0.03}
    assert gains.Gain(**surely, p=0.01, by_seed=(0.01, 0.03)).color == gains.BETTER
    assert gains.Gain(**surely, p=0.01, by_seed=(-0.01, 0.05)).color == gains.OPEN
    assert gains.Gain(**surely, p=0.06, by_seed=(0.01, 0.03)).color == gains.OPEN


def test_the_picture_is_written(gains, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gains", str(tmp_path / "gains.svg")])
    gains.main()
    assert "TopoMAE" in (tmp_path / "gains.svg").read_text()
