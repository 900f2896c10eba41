"""What a study has measured: reading its files, and its tables and charts."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_topomae.files import read_json
from nnunet_topomae.reporting.charts import Chart, Style, boxes, over_labels, styles
from nnunet_topomae.reporting.page import Charts, Table

STUDY, SCORES, ANSWER = "study.json", "results.csv", "answer.json"

_VERSION = 1
_KEYS = {"row": str, "labelled": int, "seed": int, "case": str, "structure": str}
MEASURES = {
    "dice": "Dice",
    "hd95": "HD95 [mm]",
    "nsd": "surface Dice",
    "betti0_error": "error in components",
    "betti1_error": "error in loops",
    "betti2_error": "error in voids",
}
_SMALL_IS_GOOD = {"hd95", "betti0_error", "betti1_error", "betti2_error"}
_NONE = "–"


class Row(NamedTuple):
    """One of the methods that are compared.

    Attributes:
        name: in files.
        title: as people read it.
        pretrainer: its trainer of pre-training; None from scratch.
        finetuner: its trainer of fine-tuning.
        differs: its settings that other rows have otherwise, by key.
        baseline: whether the others are compared with it.
        runs: ``labelled``, ``seed``, ``plans`` and ``fold`` of each.
    """

    name: str
    title: str
    pretrainer: str | None
    finetuner: str
    differs: Mapping[str, Any]
    baseline: bool
    runs: Sequence[Mapping[str, Any]]


class Score(NamedTuple):
    """What was measured on a structure of a case; measures that are not defined are missing."""

    row: str
    labelled: int
    seed: int
    case: str
    structure: str
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """A study, as far as it has come.

    Attributes:
        folder: of the study.
        dataset: its name.
        configuration: of the plans.
        label_counts: numbers of labelled cases.
        seeds: of the runs.
        rows: by name.
        scores: of all test cases; none before it has been evaluated.
        answer: the content of answer.json; empty before it has been evaluated.
    """

    folder: Path
    dataset: str
    configuration: str
    label_counts: Sequence[int]
    seeds: Sequence[int]
    rows: Mapping[str, Row]
    scores: Sequence[Score]
    answer: Mapping[str, Any]

    @property
    def measure(self) -> str:
        """The measure that rows are compared by."""
        return self.answer.get("measure", "dice")

    @property
    def styles(self) -> dict[str, Style]:
        """How each row is drawn."""
        drawn = styles(list(self.rows))
        return {name: drawn[name]._replace(label=row.title) for name, row in self.rows.items()}

    @property
    def cases(self) -> list[str]:
        """All test cases."""
        return sorted({score.case for score in self.scores})

    def per_seed(self, measure: str) -> dict[tuple[str, int], list[float]]:
        """Means over cases, of means over structures, by row and number of labelled cases; one a seed."""
        groups: dict[tuple[str, int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for score in self._with(measure):
            groups[score.row, score.labelled, score.seed][score.case].append(score.measures[measure])
        found = defaultdict(list)
        for (row, labelled, _), cases in sorted(groups.items()):
            found[row, labelled].append(float(np.mean([np.mean(values) for values in cases.values()])))
        return dict(found)

    def per_case(self, measure: str) -> dict[tuple[str, int], dict[str, float]]:
        """Means over structures and seeds of every case, by row and number of labelled cases."""
        groups: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for score in self._with(measure):
            groups[score.row, score.labelled][score.case].append(score.measures[measure])
        return {key: {case: float(np.mean(values)) for case, values in cases.items()} for key, cases in groups.items()}

    def _with(self, measure: str) -> Iterable[Score]:
        return (score for score in self.scores if measure in score.measures)


def read_study(folder: Path) -> Study:
    """Read study.json and, where they are there, results.csv and answer.json.

    Raises:
        FileNotFoundError, ValueError: if a file is missing, broken, of another version, or does not belong to the
            others; names the file and what is wrong in it.
    """
    file = folder / STUDY
    content = read_json(file)
    if content.get("version") != _VERSION:
        raise ValueError(f"{file} has version {content.get('version')!r}, but this command reads version {_VERSION}")
    try:
        rows = {row["name"]: Row(*(row[field] for field in Row._fields)) for row in content["rows"]}
        study = Study(
            folder,
            content["dataset"],
            content["configuration"],
            content["label_counts"],
            content["seeds"],
            rows,
            (),
            {},
        )
        expected = {(row.name, run["labelled"], run["seed"]) for row in rows.values() for run in row.runs}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is incomplete: {type(error).__name__} {error}; write it again with study new"
        ) from error
    scores = _read_scores(folder / SCORES, expected) if (folder / SCORES).is_file() else []
    answer = _read_answer(folder / ANSWER, rows) if (folder / ANSWER).is_file() else {}
    return replace(study, scores=scores, answer=answer)


def _read_scores(file: Path, expected: set[tuple[str, int, int]]) -> list[Score]:
    """The lines of results.csv, which must be of the runs of the study."""
    scores: dict[tuple, Score] = {}
    with file.open(newline="") as stream:
        lines = csv.DictReader(stream, strict=True)
        if lines.fieldnames != [*_KEYS, *MEASURES]:
            raise ValueError(f"{file} must have the columns {','.join((*_KEYS, *MEASURES))}, got {lines.fieldnames}")
        for line in lines:
            where = f"{file}, line {lines.line_num}"
            score = _score(line, where)
            if score[:3] not in expected:
                raise ValueError(
                    f"{where}: {STUDY} has no run of row {score.row!r} with {score.labelled} labelled cases and seed "
                    f"{score.seed}; the results are of another study, evaluate this one again"
                )
            if scores.setdefault(score[:5], score) is not score:
                raise ValueError(f"{where}: {score.structure} of {score.case} has been measured twice in this run")
    return list(scores.values())


def _score(line: Mapping[str, Any], where: str) -> Score:
    try:
        keys: list[Any] = [kind(line[key]) for key, kind in _KEYS.items()]
        measures = {name: float(text) for name in MEASURES if (text := line[name]) != ""}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is broken: {error}; evaluate the study again") from error
    if broken := [name for name, value in measures.items() if not math.isfinite(value)]:
        raise ValueError(f"{where} is broken: {broken[0]} is {line[broken[0]]}; evaluate the study again")
    row, labelled, seed, case, structure = keys
    return Score(row, labelled, seed, case, structure, measures)


def _read_answer(file: Path, rows: Mapping[str, Row]) -> dict[str, Any]:
    """The content of answer.json."""
    answer = read_json(file)
    try:
        said = answer["sentence"], answer["measure"]
        for each in answer["comparisons"]:
            rows[each["row"]], rows[each["baseline"]]
            [float(each[key]) for key in ("labelled", "difference")]
            [float(each[key]) for key in ("low", "high") if each[key] is not None]
            _ = each["t_p"], each["wilcoxon_p"], each["holm_p"]
        for each in answer["equivalent_labels"]:
            _ = rows[each["row"]], each["labelled"], each["equivalent"], each["low"], each["high"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is broken: {type(error).__name__} {error}; evaluate the study again") from error
    if not isinstance(said[0], str) or said[1] not in MEASURES:
        raise ValueError(f"{file} must have a sentence and one of the measures {', '.join(MEASURES)}, got {said}")
    return answer


def main_table(study: Study) -> Table:
    """Mean, deviation over seeds, difference from the baseline, interval and p-values: a line a row and count."""
    compared = {(each["row"], each["labelled"]): each for each in study.answer.get("comparisons", ())}
    name = MEASURES[study.measure]
    rows = []
    for (row, labelled), seeds in _in_order(study, study.per_seed(study.measure)):
        each = compared.get((row, labelled))
        rows.append([study.rows[row].title, str(labelled), *_mean_and_deviation(seeds), *_comparison(each)])
    return Table(
        f"{name} of the test cases",
        ["row", "labelled cases", "seeds", f"mean {name}", "sd over seeds", "difference from the baseline",
         "95 % interval", "p, t-test", "p, Wilcoxon", "p, Holm"],
        rows,
        "Mean over cases of the mean over structures. The difference is paired over cases, with seeds averaged per "
        "case. Holm: corrected for the number of comparisons.",
    )  # fmt: skip


def _mean_and_deviation(seeds: Sequence[float]) -> list[str]:
    deviation = f"{np.std(seeds, ddof=1):.3f}" if len(seeds) > 1 else _NONE
    return [str(len(seeds)), f"{np.mean(seeds):.3f}", deviation]


def _comparison(each: Mapping[str, Any] | None) -> list[str]:
    if each is None:
        return [_NONE] * 5
    ends = each["low"], each["high"]
    interval = _NONE if None in ends else f"{ends[0]:+.3f} to {ends[1]:+.3f}"
    return [f"{each['difference']:+.3f}", interval, *(_p(each[k]) for k in ("t_p", "wilcoxon_p", "holm_p"))]


def _p(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return _NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def measures_table(study: Study) -> Table:
    """Mean of every measure: a line a row and number of labelled cases."""
    names = [name for name in MEASURES if any(name in score.measures for score in study.scores)]
    means = {name: study.per_seed(name) for name in names}
    keys = {key: None for name in names for key in means[name]}
    rows = [
        [study.rows[row].title, str(labelled),
         *(f"{np.mean(means[name][row, labelled]):.3g}" if (row, labelled) in means[name] else _NONE for name in names)]
        for (row, labelled), _ in _in_order(study, keys)
    ]  # fmt: skip
    return Table(
        "All measures",
        ["row", "labelled cases", *(MEASURES[name] for name in names)],
        rows,
        "Means over seeds, cases and structures for which a measure is defined. Large Dice and surface Dice are good, "
        "small distances and errors are good. Errors in components, loops and voids are those of the Betti numbers.",
    )


def structures_table(study: Study) -> Table:
    """Mean of the measure that rows are compared by, for every structure on its own."""
    groups = defaultdict(list)
    for score in study.scores:
        if study.measure in score.measures:
            groups[score.row, score.labelled, score.structure].append(score.measures[study.measure])
    structures = sorted({structure for _, _, structure in groups})
    keys = {(row, labelled): None for row, labelled, _ in groups}
    rows = [
        [study.rows[row].title, str(labelled),
         *(f"{np.mean(groups[row, labelled, s]):.3f}" if (row, labelled, s) in groups else _NONE for s in structures)]
        for (row, labelled), _ in _in_order(study, keys)
    ]  # fmt: skip
    return Table(f"{MEASURES[study.measure]} by structure", ["row", "labelled cases", *structures], rows)


def _in_order(study: Study, values: Mapping[tuple[str, int], Any]) -> list[tuple[tuple[str, int], Any]]:
    """Items in the order of the study's rows, then of the numbers of labelled cases."""
    places = list(study.rows)
    return sorted(values.items(), key=lambda item: (places.index(item[0][0]), item[0][1]))


