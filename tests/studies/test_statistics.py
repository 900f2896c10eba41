import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from nnunet_topomae.studies.measures import Measures
from nnunet_topomae.studies.records import Record
from nnunet_topomae.studies.statistics import (
    answer,
    compare,
    comparisons,
    equivalent_labels,
    holm,
    paired,
    read_curve,
    scores,
    seeds_so_far,
    signed,
)

BASELINES, TITLES = {"ours": "scratch"}, {"ours": "Ours", "scratch": "from scratch"}
SINGLE: dict[str, str] = {}  # every case is of another patient
NAN = math.nan


def record(row, labelled, dice, case="a", seed=0, structure="organ", hd95=None):
    return Record(row, labelled, seed, case, structure, Measures(dice, hd95, dice, 0, 0, 0))


def study(means, num_cases=12, spread=0.02):
    """Records of rows whose Dice is a mean and a part of the case; ``means`` by row and number of labels."""
    rng = np.random.default_rng(0)
    of_case = rng.normal(0, 0.1, num_cases)
    return [
        record(row, labelled, mean + of_case[case] + rng.normal(0, spread), case=f"case{case}", seed=seed)
        for (row, labelled), mean in means.items()
        for case in range(num_cases)
        for seed in range(2)
    ]


def test_a_case_has_the_mean_of_its_defined_structures():
    records = [
        record("ours", 5, 0.5, structure="one", hd95=2.0),
        record("ours", 5, 0.7, structure="two"),
        record("ours", 5, 0.9, case="b", structure="two"),
    ]
    assert scores(records, "dice") == {("ours", 5): {0: {"a": pytest.approx(0.6), "b": 0.9}}}
    assert scores(records, "hd95") == {("ours", 5): {0: {"a": 2.0}}}


def test_seeds_are_averaged_and_cases_are_paired():
    ours = {0: {"a": 0.5, "b": 0.6}, 1: {"a": 0.7, "b": 0.8, "c": 0.9}}
    scratch = {0: {"a": 0.1, "b": 0.2, "c": 0.3}, 1: {"a": 0.3, "b": 0.4}, 2: {"a": 0.9, "b": 0.9}}
    runs = (
        {seed: {(case, "organ"): value for case, value in values.items()} for seed, values in run.items()}
        for run in (ours, scratch)
    )
    first, second = paired(*runs, patients=SINGLE)
    assert first == pytest.approx([0.6, 0.7])  # a and b, seeds 0 and 1
    assert second == pytest.approx([0.2, 0.3])


def test_differences_of_all_seeds_are_about_the_same_structures():
    """The second seed lacks a distance that the first one has, so that structure counts for none of them."""
    found_by = {
        ("ours", 0): (1.0, 9.0),
        ("scratch", 0): (2.0, 1.0),
        ("ours", 1): (5.0, None),
        ("scratch", 1): (3.0, 1.0),
    }
    records = [
        record(row, 5, 0.5, seed=seed, structure=structure, hd95=distance)
        for (row, seed), distances in found_by.items()
        for structure, distance in zip(("one", "two"), distances, strict=True)
    ]
    (found,) = comparisons(records, BASELINES, "hd95", SINGLE)
    assert found.by_seed == {0: -1.0, 1: 2.0}
    assert found.difference == np.mean(list(found.by_seed.values()))


def test_differences_seed_by_seed_are_of_the_seeds_that_both_have():
    values = {
        ("ours", 0): {"a": 0.8, "b": 0.9}, ("ours", 1): {"a": 0.5, "b": 0.6}, ("ours", 2): {"a": 0.9, "b": 0.9},
        ("scratch", 0): {"a": 0.7, "b": 0.5}, ("scratch", 1): {"a": 0.6, "b": 0.6},
    }  # fmt: skip
    records = [
        record(row, 5, dice, case=case, seed=seed)
        for (row, seed), cases in values.items()
        for case, dice in cases.items()
    ]
    (found,) = comparisons(records, BASELINES, "dice", SINGLE)
    assert found.by_seed == pytest.approx({0: 0.25, 1: -0.05})
    assert found.difference == pytest.approx(0.1)
    assert signed(found.by_seed, [0, 1, 2]) == "+0.250 -0.050 -"
    said = answer(records, BASELINES, TITLES, SINGLE)
    assert said["sentence"].endswith(", 2 test cases; better with 1 of 2 seeds).")
    assert said["comparisons"][0]["by_seed"] == pytest.approx({0: 0.25, 1: -0.05})


