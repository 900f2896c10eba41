import json
import shutil

import numpy as np
import pytest
from scipy import stats

import made_up
from nnunet_topomae.reporting.study import (
    chosen_cases,
    equivalent_labels,
    main_table,
    measures_table,
    read_study,
    settings_table,
)

HEADER = "row,labelled,seed,case,structure,dice,hd95,nsd,betti0_error,betti1_error,betti2_error"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_up.write_study(tmp_path_factory.mktemp("made_up"), with_runs=False)


@pytest.fixture
def own(folder, tmp_path):
    """A study that a test may change, without its predictions."""
    return shutil.copytree(folder, tmp_path / "study", ignore=shutil.ignore_patterns("predictions"))


def _with_scores(own, *lines):
    (own / "results.csv").write_text("\n".join((HEADER, *lines)) + "\n")
    return read_study(own)


def test_means_of_seeds_and_cases_leave_out_what_is_not_defined(own):
    study = _with_scores(
        own,
        "topomae,5,0,a,tube,0.5,,,,,",
        "topomae,5,0,a,tree,0.7,4,,,,",
        "topomae,5,0,b,tube,,,,,,",
        "topomae,5,0,b,tree,0.9,2,,,,",
        "topomae,5,1,a,tube,0.1,,,,,",
    )
    assert study.per_seed("dice") == {("topomae", 5): [pytest.approx((0.6 + 0.9) / 2), pytest.approx(0.1)]}
    assert study.per_case("dice")["topomae", 5] == {"a": pytest.approx(1.3 / 3), "b": pytest.approx(0.9)}
    assert study.per_seed("hd95") == {("topomae", 5): [pytest.approx(3)]}
    (line,) = main_table(study).rows
    assert line[:5] == ["TopoMAE", "5", "2", "0.425", f"{stats.tstd([0.75, 0.1]):.3f}"]
    (line,) = measures_table(study).rows
    assert measures_table(study).header == ["row", "labelled cases", "Dice", "HD95 [mm]"]
    assert line[2:] == ["0.425", "3"]


def test_table_has_the_rows_in_their_order_with_what_was_tested(folder):
    rows = main_table(read_study(folder)).rows
    titles = [title for title, *_ in made_up.ROWS.values() for _ in made_up.COUNTS]
    assert [(row[0], row[1]) for row in rows] == list(zip(titles, ["5", "10"] * 3, strict=True))
    assert rows[0][5:] == ["–"] * 5
    assert rows[2][5:] == ["+0.050", "+0.020 to +0.080", "< 0.001", "0.030", "0.060"]


def test_only_settings_that_differ_are_shown(folder):
    assert settings_table(read_study(folder)).rows == [
        ["pre-trained by", "not pre-trained", "SparKPretrainer", "TopoMAEPretrainer"],
        ["pretraining.mask_ratio", "–", "0.6", "–"],
    ]


def test_equivalent_labels_are_said_where_there_are_any(folder):
    assert equivalent_labels(read_study(folder)) == [
        "TopoMAE with 5 labelled cases does as well as the baseline with about 8 (95 % interval 6 to 11)."
    ]


@pytest.mark.parametrize(("measure", "best", "worst"), [("dice", "c", "a"), ("hd95", "a", "c")])
def test_cases_are_ranked_by_the_best_row_with_the_fewest_labels(own, measure, best, worst):
    answer = json.loads((own / "answer.json").read_text()) | {"measure": measure}
    (own / "answer.json").write_text(json.dumps(answer))
    values = dict(zip("abc", (0.1, 0.2, 0.6), strict=True))
    better = -0.05 if measure == "hd95" else 0.05
    study = _with_scores(
        own,
        *(f"scratch,5,0,{case},tube,{value},{value},,,," for case, value in values.items()),
        *(f"spark,5,1,{case},tube,{value},{value},,,," for case, value in values.items()),
        *(f"topomae,5,1,{case},tube,{value + better},{value + better},,,," for case, value in values.items()),
        *(f"spark,10,0,{case},tube,{1 - value},{1 - value},,,," for case, value in values.items()),
    )
    shown = chosen_cases(study)
    assert shown.cases == {"best": best, "median": "b", "worst": worst}
    assert (shown.labelled, list(shown.rows), shown.seed) == (5, ["scratch", "topomae"], 1)
    assert shown.values["topomae", "b"] == pytest.approx(0.2 + better)


def test_a_study_that_has_not_been_evaluated_has_no_results(own):
    for name in ("results.csv", "answer.json"):
        (own / name).unlink()
    study = read_study(own)
    assert (study.scores, study.answer, chosen_cases(study)) == ([], {}, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("topomae,5,0,a,tube,good,,,,,", "line 2 is broken: could not convert string to float: 'good'"),
        ("topomae,5,0,a,tube,nan,,,,,", "line 2 is broken: dice is nan; evaluate the study again"),
        ("topomae,five,0,a,tube,,,,,,", "line 2 is broken: invalid literal for int"),
        ("topomae,5,0,a,tube,0.5", "line 2 is broken: float\\(\\) argument"),
        ("other,5,0,a,tube,0.5,,,,,", "line 2: study.json has no run of row 'other' with 5 labelled cases and seed 0"),
        ("topomae,7,0,a,tube,0.5,,,,,", "line 2: study.json has no run of row 'topomae' with 7 labelled cases"),
    ],
)
def test_broken_results_are_refused(own, line, message):
    with pytest.raises(ValueError, match=message):
        _with_scores(own, line)


def test_results_that_are_there_twice_are_refused(own):
    line = "topomae,5,0,a,tube,0.5,,,,,"
    with pytest.raises(ValueError, match="line 3: tube of a has been measured twice in this run"):
        _with_scores(own, line, line)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("study.json", '{"version": 2}', "study.json has version 2, but this command reads version 1"),
        ("study.json", '{"version": 1}', "study.json is incomplete: KeyError 'rows'; write it again with study new"),
        ("study.json", "{", "study.json is no valid JSON"),
        ("results.csv", "row,dice\n", "results.csv must have the columns row,labelled,"),
        ("answer.json", '{"sentence": "Yes."}', "answer.json is broken: KeyError 'measure'; evaluate the study again"),
        (
            "answer.json",
            '{"sentence": "Yes.", "measure": "size", "comparisons": [], "equivalent_labels": []}',
            "answer.json must have a sentence and one of the measures dice, hd95",
        ),
    ],
)
def test_broken_files_are_refused(own, name, content, message):
    (own / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_study(own)


def test_means_are_those_of_the_file(folder):
    """Recomputed with NumPy from the columns."""
    table = np.genfromtxt(folder / "results.csv", delimiter=",", names=True, dtype=None, encoding=None)
    chosen = table[(table["row"] == "topomae") & (table["labelled"] == 10)]
    means = [chosen["dice"][chosen["seed"] == seed].mean() for seed in made_up.SEEDS]
    assert read_study(folder).per_seed("dice")["topomae", 10] == pytest.approx(means)
