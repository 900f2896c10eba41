import json

import pytest

import made_up
from nnunet_topomae.studies.definition import read_study


@pytest.fixture
def own(tmp_path):
    """The folder of a study that a test may change."""
    made_up.define(tmp_path).write()
    return tmp_path


WRONG = {  # where study.json is spoilt, by which value, and what is said
    "rows are a text": (["rows"], "scratch", 'rows must be a list of objects, got "scratch"'),
    "rows are null": (["rows"], None, "rows must be a list of objects, got null"),
    "a row is a text": (["rows", 0], "x", "rows must be a list of objects, got"),
    "runs are an object": (["rows", 1, "runs"], {}, r"rows\[1\].runs must be a list of objects, got {}"),
    "seeds are a text": (["seeds"], "01", "seeds must be a list of one or more different values, each a whole number "
                         'of at least 0, got "01"'),
    "seeds are no numbers": (["seeds"], ["0"], r'seeds must be a list of .* number of at least 0, got \["0"\]'),
    "there is no seed": (["seeds"], [], r"seeds must be a list of one or more .*, got \[\]"),
    "a seed is there twice": (["seeds"], [0, 0, 1], r"seeds must be a list of one or more different .* \[0, 0, 1\]"),
    "label counts are nested": (["label_counts"], [[5], 10], r"label_counts must be a list of .*, got \[\[5\], 10\]"),
    "test cases are numbers": (["test_cases"], [1], r"test_cases must be a list of .* a text, got \[1\]"),
    "dataset is null": (["dataset"], None, "dataset must be a text, got null"),
    "a number as text": (["rows", 2, "runs", 1, "labelled"], "5",
                         r'rows\[2\].runs\[1\].labelled must be a whole number of at least 1, got "5"'),
    "a fold of true": (["rows", 0, "runs", 0, "fold"], True, r"rows\[0\].runs\[0\].fold must be .*, got true"),
    "a name of null": (["rows", 0, "name"], None, r"rows\[0\].name must be a text, got null"),
    "a trainer in a list": (["rows", 0, "finetuner"], ["x"], r'rows\[0\].finetuner must be a text, got \["x"\]'),
    "a pre-trainer of false": (["rows", 0, "pretrainer"], False, r"rows\[0\].pretrainer must be null or a text, got"),
    "a baseline of a text": (["rows", 0, "baseline"], "no", r'rows\[0\].baseline must be true or false, got "no"'),
    "differs in a list": (["rows", 0, "differs"], [], r"rows\[0\].differs must be an object, got \[\]"),
    "a tolerance as text": (["nsd_tolerance"], "1", 'nsd_tolerance must be a number above 0, got "1"'),
    "a pattern of a number": (["patient"], 3, "patient must be null or a text, got 3"),
    "a pattern that is none": (["patient"], "(", r"the patient must be a regular expression, got '\('"),
    "a pattern of no patient": (["patient"], "ward", 'the pattern of patients "ward" finds none in '),
    "a main row of a number": (["main"], 1, "main must be null or a text, got 1"),
    "a main row from scratch": (["main"], "scratch", 'main must name a row that is compared with one from scratch, got '
                                '"scratch"; such rows are spark, topomae'),
    "a run twice": (["rows", 0, "runs", 1], {"labelled": 5, "seed": 0, "plans": "study_scratch_seed0", "fold": 0},
                    "scratch has a run with 5 labelled cases and seed 0 twice; remove one of them"),
    "no such baseline": (["rows", 1, "compared_with"], "x", "spark is compared with x, but there is no such row"),
    "a run of no seed": (["seeds"], [0], r"scratch has a run with 5 labelled cases and seed 1, but .* seeds \[0\]"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "value", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_study_that_makes_no_sense_is_one_sentence(own, place, value, message):
    content = json.loads((own / "study.json").read_text())
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (own / "study.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"study.json: {message}"):
        read_study(own)


@pytest.mark.parametrize("place", [["label_counts"], ["rows", 0, "differs"], ["rows", 2, "runs", 3, "plans"]])
def test_a_key_that_is_missing_is_named(own, place):
    content = json.loads((own / "study.json").read_text())
    part = content
    for key in place[:-1]:
        part = part[key]
    del part[place[-1]]
    (own / "study.json").write_text(json.dumps(content))
    named = ".".join(map(str, place)).replace(".0", "[0]").replace(".2", "[2]").replace(".3", "[3]")
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - compared as a whole
        read_study(own)
    assert str(refused.value) == f"{own / 'study.json'}: {named} is missing"


def test_studies_of_before_patients_and_a_main_row_were_kept_can_be_read(own):
    content = json.loads((own / "study.json").read_text())
    del content["patient"], content["main"]
    (own / "study.json").write_text(json.dumps(content))
    assert (read_study(own).patients, read_study(own).main) == ({}, None)


def test_the_pattern_finds_the_patient_of_a_case(own):
    content = json.loads((own / "study.json").read_text())
    content |= {"patient": r"^[a-z]+", "test_cases": ["ann_1", "ann_2", "bob_1", "eve"]}
    (own / "study.json").write_text(json.dumps(content))
    assert read_study(own).patients == {"ann_1": "ann", "ann_2": "ann", "bob_1": "bob", "eve": "eve"}