def test_errors_in_components_are_compared_too():
    records = [
        Record(row, 5, 0, case, "organ", Measures(0.5, None, 0.5, errors, 0, None))
        for row, all_errors in (("ours", [0, 0, 1]), ("scratch", [1, 0, 3]))
        for case, errors in zip("abc", all_errors, strict=True)
    ]
    others = answer(records, BASELINES, TITLES, SINGLE)["other_measures"]
    (components,), (loops,) = others["betti0_error"], others["betti1_error"]
    assert (components["difference"], components["cases"]) == (-1, 3)
    assert components["t_p"] == pytest.approx(scipy.stats.ttest_rel([0, 0, 1], [1, 0, 3]).pvalue)
    assert (loops["difference"], loops["t_p"]) == (0, 1)
    assert others["betti2_error"] == others["hd95"] == []  # defined nowhere


def test_means_over_three_seeds_keep_their_ties():
    """Thirds are rounded in floating point; their ranks must be those of the whole numbers that they are thirds of."""
    errors = np.array([[2, 1, 2], [4, 4, 4], [1, 0, 0], [3, 1, 1], [0, 0, 1], [5, 2, 0], [1, 1, 0], [2, 0, 0]])
    fewer = np.array([[2, 1, 1], [4, 2, 4], [1, 1, 1], [0, 0, 1], [1, 1, 1], [2, 3, 0], [1, 0, 0], [2, 0, 2]])
    found = compare("ours", "scratch", 5, fewer.mean(axis=1), errors.mean(axis=1))
    whole = (fewer - errors).sum(axis=1)
    assert len(set(np.abs(whole))) < len(whole)  # there are ties
    assert found.wilcoxon_p == scipy.stats.wilcoxon(whole).pvalue
    assert found.t_p == pytest.approx(scipy.stats.ttest_1samp(whole, 0).pvalue)


def test_seeds_up_to_the_last_that_was_compared():
    of_seeds = [
        replace(compare("ours", "scratch", 5, np.ones(2), np.zeros(2)), by_seed=found) for found in ({}, {1: 0.1})
    ]
    assert seeds_so_far(range(4), of_seeds) == [0, 1]
    assert seeds_so_far(range(4), []) == []


def test_a_structure_that_the_baseline_misses_makes_no_row_worse():
    """HD95 of the small structure is not defined from scratch with one seed; of case b there is no other one."""
    records = [
        record(row, 5, 0.5, case, seed, structure, hd95)
        for row, case, seed, structure, hd95 in [
            ("ours", "a", 0, "large", 2.0), ("ours", "a", 0, "small", 30.0), ("ours", "b", 0, "small", 40.0),
            ("ours", "a", 1, "large", 4.0), ("ours", "a", 1, "small", 50.0), ("ours", "b", 1, "small", 60.0),
            ("scratch", "a", 0, "large", 5.0), ("scratch", "a", 0, "small", 1.0), ("scratch", "b", 0, "small", None),
            ("scratch", "a", 1, "large", 7.0), ("scratch", "a", 1, "small", None), ("scratch", "b", 1, "small", 8.0),
        ]
    ]  # fmt: skip
    (found,) = comparisons(records, BASELINES, "hd95", SINGLE)
    assert (found.cases, found.difference) == (1, -3.0)  # the large structure of a: (2 + 4) / 2 - (5 + 7) / 2
    assert comparisons(records[:3] + records[8:9], BASELINES, "hd95", SINGLE) == []  # nothing is defined in both


def test_cases_of_a_patient_are_one_observation():
    """Three images of a patient say no more than their mean, which has the same p-values, interval and labels saved."""
    rng = np.random.default_rng(0)
    means = {("ours", 5): 0.72, ("scratch", 5): 0.70, ("scratch", 10): 0.75}
    drawn = {run: mean + rng.normal(0, 0.03, (6, 3)) for run, mean in means.items()}  # patients, images
    images, merged = (
        [
            record(*run, dice, case=f"p{patient}_{image}")
            for run, values in drawn.items()
            for patient, of_patient in enumerate(values)
            for image, dice in enumerate(of_patient if every else [of_patient.mean()])
        ]
        for every in (True, False)
    )
    patients = {each.case: each.case.partition("_")[0] for each in images}
    (found,) = comparisons(images, BASELINES, "dice", patients)
    assert (found.cases, found.unit) == (6, "patients")
    p_value = scipy.stats.ttest_rel(drawn["ours", 5].mean(axis=1), drawn["scratch", 5].mean(axis=1)).pvalue
    assert found.t_p == pytest.approx(p_value)
    (expected,) = comparisons(merged, BASELINES, "dice", SINGLE)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    (saved,), (expected,) = equivalent_labels(images, BASELINES, patients), equivalent_labels(merged, BASELINES, SINGLE)
    assert (saved.equivalent, saved.low, saved.high) == pytest.approx(
        (expected.equivalent, expected.low, expected.high)
    )
    said = answer(images, BASELINES, TITLES, patients)
    assert ", 6 patients; better with 1 of 1 seeds)" in said["sentence"]
    assert said["comparisons"][0]["unit"] == "patients"


