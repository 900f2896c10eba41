"""The picture of the rooms has all of them, and imports go down in it."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "nnunet_topomae"
ROOMS = {folder.name: folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}
ROOMS |= {name: REPOSITORY / name for name in ("trainers", "planners")}


def _heights() -> dict[str, int]:
    """How far below the top of the picture each room stands."""
    picture = (REPOSITORY / "docs" / "pictures" / "rooms.svg").read_text()
    found = re.findall(r'<text x="\d+" y="(\d+)"[^>]* font-weight="bold">(\w+)/</text>', picture)
    return {name: int(height) for height, name in found}


def _imported(folder: Path) -> set[str]:
    """The other rooms that files of a room import from."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nnunet_topomae"):
                names.add(node.module.partition(".")[2].partition(".")[0])
    return names & ROOMS.keys() - {folder.name}


def test_imports_go_down():
    heights = _heights()
    assert ROOMS.keys() <= heights.keys()
    imports = {name: _imported(folder) for name, folder in ROOMS.items()}
    assert "settings" in imports["methods"]
    wrong = [(name, other) for name, others in imports.items() for other in others if heights[other] <= heights[name]]
    of_one = {("commands", "planners"), ("commands", "trainers")}  # the demo names a planner, train_matcher a trainer
    assert set(wrong) <= of_one
