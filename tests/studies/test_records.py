import pytest

from nnunet_topomae.studies.measures import Measures
from nnunet_topomae.studies.records import Record, read_records, write_records

RECORDS = [
    Record("ours", 5, 0, "case_1", "organ, left", Measures(0.123456789, 1.5, 0.25, 0.0, 1.0, 2.0)),
    Record("scratch", 5, 1, "case_1", "tube", Measures(1.0, None, 1.0, 0.0, 0.0, 0.0)),
]


def test_what_is_written_is_read(tmp_path):
    write_records(RECORDS, tmp_path / "results.csv")
    first, second = read_records(tmp_path / "results.csv")
    assert first.measures.dice == pytest.approx(0.123456789, rel=1e-6)
    assert (first.structure, second) == ("organ, left", RECORDS[1])


def test_the_file_is_what_other_tools_expect(tmp_path):
    write_records(RECORDS, tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text() == (
        "row,labelled,seed,case,structure,dice,hd95,nsd,betti0_error,betti1_error,betti2_error\n"
        'ours,5,0,case_1,"organ, left",0.1234568,1.5,0.25,0,1,2\n'
        "scratch,5,1,case_1,tube,1,,1,0,0,0\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dice,", "Dice,", "must have the columns row, labelled, seed"),
        ("ours,5", "ours,five", "line 2, cannot be read .*; move it away, and measure again"),
        (",1,0,0,0\n", "\n", "line 3, cannot be read"),
    ],
    ids=["columns", "no number", "cut off"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, old, new, message):
    file = tmp_path / "results.csv"
    write_records(RECORDS, file)
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"results.csv.*{message}"):
        read_records(file)
