"""What a study has measured, as tables and charts for a page (see ``reporting/page.py``)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nnunet_topomae.reporting.charts import Chart, Style, boxes, over_labels, styles
from nnunet_topomae.reporting.page import Charts, Table, plain
from nnunet_topomae.studies.definition import Row, Study
from nnunet_topomae.studies.measures import MEASURES
from nnunet_topomae.studies.records import Record
from nnunet_topomae.studies.statistics import (
    Comparison,
    Equivalent,
    case_means,
    labelled_cases,
    labels_interval,
    p_value,
    seed_means,
    seeds_so_far,
)

_MAIN = "dice"  # which rows are compared by
_NONE = "–"


def styles_of(study: Study) -> dict[str, Style]:
    """How each row is drawn, by its name."""
    drawn = styles([row.name for row in study.rows])
    return {row.name: drawn[row.name]._replace(label=row.title) for row in study.rows}


def main_table(study: Study, records: Sequence[Record], compared: Iterable[Comparison]) -> Table:
    """Mean Dice, deviation over seeds, and the comparison with the row from scratch: a line a row and count."""
    found = {(each.row, each.labelled): each for each in compared}
    name, means = MEASURES[_MAIN], seed_means(records, _MAIN)
    rows = [
        [row.title, str(labelled), *_mean_and_deviation(means[row.name, labelled]),
         *_comparison(study, found.get((row.name, labelled)))]
        for row, labelled in _in_order(study, means)
    ]  # fmt: skip
    return Table(
        f"{name} of the test cases",
        ["row", "labelled cases", "seeds", f"mean {name}", "sd over seeds", "compared with", "difference",
         "95 % interval", "p, t-test", "p, Wilcoxon", "p, Holm"],
        rows,
        f"Mean over cases of the mean over structures. {_pairing(study)} {_correction(study)}"
        f"{_missing(study, records)}",
    )  # fmt: skip


def _correction(study: Study) -> str:
    """What p-values are corrected for, as a sentence."""
    if study.main is None:
        return "Holm: corrected for the number of comparisons that have been made."
    return (
        f"Holm: {study.titles[study.main]}, which the study is made for, is corrected for its own numbers of labelled "
        f"cases, the other rows for all comparisons of these that have been made."
    )


def _missing(study: Study, records: Iterable[Record]) -> str:
    """What a study that has not ended lacks, as a sentence."""
    there = {(record.row, record.labelled, record.seed) for record in records}
    runs = {(row.name, run.labelled, run.seed) for row, run in study.in_order()}
    missing = len(runs - there)
    return f" {missing} of {len(runs)} runs have not been measured yet." if missing else ""


def seeds_table(study: Study, compared: Sequence[Comparison]) -> Table:
    """The difference to the row from scratch with every seed: a line a row and number of labelled cases."""
    seeds = seeds_so_far(study.seeds, compared)
    rows = [
        [
            study.titles[each.row],
            str(each.labelled),
            *(f"{each.by_seed[seed]:+.3f}" if seed in each.by_seed else _NONE for seed in seeds),
        ]
        for each in compared
    ]
    header = ["row", "labelled cases", *(f"seed {seed}" for seed in seeds)]
    return Table(f"Difference in {MEASURES[_MAIN]} by seed", header, rows)


def _pairing(study: Study) -> str:
    """What is paired in comparisons, as a sentence."""
    if not (patients := study.patients):
        return "The difference is paired over cases, with seeds averaged per case."
    return (
        f"The difference is paired over {len(set(patients.values()))} patients, with seeds and cases averaged per "
        f"patient."
    )


def _mean_and_deviation(seeds: Sequence[float]) -> list[str]:
    deviation = f"{np.std(seeds, ddof=1):.3f}" if len(seeds) > 1 else _NONE
    return [str(len(seeds)), f"{np.mean(seeds):.3f}", deviation]


def _comparison(study: Study, each: Comparison | None) -> list[str]:
    if each is None:
        return [_NONE] * 6
    interval = f"{each.low:+.3f} to {each.high:+.3f}"
    return [
        study.titles[each.baseline],
        f"{each.difference:+.3f}",
        interval,
        *map(p_value, (each.t_p, each.wilcoxon_p, each.holm_p)),
    ]


def measures_table(study: Study, records: Sequence[Record]) -> Table:
    """Mean of every measure: a line a row and number of labelled cases."""
    means = {name: found for name in MEASURES if (found := seed_means(records, name))}
    return Table(
        "All measures",
        ["row", "labelled cases", *(MEASURES[name] for name in means)],
        _mean_rows(study, list(means.values())),
        "Means over seeds, cases and structures for which a measure is defined. Large Dice and surface Dice are good, "
        "small distances and errors are good. Errors in components, loops and voids are those of the Betti numbers.",
    )


def structures_table(study: Study, records: Sequence[Record]) -> Table:
    """Mean Dice of every structure on its own."""
    by_structure = {
        structure: seed_means([record for record in records if record.structure == structure], _MAIN)
        for structure in sorted({record.structure for record in records})
    }
    rows = _mean_rows(study, list(by_structure.values()))
    return Table(f"{MEASURES[_MAIN]} by structure", ["row", "labelled cases", *by_structure], rows)


def _mean_rows(study: Study, columns: Sequence[Mapping[tuple[str, int], Sequence[float]]]) -> list[list[str]]:
    """Means of the seeds' values in every column, by name of the row and number of labelled cases."""
    return [
        [
            row.title,
            str(labelled),
            *(
                f"{np.mean(column[row.name, labelled]):.3f}" if (row.name, labelled) in column else _NONE
                for column in columns
            ),
        ]
        for row, labelled in _in_order(study, {key for column in columns for key in column})
    ]


