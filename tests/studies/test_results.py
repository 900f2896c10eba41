import pytest

import made_up
from nnunet_topomae.studies.definition import read_study
from nnunet_topomae.studies.results import read_results


@pytest.fixture
def own(tmp_path):
    """The folder of a study that a test may change."""
    made_up.define(tmp_path).write()
    return tmp_path


HEADER = "row,labelled,seed,case,structure,dice,hd95,nsd,betti0_error,betti1_error,betti2_error"
LINE = "topomae,5,0,phantom_000,tube,0.5,,,,,"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LINE.replace("0.5", "good")], r"line 2, cannot be read \(could not convert string to float: 'good'\)"),
        ([LINE.replace("0.5", "nan")], r"line 2, cannot be read \(dice is nan\)"),
        (
            [LINE.replace("topomae", "other")],
            "holds tube of phantom_000 in row other, 5 labelled, seed 0, which is not",
        ),
        ([LINE.replace(",5,", ",7,")], "row topomae, 7 labelled, seed 0, which is not in .*study.json"),
        ([LINE.replace("_000", "_009")], "holds tube of phantom_009 in row topomae, .* which is not in"),
        ([LINE, LINE], "holds tube of phantom_000 in row topomae, 5 labelled, seed 0 twice"),
    ],
)
def test_results_that_are_not_those_of_the_study_are_refused(own, lines, message):
    (own / "results.csv").write_text("\n".join((HEADER, *lines)) + "\n")
    with pytest.raises(ValueError, match=f"results.csv.*{message}.*move (it|the file) away, and measure again"):
        read_results(read_study(own))
