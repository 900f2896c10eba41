import re

import pytest

from console import Site


@pytest.mark.slow
def test_demo_prints_dice_of_both_and_where_the_pictures_are(tmp_path):
    site = Site(tmp_path, with_trainers=False)
    output = site.run("nnUNetv2_topomae", "demo", "--keep", tmp_path / "demo")
    for structure in ("solid_organ", "hollow_organ", "tube", "tree"):
        assert re.search(rf"{structure} +[01]\.\d+ +[01]\.\d+", output)
    pictures = re.findall(r"^ +(/.*\.png)$", output, re.MULTILINE)
    assert len(pictures) == 3
    refused = site.run("nnUNetv2_topomae", "demo", "--keep", tmp_path / "demo", status=2)
    assert "is not empty; name a new folder" in refused
