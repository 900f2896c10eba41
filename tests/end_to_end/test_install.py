"""The package installed as a wheel and as an editable, each in its own environment."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FIND_TRAINER = (
    "import os, subprocess;"
    "os.environ['nnUNet_extTrainer'] = subprocess.check_output([{script!r}, 'trainers'], text=True).strip();"
    "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find;"
    "print([find(n).__name__ for n in ('TopoMAEPretrainer', 'FusedFinetuneTrainer')]);"
    "from nnunet_topomae.commands.cli import find_planner;"
    "print(find_planner('TopoMAEPlanner').__name__)"
)


def _run(*arguments, **kwargs):
    return subprocess.run(list(map(str, arguments)), check=True, capture_output=True, text=True, **kwargs).stdout


@pytest.mark.parametrize("mode", ["wheel", "editable"])
def test_installed_package_is_found_by_nnunet(tmp_path, mode):
    source = tmp_path / "source"
    tracked = shutil.ignore_patterns(".git", "*.egg-info", "build", "__pycache__", ".*cache", ".hypothesis")
    shutil.copytree(REPOSITORY, source, ignore=tracked)
    environment = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    dependencies = tmp_path / "dependencies"  # all that is installed here, less the package itself
    dependencies.mkdir()
    for entry in (
        entry for folder in sys.path if Path(folder).name == "site-packages" for entry in Path(folder).iterdir()
    ):
        link = dependencies / entry.name
        if "nnunet_topomae" not in entry.name and not link.is_symlink():
            link.symlink_to(entry)
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    target = [source] if mode == "wheel" else ["-e", source]
    _run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", *target)
    script = environment / "bin" / "nnUNetv2_topomae"
    folder = Path(_run(script, "trainers", cwd=tmp_path).strip())
    assert folder == (packages / "nnunet_topomae" / "trainers" if mode == "wheel" else source / "trainers")
    output = _run(python, "-c", FIND_TRAINER.format(script=str(script)), cwd=tmp_path)
    assert output.splitlines()[-2:] == ["['TopoMAEPretrainer', 'FusedFinetuneTrainer']", "TopoMAEPlanner"]