def test_p_values_and_interval_are_those_of_scipy():
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.7, 0.1, 15), rng.normal(0.65, 0.1, 15)
    found = compare("ours", "scratch", 5, first, second)
    assert found.difference == pytest.approx(np.mean(first) - np.mean(second))
    assert found.t_p == pytest.approx(scipy.stats.ttest_rel(first, second).pvalue)
    assert found.wilcoxon_p == pytest.approx(scipy.stats.wilcoxon(first, second).pvalue)
    theirs = scipy.stats.bootstrap((first - second,), np.mean, method="percentile", n_resamples=20_000)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)


def test_nothing_differs():
    found = compare("ours", "scratch", 5, np.array([0.5, 0.6]), np.array([0.5, 0.6]))
    assert (found.difference, found.low, found.high, found.t_p, found.wilcoxon_p) == (0, 0, 0, 1, 1)


def test_equal_differences_have_no_t_test():
    found = compare("ours", "scratch", 5, np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert (found.difference, found.wilcoxon_p) == (-1, 0.25)
    assert math.isnan(found.t_p)


def test_one_case_has_no_t_test():
    found = compare("ours", "scratch", 5, np.array([0.6]), np.array([0.5]))
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert math.isnan(found.t_p)


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([], []),
        ([0.2], [0.2]),
        ([0.01, 0.02, 0.03], [0.03, 0.04, 0.04]),
        ([0.03, 0.01, 0.02], [0.04, 0.03, 0.04]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.01, NAN], [0.01, NAN]),
    ],
)
def test_holm(p_values, expected):
    assert holm(p_values) == pytest.approx(expected, nan_ok=True)


def test_holm_counts_all_comparisons():
    records = study(
        {("ours", 5): 0.71, ("scratch", 5): 0.7, ("ours", 10): 0.9, ("scratch", 10): 0.7, ("ours", 20): 0.8}
    )
    found = comparisons(records, BASELINES, "dice", SINGLE)
    assert [each.labelled for each in found] == [5, 10]
    assert [each.holm_p for each in found] == pytest.approx(holm([each.t_p for each in found]))


MEANS = {
    ("ours", 5): 0.71, ("scratch", 5): 0.7, ("ours", 10): 0.705, ("scratch", 10): 0.7, ("slow", 5): 0.73,
    ("fast", 5): 0.69,
}  # fmt: skip
SEVERAL = {"ours": "scratch", "slow": "scratch", "fast": "scratch"}
NAMED = {**TITLES, "slow": "Slow", "fast": "Fast"}


def test_the_main_row_is_corrected_for_its_own_comparisons_only():
    found = comparisons(study(MEANS, spread=0.03), SEVERAL, "dice", SINGLE, main="ours")
    p = {(each.row, each.labelled): each.t_p for each in found}
    assert 0 < min(p.values()) < max(p.values()) < 0.5  # so that corrections can be seen
    assert [each.holm_p for each in found if each.row == "ours"] == holm([p["ours", 5], p["ours", 10]])
    assert [each.holm_p for each in found if each.row != "ours"] == holm([p["slow", 5], p["fast", 5]])
    assert [each.holm_p for each in comparisons(study(MEANS, spread=0.03), SEVERAL, "dice", SINGLE)] == holm(
        list(p.values())
    )