def equivalent_labels(study: Study) -> list[str]:
    """How many labels from scratch each row is worth, as sentences."""
    return [
        f"{study.rows[each['row']].title} with {each['labelled']} labelled cases does as well as the baseline with "
        f"about {each['equivalent']:.3g}{_interval(each)}."
        for each in study.answer.get("equivalent_labels", ())
        if each["equivalent"] is not None
    ]


def _interval(each: Mapping[str, Any]) -> str:
    if each["low"] is None or each["high"] is None:
        return ""
    return f" (95 % interval {each['low']:.3g} to {each['high']:.3g})"


def curves(study: Study) -> Charts:
    """Means over the number of labelled cases: of the measure that rows are compared by, and of its companions."""
    names = dict.fromkeys((study.measure, "nsd", "hd95"))
    charts = [chart for name in names if (chart := _curve(study, name))]
    return Charts("Over the number of labelled cases", charts, list(study.styles.values()), "Small dots are seeds.")


def _curve(study: Study, measure: str) -> Chart | None:
    points: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for (row, labelled), seeds in study.per_seed(measure).items():
        points[row][labelled] = seeds
    drawn = study.styles
    return (
        over_labels(MEASURES[measure], {drawn[row]: points[row] for row in study.rows if row in points})
        if points
        else None
    )


