import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_topomae.commands import cli
from nnunet_topomae.nnunet.data.splits import Split, label_counts, part_sizes, read_fold, read_splits
from workspace import snapshot


@pytest.mark.parametrize(
    ("shares", "num_cases", "sizes"),
    [
        ("18/12", 30, [18, 12]),
        ("70/10/20", 100, [70, 10, 20]),
        ("80:20", 63, [50, 13]),
        ("80:15:5", 41, [33, 6, 2]),
        ("80:15:5", 10, [8, 2, 0]),
    ],
)
def test_sizes(shares, num_cases, sizes):
    assert part_sizes(shares, num_cases) == sizes


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("18/13", "18/13 sums to 31, but the dataset has 30 cases"),
        ("80:25", "80:25 sums to 105, but percentages sum to 100"),
        ("30/0", "leaves 30 to train and 0 to validate on"),
        ("80", "shares must be numbers of cases, such as 18/12"),
        ("80/15:5", "shares must be"),
        ("-1/31", "shares must be"),
    ],
)
def test_shares_that_do_not_fit(shares, message):
    with pytest.raises(ValueError, match=message):
        part_sizes(shares, 30)


def test_a_split_is_seeded_and_used_by_nnunet(workspace, no_split, capsys):
    assert cli.main(["splits", "-d", "998", "-s", "3/1/1"]) == 0
    assert "3 train, 1 val, 1 test; train with fold 0" in capsys.readouterr().out
    (split,) = json.loads(no_split.read_text())
    assert sorted(case for part in split.values() for case in part) == [f"phantom_00{i}" for i in range(5)]
    trainer = workspace.trainer("FusedFinetuneTrainer")
    assert trainer.do_split() == (split["train"], split["val"])

    assert cli.main(["splits", "-d", "998", "-s", "4/1"]) == 2
    assert "exists already, and trainings may rest on it; add --overwrite" in capsys.readouterr().err
    assert cli.main(["splits", "-d", "998", "-s", "3/1/1", "--overwrite"]) == 0
    assert json.loads(no_split.read_text()) == [split]
    assert cli.main(["splits", "-d", "998", "-s", "3/1/1", "--overwrite", "--seed", "3"]) == 0
    assert json.loads(no_split.read_text()) != [split]


CASES = [f"patient{n // 2:02d}_{n % 2}" for n in range(30)]  # two of each of 15 patients


@given(
    counts=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    num_val=st.integers(1, 5),
    num_test=st.integers(0, 10),
    seed=st.integers(0, 99),
)
def test_folds_differ_in_how_many_cases_are_labelled_and_in_nothing_else(counts, num_val, num_test, seed):
    splits = label_counts(CASES, counts, num_val, num_test, seed)
    assert [len(split.train) for split in splits] == sorted(set(counts))
    for split in splits:
        assert sorted([*split.train, *split.val, *split.test, *split.unlabelled]) == CASES
        assert (len(split.val), len(split.test)) == (num_val, num_test)
        assert (split.val, split.test) == (splits[0].val, splits[0].test)
    assert all(set(few.train) < set(more.train) for few, more in pairwise(splits))
    assert splits == label_counts(CASES, counts, num_val, num_test, seed)
    drawn_thrice = label_counts(CASES, counts, num_val, num_test, seed, num_draws=3)
    assert drawn_thrice[: len(splits)] == splits
    for draw in (drawn_thrice[first : first + len(splits)] for first in range(0, 3 * len(splits), len(splits))):
        assert [len(split.train) for split in draw] == sorted(set(counts))
        assert all(set(few.train) < set(more.train) for few, more in pairwise(draw))
        for split in draw:
            assert (split.val, split.test, split.images) == (splits[0].val, splits[0].test, splits[0].images)


@pytest.mark.parametrize("patient", [None, r"^patient\d+"])
def test_every_draw_labels_other_cases(patient):
    draws = label_counts(CASES, [1], 2, 8, seed=0, patient=patient, num_draws=20)
    assert len({tuple(split.train) for split in draws}) == 20  # all that there are
    assert {case for split in draws for case in split.train} == draws[0].images
    assert all((split.val, split.test) == (draws[0].val, draws[0].test) for split in draws)


def test_draws_are_repeated_only_where_there_are_too_few_cases():
    draws = label_counts(list("abcde"), [1], 1, 2, seed=0, num_draws=4)
    assert len({tuple(split.train) for split in draws}) == 2


def test_few_draws_are_the_first_of_many():
    few, many = (label_counts(CASES, [1, 3], 2, 8, seed=5, num_draws=number) for number in (2, 6))
    assert many[: len(few)] == few


@given(half_val=st.integers(1, 3), half_test=st.integers(1, 5), seed=st.integers(0, 99))
def test_patients_who_are_held_out_are_whole(half_val, half_test, seed):
    (split,) = label_counts(CASES, [5], 2 * half_val, 2 * half_test, seed, patient=r"^patient\d+")
    patients = [{case[:9] for case in part} for part in (split.val, split.test, [*split.train, *split.unlabelled])]
    assert sum(map(len, patients)) == 15


