"""Tables of text; those of a whole study are looked at in test_study.py."""

import made_up
from nnunet_topomae.studies.definition import read_study
from nnunet_topomae.studies.measures import Measures
from nnunet_topomae.studies.records import Record
from nnunet_topomae.studies.tables import results_table


def test_a_p_value_that_there_is_not_is_a_dash(tmp_path):
    study = read_study(made_up.write_study(tmp_path, with_runs=False))
    records = [
        Record(row, 5, 0, case, "tube", Measures(dice, 1.0, dice, 0.0, 0.0, 0.0))
        for case in ("a", "b")
        for row, dice in (("scratch", 0.5), ("topomae", 0.7))
    ]  # all cases differ by the same, so there is no t-test
    lines = results_table(study, records).splitlines()
    headings, of_row = lines[0], next(line for line in lines if line.startswith("TopoMAE"))
    assert of_row[: headings.index("p (Holm)") + len("p (Holm)")].split()[-1] == "–"
    assert "nan" not in of_row