def box_plots(study: Study) -> Charts:
    """The test cases of every row: a chart for each number of labelled cases."""
    values, drawn = study.per_case(study.measure), study.styles
    charts = [
        boxes(
            f"{labelled} labelled cases",
            MEASURES[study.measure],
            {drawn[row]: list(values[row, labelled].values()) for row in study.rows if (row, labelled) in values},
        )
        for labelled in sorted({labelled for _, labelled in values})
    ]
    return Charts("Over the test cases", charts, note="A dot is a test case, its seeds averaged.")


def settings_table(study: Study) -> Table:
    """Settings side by side, of which at least one row has another value."""
    rows = study.rows.values()
    lines = {
        "pre-trained by": [row.pretrainer or "not pre-trained" for row in rows],
        "fine-tuned by": [row.finetuner for row in rows],
    }
    for key in dict.fromkeys(key for row in rows for key in row.differs):
        lines[key] = [plain(row.differs[key]) if key in row.differs else _NONE for row in rows]
    return Table("Settings that differ", ["setting", *(row.title for row in rows)],
                 [[key, *values] for key, values in lines.items() if len(set(values)) > 1])  # fmt: skip


def plain(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) if value else "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items()) if value else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


class Shown(NamedTuple):
    """Test cases to show.

    Attributes:
        cases: names by what they are: best, median, worst.
        labelled: number of labelled cases of the runs that are shown.
        rows: whose predictions are shown, the baselines first.
        seed: of these runs.
        values: the measure by row and case.
    """

    cases: Mapping[str, str]
    labelled: int
    rows: Sequence[str]
    seed: int
    values: Mapping[tuple[str, str], float]


def chosen_cases(study: Study) -> Shown | None:
    """The best, median and worst case of the best row with the fewest labelled cases, where pre-training matters most.

    None if there are no results.
    """
    means, sign = study.per_case(study.measure), -1 if study.measure in _SMALL_IS_GOOD else 1
    if not means:
        return None
    labelled = min(labelled for _, labelled in means)
    there = {row: means[row, labelled] for row in study.rows if (row, labelled) in means}
    others = [row for row in there if not study.rows[row].baseline] or list(there)
    best = max(others, key=lambda row: sign * float(np.mean(list(there[row].values()))))
    ranked = sorted(there[best], key=lambda case: sign * there[best][case])
    kinds = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    rows = [*(row for row in there if study.rows[row].baseline and row != best), best]
    seed = min(score.seed for score in study.scores if (score.row, score.labelled) == (best, labelled))
    return Shown(kinds, labelled, rows, seed, {(row, case): v for row in rows for case, v in there[row].items()})