def test_patients_of_different_sizes_fill_the_parts():
    cases = ["a_1", "a_2", "a_3", "b_1", "c_1", "d_1", "d_2"]
    seen = set()
    for seed in range(20):
        try:
            (split,) = label_counts(cases, [1], 1, 3, seed, patient="^.")
        except ValueError as error:
            seen.add(str(error))
        else:
            seen.add("".join(case[0] for case in split.test))
            assert split.val in (["b_1"], ["c_1"])
    taken_first = "--test 3 would divide a patient; 2 does not, or try another --seed"  # b and c
    assert seen <= {"aaa", "bdd", "cdd", taken_first}
    assert len(seen) > 2


def test_label_counts_are_written_for_nnunet_and_pretraining(workspace, no_split, capsys):
    command = ["splits", "-d", "998", "--labelled", "1", "--nested", "1", "2", "--val", "1", "--test", "1"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert f"{no_split}: 1 train, 1 val, 1 test, 2 unlabelled; train with fold 0\n" in said
    assert f"{no_split}: 2 train, 1 val, 1 test, 1 unlabelled; train with fold 1\n" in said
    few, more = json.loads(no_split.read_text())
    assert set(few) == {"train", "val", "test", "unlabelled"}
    for fold, split in enumerate((few, more)):
        assert workspace.trainer("nnUNetTrainer", fold=fold).do_split() == (split["train"], split["val"])
        assert workspace.trainer("FusedFinetuneTrainer", fold=fold).do_split() == (split["train"], split["val"])
        pretrainer = workspace.trainer("TopoMAEPretrainer", fold=fold)
        pretrainer.initialize()
        training, validation = pretrainer.get_tr_and_val_datasets()
        assert set(training.identifiers) == {*few["train"], *few["unlabelled"]}
        assert validation.identifiers == few["val"]
        labelled = len(split["train"])
        assert pretrainer.cases.count(training) == f"{labelled} labelled and {3 - labelled} unlabelled cases"

    assert cli.main(command) == 2
    assert "exists already, and trainings may rest on it; add --overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--patient", r"\d+"]) == 0
    assert [split.patient for split in read_splits(workspace.preprocessed)] == [r"\d+"] * 2


@pytest.mark.parametrize("trainer", ["TopoMAEPretrainer", "FusedFinetuneTrainer"])
@pytest.mark.parametrize("fold", ["all", 2])
def test_folds_that_would_train_on_test_cases_are_refused(workspace, no_split, trainer, fold):
    assert cli.main(["splits", "-d", "998", "--nested", "1", "2", "--val", "1", "--test", "1"]) == 0
    before = snapshot(workspace.folder)
    with pytest.raises(
        ValueError,
        match=rf"^fold {fold} would train on cases that .*splits_final.json keeps as test or unlabelled cases, such as "
        r"phantom_00\d; use fold 0 or 1, or move the file away to train on all cases$",
    ):
        workspace.trainer(trainer, fold=fold)
    assert snapshot(workspace.folder) == before


def test_nnunets_own_split_leaves_all_folds_to_nnunet(tmp_path):
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    assert read_fold(tmp_path, 0) == Split(["a"], ["b"], [], [])
    assert read_fold(tmp_path, 1) == read_fold(tmp_path, "all") == Split()
    with pytest.raises(ValueError, match="there is no fold -1: folds are numbered from 0"):
        read_fold(tmp_path, -1)


FOLD = {"train": ["a_1"], "val": ["b_1"], "test": ["c_1"], "unlabelled": ["d_1"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{**FOLD, "unlabelled": ["c_1"]}], ", fold 0: c_1 is in unlabelled, but is held out, too; correct the file"),
        ([{**FOLD, "unlabelled": ["b_1"]}], ", fold 0: b_1 is in unlabelled, but is held out, too; correct the file"),
        ([FOLD, {**FOLD, "train": ["c_1"]}], ", fold 1: c_1 is in train, but is held out, too; correct the file"),
        ([{**FOLD, "unlabelled": ["a_1"]}], ", fold 0: a_1 is in train, but is in unlabelled, too; correct the file"),
        (
            [{**FOLD, "unlabelled": ["c_2"], "patient": "^."}],
            ", fold 0: c_2 is in unlabelled, but is of the same patient as c_1, which is held out; correct the file",
        ),
        (
            [{**FOLD, "val": ["a_2"], "patient": "^."}],
            ", fold 0: a_1 is in train, but is of the same patient as a_2, which is held out; correct the file",
        ),
        ([{**FOLD, "test": "c_1"}], ", fold 0: test must be a list of names of cases, got 'c_1'"),
        ([{**FOLD, "patient": 5}], ", fold 0: the patient must be a regular expression, got 5: "),
        (["a_1"], ", fold 0 must be an object with the lists train and val, got 'a_1'"),
        (FOLD, " must hold a JSON list, got dict"),
    ],
)
def test_splits_that_make_no_sense_are_refused(tmp_path, content, message):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"fold|list") as error:
        read_fold(tmp_path, 0)
    assert str(error.value).startswith(f"{file}{message}")


def test_what_a_split_names_must_have_been_preprocessed(workspace, no_split):
    no_split.write_text(json.dumps([{"train": ["phantom_000"], "val": ["phantom_001"], "unlabelled": ["phantom_009"]}]))
    with pytest.raises(
        ValueError, match=r"^phantom_009 is in .*splits_final.json, but not in .*; preprocess the dataset"
    ):
        workspace.trainer("TopoMAEPretrainer").get_tr_and_val_datasets()
