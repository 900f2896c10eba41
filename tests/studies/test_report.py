import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import made_up
from nnunet_topomae.studies.definition import read_study
from nnunet_topomae.studies.measures import MEASURES, Measures
from nnunet_topomae.studies.records import Record
from nnunet_topomae.studies.report import (
    box_plots,
    chosen_cases,
    curves,
    labels_saved,
    main_table,
    measures_table,
    seeds_table,
    settings_table,
    structures_table,
)
from nnunet_topomae.studies.results import read_results
from nnunet_topomae.studies.statistics import Comparison, Equivalent, comparisons


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_up.write_study(tmp_path_factory.mktemp("made_up"), with_runs=False)


@pytest.fixture(scope="module")
def study(folder):
    return read_study(folder)


@pytest.fixture(scope="module")
def table(folder):
    """The columns of results.csv as NumPy reads them."""
    return np.genfromtxt(folder / "results.csv", delimiter=",", names=True, dtype=None, encoding=None)


def _record(row, labelled, seed, case, structure, dice, hd95=None):
    return Record(row, labelled, seed, case, structure, Measures(dice, hd95, *[None] * 4))


RECORDS = [
    _record("topomae", 5, 0, "a", "tube", 0.5),
    _record("topomae", 5, 0, "a", "tree", 0.7, 4.0),
    _record("topomae", 5, 0, "b", "tube", None),
    _record("topomae", 5, 0, "b", "tree", 0.9, 2.0),
    _record("topomae", 5, 1, "a", "tube", 0.1),
]


def test_means_of_seeds_and_cases_leave_out_what_is_not_defined(study):
    (line,) = main_table(study, RECORDS, []).rows
    assert line[:5] == ["TopoMAE", "5", "2", "0.425", f"{stats.tstd([0.75, 0.1]):.3f}"]  # (0.6 + 0.9) / 2, and 0.1
    assert line[5:] == ["–"] * 6
    measures = measures_table(study, RECORDS)
    assert measures.header == ["row", "labelled cases", "Dice", "HD95 [mm]"]
    assert measures.rows == [["TopoMAE", "5", "0.425", "3.000"]]
    structures = structures_table(study, RECORDS)
    assert structures.header == ["row", "labelled cases", "tree", "tube"]
    assert structures.rows == [["TopoMAE", "5", "0.800", "0.300"]]  # tube: 0.5 and 0.1


def _means_of_seeds(table, row, labelled, measure="dice"):
    """Recomputed with NumPy; structures are defined equally often."""
    chosen = table[(table["row"] == row) & (table["labelled"] == labelled)]
    return [chosen[measure][chosen["seed"] == seed].mean() for seed in made_up.SEEDS]


def test_table_has_the_rows_in_their_order_recomputed(study, folder, table):
    records = read_results(study)
    rows = main_table(study, records, comparisons(records, study.baselines, "dice", study.patients)).rows
    names = [name for name in made_up.ROWS for _ in made_up.COUNTS]
    assert [(row[0], row[1]) for row in rows] == [
        (made_up.ROWS[name][0], count) for name, count in zip(names, ["5", "10"] * 3, strict=True)
    ]
    for name, row in zip(names, rows, strict=True):
        means = _means_of_seeds(table, name, int(row[1]))
        assert row[2:5] == ["2", f"{np.mean(means):.3f}", f"{stats.tstd(means):.3f}"]
    assert rows[0][5:] == ["–"] * 6


def test_differences_are_paired_over_cases(study, table):
    records = read_results(study)
    compared = comparisons(records, study.baselines, "dice", study.patients)
    rows = {tuple(row[:2]): row for row in main_table(study, records, compared).rows}

    def of_cases(row):
        chosen = table[(table["row"] == row) & (table["labelled"] == 5)]
        return np.array([chosen["dice"][chosen["case"] == case].mean() for case in np.unique(chosen["case"])])

    ours, scratch = of_cases("topomae"), of_cases("scratch")
    p = stats.ttest_rel(ours, scratch).pvalue
    line = rows["TopoMAE", "5"]
    assert line[5:7] == ["UNETR++ with ViT from scratch", f"{np.mean(ours - scratch):+.3f}"]
    assert line[8] == (f"{p:.3f}" if p >= 0.001 else "< 0.001")
    assert line[9] == f"{stats.wilcoxon(ours, scratch).pvalue:.3f}"


def test_the_table_says_of_how_many_patients(study):
    named = replace(study, test_cases=["ann_1", "ann_2", "bob_1"], patient="[a-z]+")
    assert "paired over cases, with seeds averaged per case." in main_table(study, RECORDS, []).note
    assert "paired over 2 patients, with seeds and cases averaged per patient." in main_table(named, RECORDS, []).note


def test_the_table_says_what_p_values_are_corrected_for(study):
    assert "Holm: corrected for the number of comparisons that have been made. " in main_table(study, RECORDS, []).note
    note = main_table(replace(study, main="topomae"), RECORDS, []).note
    assert "Holm: TopoMAE, which the study is made for, is corrected for its own numbers of labelled cases, the" in note


def test_intervals_and_p_values_as_people_write_them(study):
    compared = [Comparison("topomae", "scratch", 5, 9, 0.05, 0.02, 0.08, 0.0004, 0.03, math.nan)]
    (line,) = main_table(study, RECORDS, compared).rows
    assert line[6:] == ["+0.050", "+0.020 to +0.080", "< 0.001", "0.030", "–"]


