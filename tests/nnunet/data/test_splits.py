import json

import pytest

from nnunet_topomae.commands import cli
from nnunet_topomae.nnunet.data.splits import part_sizes


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


@pytest.fixture
def no_split(workspace):
    file = workspace.preprocessed / "splits_final.json"
    content = file.read_bytes() if file.exists() else None
    file.unlink(missing_ok=True)
    yield file
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)


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
