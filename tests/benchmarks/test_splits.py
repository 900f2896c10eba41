"""The splits of the studies in docs/results.md are what its protocols say."""

import json
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LEFT_ATRIUM, HIPPOCAMPUS = ("left_atrium_split.json", 80), ("hippocampus_split.json", 200)


def read(name: str) -> list[dict[str, list[str]]]:
    return json.loads((BENCHMARKS / name).read_text())


def labelled(folds: list[dict[str, list[str]]]) -> list[list[str]]:
    return [sorted(fold["train"]) for fold in folds]


@pytest.mark.parametrize(("name", "number"), [LEFT_ATRIUM, HIPPOCAMPUS])
def test_every_case_is_in_just_one_part_of_each_fold(name, number):
    for fold in read(name):
        cases = [case for part in ("train", "val", "test", "unlabelled") for case in fold[part]]
        assert len(cases) == len(set(cases)) == number


@pytest.mark.parametrize(("name", "number"), [LEFT_ATRIUM, HIPPOCAMPUS])
def test_all_folds_hold_out_the_same_cases(name, number):
    first, *others = read(name)
    assert all(fold["test"] == first["test"] and fold["val"] == first["val"] for fold in others)


@pytest.mark.parametrize(
    ("name", "held_out", "counts"), [(LEFT_ATRIUM[0], (4, 20), (8, 16)), (HIPPOCAMPUS[0], (5, 60), (1, 3))]
)
def test_parts_have_the_sizes_of_the_protocols(name, held_out, counts):
    sizes = [(len(fold["val"]), len(fold["test"]), len(fold["train"])) for fold in read(name)]
    assert sizes == [(*held_out, count) for count in counts] * 5


def test_left_atria_are_labelled_as_published_and_then_drawn():
    folds = read("left_atrium_split.json")
    drawable = sorted(folds[0]["train"] + folds[0]["unlabelled"])
    generator = np.random.default_rng(17)
    orders = [drawable, *(list(generator.permutation(drawable)) for _ in range(4))]
    assert drawable[:16] == [f"la_{number:03}" for number in range(16)]
    assert labelled(folds) == [sorted(order[:count]) for order in orders for count in (8, 16)]


def test_hippocampi_are_drawn():
    folds = read("hippocampus_split.json")
    drawable = sorted(folds[0]["train"] + folds[0]["unlabelled"])
    generator = np.random.default_rng(17)
    orders = [list(generator.permutation(drawable)) for _ in range(4)]
    assert labelled(folds[2:]) == [sorted(order[:count]) for order in orders for count in (1, 3)]  # seed 0 was known