def test_differences_seed_by_seed(study):
    compared = [Comparison("topomae", "scratch", 5, 9, 0.05, 0.02, 0.08, 0.0004, 0.03, math.nan, by_seed={1: -0.01})]
    found = seeds_table(study, compared)
    assert found.header == ["row", "labelled cases", "seed 0", "seed 1"]
    assert found.rows == [["TopoMAE", "5", "–", "-0.010"]]
    assert seeds_table(study, [replace(compared[0], by_seed={0: 0.02})]).header == ["row", "labelled cases", "seed 0"]


def test_every_measure_has_its_mean(study, table):
    shown = measures_table(study, read_results(study))
    assert shown.header[2:] == list(MEASURES.values())
    for row, (name, count) in zip(shown.rows, ((n, c) for n in made_up.ROWS for c in made_up.COUNTS), strict=True):
        for measure, text in zip(MEASURES, row[2:], strict=True):
            if measure != "hd95":  # is not defined everywhere, see above
                assert text == f"{np.mean(_means_of_seeds(table, name, count, measure)):.3f}"


def test_only_settings_that_differ_are_shown(study):
    assert settings_table(study).rows == [
        ["pre-trained by", "not pre-trained", "SparKPretrainer", "TopoMAEPretrainer"],
        ["pretraining.mask_ratio", "–", "0.6", "–"],
    ]


def test_labels_saved_are_said_where_there_are_any(study):
    found = [
        Equivalent("topomae", 1, 2.0, 1.0, 3.0),
        Equivalent("topomae", 5, 8.0, 6.0, 11.0),
        Equivalent("topomae", 10, 9.5, 6.0, math.inf),
        Equivalent("spark", 5, math.inf, 6.0, math.inf),
        Equivalent("spark", 10, 0.0, 0.0, 6.0),
    ]
    assert labels_saved(study, found) == [
        "TopoMAE with 1 labelled case does as well as UNETR++ with ViT from scratch, with about 2 (95 % interval 1 to "
        "3).",
        "TopoMAE with 5 labelled cases does as well as UNETR++ with ViT from scratch, with about 8 (95 % interval 6 to "
        "11).",
        "TopoMAE with 10 labelled cases does as well as UNETR++ with ViT from scratch, with about 10 (95 % interval 6 "
        "to more than were tried).",
    ]


def test_curves_and_boxes_say_what_they_show(study):
    dice = {("scratch", "a"): 0.2, ("scratch", "b"): 0.4, ("topomae", "a"): 0.5, ("topomae", "b"): 0.9}
    records = [_record(row, 5, 0, case, "tube", value) for (row, case), value in dice.items()]
    found = curves(study, records)
    assert [style.label for style in found.legend] == ["UNETR++ with ViT from scratch", "TopoMAE"]  # and not SparK
    (curve,) = found.charts  # HD95 and surface Dice are not defined
    assert curve.alt == (
        "Dice over the number of labelled cases. UNETR++ with ViT from scratch: 0.3 with 5; TopoMAE: 0.7 with 5"
    )
    (box,) = box_plots(study, records).charts
    assert box.alt == (
        "Dice of all test cases, 5 labelled cases. UNETR++ with ViT from scratch: median 0.3, 0.2 to 0.4; "
        "TopoMAE: median 0.7, 0.5 to 0.9"
    )


def test_cases_are_ranked_by_the_best_row_with_the_fewest_labels(study):
    values = dict(zip("abc", (0.1, 0.2, 0.6), strict=True))
    records = [
        record
        for case, dice in values.items()
        for record in (
            _record("scratch", 5, 1, case, "tube", dice),
            _record("spark", 5, 1, case, "tube", dice),
            _record("topomae", 5, 1, case, "tube", dice + 0.05),
            _record("spark", 10, 0, case, "tube", 1 - dice),
        )
    ]
    shown = chosen_cases(study, records)
    assert shown.cases == {"best": "c", "median": "b", "worst": "a"}
    assert (shown.labelled, [row.name for row in shown.rows], shown.seed) == (5, ["scratch", "topomae"], 1)
    assert shown.dice["topomae", "b"] == pytest.approx(0.25)
    assert shown.dice["scratch", "b"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("seeds", "of_scratch", "rows", "seed"),
    [
        ((0, 1, 2), (1, 2), ["scratch", "topomae"], 1),
        ((1,), (0, 1), ["scratch", "topomae"], 1),
        ((2, 1), (0,), ["topomae"], 1),  # nothing to show beside it yet
        ((0,), (), ["topomae"], 0),
    ],
)
def test_cases_are_shown_of_a_seed_that_all_rows_have(study, seeds, of_scratch, rows, seed):
    records = [
        _record(row, 5, number, "a", "tube", 0.5)
        for row, numbers in (("topomae", seeds), ("scratch", of_scratch))
        for number in numbers
    ]
    shown = chosen_cases(study, records)
    assert ([row.name for row in shown.rows], shown.seed) == (rows, seed)


def test_without_results_there_is_no_case_to_show(study):
    assert chosen_cases(study, []) is None


def test_rows_whose_images_differ_are_named(study):
    def of(row, spacing):
        return replace(row, differs={"preprocessing.spacing": spacing, "pretraining.mask_ratio": spacing[0] / 4})

    scratch, spark, topomae = study.rows
    assert replace(study, rows=[of(scratch, [1.0, 1.0]), of(spark, [1.0, 1.0]), of(topomae, [2.0, 1.0])]).warnings == [
        "topomae is compared with scratch, whose images were preprocessed otherwise: spacing is [2.0, 1.0] and "
        "[1.0, 1.0]. The rows may differ for that reason."
    ]
