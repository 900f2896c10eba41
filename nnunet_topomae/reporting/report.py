"""The report of a pre-training: pictures and figures of every validation case."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_topomae.files import write_json
from nnunet_topomae.reporting.figures import Diagram, Geometry, save_columns, save_diagrams
from nnunet_topomae.reporting.metrics import mean_of, with_skills

_PICTURED_CASES = 4


@dataclass(frozen=True)
class CaseReport:
    """What a method shows of one case.

    Attributes:
        columns: volumes (C, D, H, W) by the heading of their column; the first sets the grey scale, and NaN is drawn
            in blue.
        metrics: figures by branch and name; None where a figure is not defined.
        diagrams: persistence diagrams (N, 2) of components, loops and voids, by the heading of what they are of.
    """

    columns: Mapping[str, npt.NDArray[np.float32]]
    metrics: Mapping[str, Mapping[str, float | None]]
    diagrams: Mapping[str, Sequence[Diagram]] = field(default_factory=dict)


def save_report(
    reports: Iterable[tuple[str, CaseReport]], folder: Path, geometry: Geometry, yardstick: str = ""
) -> dict[str, Any]:
    """Write ``reconstructions.png`` and ``persistence.png`` of the first cases and ``summary.json`` of all.

    There are no pictures of what a method does not show.

    Args:
        reports: names of cases and what the method shows of each; consumed one by one.
        folder: where the files are written.
        geometry: how the axes of the volumes lie in the body.
        yardstick: the row of the metrics that the skill of all others refers to; see :func:`with_skills`.

    Returns:
        The content of ``summary.json``, which is ``mean`` by branch and metric, and ``metric_per_case``.

    Raises:
        ValueError: if there is no case.
    """
    records: list[dict[str, Any]] = []
    pictured: dict[str, Mapping[str, npt.NDArray[np.float32]]] = {}
    diagrams: dict[str, Mapping[str, Sequence[Diagram]]] = {}
    for case, report in reports:
        records.append({"case": case, "metrics": _plain(report.metrics)})
        if len(pictured) < _PICTURED_CASES and report.columns:
            pictured[case] = report.columns
        if len(diagrams) < _PICTURED_CASES and report.diagrams:
            diagrams[case] = report.diagrams
    if not records:
        raise ValueError("there is no case to report on")
    if pictured:
        save_columns(pictured, geometry, folder / "reconstructions.png")
    if diagrams:
        save_diagrams(diagrams, folder / "persistence.png")
    branches = dict.fromkeys(chain.from_iterable(record["metrics"] for record in records))
    means = {branch: mean_of([record["metrics"].get(branch, {}) for record in records]) for branch in branches}
    per_case = [{**record, "metrics": with_skills(record["metrics"], yardstick)} for record in records]
    summary = {"mean": with_skills(means, yardstick), "metric_per_case": per_case}
    write_json(summary, folder / "summary.json")
    return summary


def _plain(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """The same with Python's own numbers, whatever kind of number a method gives."""
    return {b: {n: None if f is None else float(f) for n, f in figures.items()} for b, figures in metrics.items()}


def metrics_table(means: Mapping[str, Mapping[str, float | None]], headings: Mapping[str, str]) -> list[str]:
    """Lines of an aligned table: a row per branch, a column per metric, ``-`` where there is no value.

    Args:
        means: by branch and metric.
        headings: names of the branches as people read them; a branch that is not among them is shown by its own.
    """
    names = list(dict.fromkeys(chain.from_iterable(means.values())))
    rows = [["", *names]]
    for branch, values in means.items():
        figures = (values.get(name) for name in names)
        rows.append([headings.get(branch, branch), *("-" if f is None else f"{f:.4g}" for f in figures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