def _in_order(study: Study, keys: Iterable[tuple[str, int]]) -> list[tuple[Row, int]]:
    """Rows and numbers of labelled cases in the order of the study's rows, then of the numbers."""
    there = set(keys)
    return [(row, n) for row in study.rows for n in sorted(study.label_counts) if (row.name, n) in there]


def labels_saved(study: Study, equivalents: Iterable[Equivalent]) -> list[str]:
    """How many labels from scratch each row is worth, as sentences; none where the curve does not pass its Dice."""
    return [
        f"{study.titles[each.row]} with {labelled_cases(each.labelled)} does as well as {_baseline(study, each.row)}, "
        f"with about {each.equivalent:.0f} (95 % interval {labels_interval(each)})."
        for each in equivalents
        if each.equivalent and math.isfinite(each.equivalent)
    ]


def _baseline(study: Study, row: str) -> str:
    return study.titles[study.baselines[row]]


def curves(study: Study, records: Sequence[Record]) -> Charts:
    """Dice, surface Dice and HD95 over the number of labelled cases."""
    charts = [chart for name in (_MAIN, "nsd", "hd95") if (chart := _curve(study, records, name))]
    there = {record.row for record in records}
    legend = [style for row, style in styles_of(study).items() if row in there]
    return Charts("Over the number of labelled cases", charts, legend, "Small dots are single seeds.")


def _curve(study: Study, records: Sequence[Record], measure: str) -> Chart | None:
    points: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for (row, labelled), seeds in seed_means(records, measure).items():
        points[row][labelled] = seeds
    drawn = {style: points[row] for row, style in styles_of(study).items() if row in points}
    return over_labels(MEASURES[measure], drawn) if drawn else None


def box_plots(study: Study, records: Sequence[Record]) -> Charts:
    """The test cases of every row: a chart for each number of labelled cases."""
    values, drawn = case_means(records, _MAIN), styles_of(study)
    charts = [
        boxes(
            labelled_cases(labelled),
            MEASURES[_MAIN],
            {style: list(values[row, labelled].values()) for row, style in drawn.items() if (row, labelled) in values},
        )
        for labelled in sorted({labelled for _, labelled in values})
    ]
    return Charts(
        "Over the test cases",
        charts,
        note="A dot is a test case, its seeds averaged. The line in a box is the median, the box holds the middle half "
        "of the cases, and its whiskers reach to cases within 1.5 times its length.",
    )


def settings_table(study: Study) -> Table:
    """Settings side by side, of which at least one row has another value."""
    lines = {
        "pre-trained by": [row.pretrainer or "not pre-trained" for row in study.rows],
        "fine-tuned by": [row.finetuner for row in study.rows],
    }
    for key in dict.fromkeys(key for row in study.rows for key in row.differs):
        lines[key] = [plain(row.differs[key]) if key in row.differs else _NONE for row in study.rows]
    return Table("Settings that differ", ["setting", *(row.title for row in study.rows)],
                 [[key, *values] for key, values in lines.items() if len(set(values)) > 1])  # fmt: skip


class Shown(NamedTuple):
    """Test cases to show.

    Attributes:
        cases: names by what they are: best, median, worst.
        labelled: number of labelled cases of the runs that are shown.
        rows: whose predictions are shown, the baselines first.
        seed: of these runs, the smallest that has been measured of all of them.
        dice: by row and case.
    """

    cases: Mapping[str, str]
    labelled: int
    rows: Sequence[Row]
    seed: int
    dice: Mapping[tuple[str, str], float]


def chosen_cases(study: Study, records: Sequence[Record]) -> Shown | None:
    """The best, median and worst case of the best row with the fewest labelled cases, where pre-training matters most.

    The baselines are shown beside it if all of them have been measured with a seed that it has. None if there are no
    results.
    """
    means = case_means(records, _MAIN)
    if not means:
        return None
    labelled = min(labelled for _, labelled in means)
    there = {row.name: row for row in study.rows if (row.name, labelled) in means}
    others = [row for row in there.values() if not row.baseline] or list(there.values())
    best = max(others, key=lambda row: float(np.mean(list(means[row.name, labelled].values()))))
    of_best = means[best.name, labelled]
    ranked = sorted(of_best, key=lambda case: of_best[case])
    kinds = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    rows = [*(row for row in there.values() if row.baseline and row != best), best]
    seeds = [_seeds(records, row, labelled) for row in rows]
    if not (shared := set.intersection(*seeds)):
        rows, shared = [best], seeds[-1]
    dice = {(row.name, case): value for row in rows for case, value in means[row.name, labelled].items()}
    return Shown(kinds, labelled, rows, min(shared), dice)


def _seeds(records: Iterable[Record], row: Row, labelled: int) -> set[int]:
    return {record.seed for record in records if (record.row, record.labelled) == (row.name, labelled)}
