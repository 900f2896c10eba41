"""Makes sure before a training that its cases can be read and are finite; files that were are not read again."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from nnunet_topomae.files import read_json, write_json
from nnunet_topomae.nnunet.data.preprocessed import Cases, files_of
from nnunet_topomae.nnunet.data.stream import Batches, CaseError, defect

_FILE = "checked_files.json"


class CheckedFiles:
    """Remembers in a preprocessed dataset which files were found to be sound: size and time stamp by name.

    Args:
        folder: of the preprocessed dataset.
        with_labels: whether labels and properties count, too, or images alone.
    """

    def __init__(self, folder: Path, *, with_labels: bool):
        self._file, self._with_labels = folder / _FILE, with_labels

    def unknown(self, cases: Cases) -> list[str]:
        """Names of the cases of which a file is new, or has changed."""
        known = self._read()
        return [case for case in cases.identifiers if self._is_unknown(self._stamps(cases, case), known)]

    def add(self, cases: Cases, names: Sequence[str]) -> None:
        """Remember the files of some cases.

        Raises:
            OSError: if the folder must not be written to.
        """
        new = {file: stamp for case in names for file, stamp in self._stamps(cases, case).items()}
        if new:
            write_json({**self._read(), **new}, self._file)

    def _read(self) -> dict[str, list[int]]:
        try:
            return read_json(self._file)
        except (OSError, ValueError):  # then all files are new
            return {}

    def _stamps(self, cases: Cases, case: str) -> dict[str, list[int]]:
        stats = {str(file): file.stat() for file in files_of(cases, case, with_label=self._with_labels)}
        folder = self._file.parent  # paths relative to it stay right when it is moved or copied
        return {os.path.relpath(file, folder): [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}

    @staticmethod
    def _is_unknown(stamps: Mapping[str, list[int]], known: Mapping[str, list[int]]) -> bool:
        return not stamps or any(known.get(file) != stamp for file, stamp in stamps.items())


class _Defects:
    """A stream of what is wrong with each case of a list."""

    def __init__(self, cases: Cases, names: Sequence[str], *, with_labels: bool):
        self.cases, self.names, self.with_labels = cases, names, with_labels

    def __getitem__(self, index: int) -> str | bool:
        return defect(self.cases, self.names[index], with_label=self.with_labels)

    def cases_of(self, index: int) -> list[str]:
        return [self.names[index]]


def check_finite(
    cases: Cases, names: Sequence[str], *, with_labels: bool = False, timeout: float = 300, show_progress: bool
) -> None:
    """Read some preprocessed cases once and make sure that their values are finite.

    Args:
        cases: preprocessed cases.
        names: of those to read.
        with_labels: whether labels and properties are read, too.
        timeout: seconds after which a case is given up.
        show_progress: whether terminals show a progress bar.

    Raises:
        ValueError: names the cases that hold NaN or inf, or the first one that cannot be read.
    """
    defects = Batches(_Defects(cases, names, with_labels=with_labels), range(len(names)), None, timeout=timeout)
    broken = []
    for case in tqdm(names, "Checking cases", leave=False, disable=None if show_progress else True):
        found = next(defects)
        if isinstance(found, str):
            raise CaseError(found)
        if found:
            broken.append(case)
    if broken:
        raise ValueError(
            f"NaN or inf in {len(broken)} preprocessed case(s) in {cases.source_folder}: {', '.join(broken[:10])}; "
            f"repair the images, then preprocess again"
        )