def test_the_answer_is_about_the_main_row_or_else_about_the_last_one():
    records = study(MEANS)
    assert "Fast" in answer(records, SEVERAL, NAMED, SINGLE)["sentence"]
    found = answer(records, SEVERAL, NAMED, SINGLE, main="slow")
    assert "Slow is better than from scratch" in found["sentence"]
    assert {each["holm_p"] == each["t_p"] for each in found["comparisons"] if each["row"] == "slow"} == {True}
    of_nsd = {each["row"]: each for each in found["other_measures"]["nsd"]}
    assert of_nsd["slow"]["holm_p"] == of_nsd["slow"]["t_p"]


def test_a_main_row_that_has_not_been_measured_has_no_answer_yet():
    records = [each for each in study(MEANS) if each.row != "slow"]
    said = answer(records, SEVERAL, NAMED, SINGLE, main="slow")["sentence"]
    assert said == "Slow has not been measured beside its baseline yet, so there is no answer."


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.59, 0),  # below the curve
        (0.6, 5),
        (0.7, 10),  # half way on a logarithmic axis
        (0.8, 20),
        (0.81, math.inf),
    ],
)
def test_labels_from_scratch_are_read_from_the_curve(target, expected):
    assert read_curve([5, 20], np.array([0.6, 0.8]), target) == pytest.approx(expected)


def test_a_curve_that_falls_is_made_to_rise():
    assert read_curve([5, 10, 20], np.array([0.7, 0.5, 0.8]), 0.6) == pytest.approx(5)  # 5 and 10 are pooled to 0.6
    assert read_curve([5, 10, 20], np.array([0.7, 0.5, 0.8]), 0.7) == pytest.approx(10.0, rel=0.5)


def test_as_good_as_more_labels_from_scratch():
    records = study(
        {("ours", 10): 0.75, ("scratch", 10): 0.6, ("scratch", 20): 0.7, ("scratch", 40): 0.8}, spread=0.001
    )
    (found,) = equivalent_labels(records, BASELINES, SINGLE)
    assert found.equivalent == pytest.approx(20 * math.sqrt(2), rel=0.02)
    assert found.low < found.equivalent < found.high
    said = answer(records, BASELINES, TITLES, SINGLE)["sentence"]
    assert said.startswith("With 10 labelled cases, Ours is better than from scratch (Dice +0.149")
    assert said.endswith("as good as 28 labels from scratch (95 % interval 28 to 28).")


def test_better_than_all_that_was_tried_is_null_in_json():
    found = answer(study({("ours", 10): 0.9, ("scratch", 10): 0.6, ("scratch", 20): 0.7}), BASELINES, TITLES, SINGLE)
    (labels,) = found["equivalent_labels"]
    assert labels == {"row": "ours", "labelled": 10, "equivalent": None, "low": None, "high": None}
    assert "better than from scratch with the largest number of labels that was tried" in found["sentence"]


def test_no_gain():
    found = answer(study({("ours", 10): 0.7, ("scratch", 10): 0.7}), BASELINES, TITLES, SINGLE)
    assert found["sentence"].startswith("No gain of Ours over from scratch seen with 10 labelled cases (Dice ")
    assert found["equivalent_labels"] == []


def test_of_several_numbers_of_labels_without_a_gain_the_largest_difference_is_said():
    values = {("ours", 10): 0.7, ("scratch", 10): 0.7, ("ours", 20): 0.8, ("scratch", 20): 0.8}
    said = answer(study(values), BASELINES, TITLES, SINGLE)["sentence"]
    assert said.startswith("No gain of Ours over from scratch seen with ")
    assert " labelled cases, where the difference is largest (Dice " in said


def test_a_loss_is_called_one():
    found = answer(study({("ours", 10): 0.5, ("scratch", 10): 0.7, ("scratch", 20): 0.8}), BASELINES, TITLES, SINGLE)
    assert found["sentence"].startswith("With 10 labelled cases, Ours is worse than from scratch (Dice -0.2")
    assert [labels["equivalent"] for labels in found["equivalent_labels"]] == [0.0]


def test_nothing_to_compare_yet():
    found = answer(study({("scratch", 10): 0.7}), BASELINES, TITLES, SINGLE)
    assert found["sentence"] == "No row has been measured beside its baseline yet, so there is no answer."


def test_chance_is_seldom_called_a_gain():
    """Of 200 studies in which nothing differs, about 2.5 % may find a gain."""
    rng = np.random.default_rng(0)
    found = [compare("ours", "scratch", 5, *rng.normal(0.7, 0.1, (2, 20))) for _ in range(200)]
    assert sum(each.t_p < 0.05 and each.difference > 0 for each in found) <= 12
