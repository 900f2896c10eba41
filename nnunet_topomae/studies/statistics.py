"""What the records of a study say: differences with their intervals and p-values, and how many labels a row saves."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, nan
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.optimize import isotonic_regression

from nnunet_topomae.studies.measures import MEASURES
from nnunet_topomae.studies.records import Record

Floats = npt.NDArray[np.float64]
Values = dict[int, dict[tuple[str, str], float]]  # of a run, by seed, by case and structure
Scores = dict[tuple[str, int], dict[int, dict[str, float]]]  # by row and number of labels, by seed, by case

LEVEL = 0.05  # of significance; intervals cover the rest
_RESAMPLES = 9999
_DIGITS = 9  # of differences after the point; further ones are errors of rounding, and would break ties


@dataclass(frozen=True)
class Comparison:
    """A row against its baseline with the same number of labels, paired over test cases, or over their patients.

    Attributes:
        row: its name.
        baseline: its name.
        labelled: number of labelled cases.
        cases: number of test cases with a structure for which the measure is defined in both rows; of their patients
            if the study names patients.
        difference: mean over cases, or patients, of row - baseline.
        low: lower end of the difference's 95 % bootstrap interval (percentiles; cases, or patients, are drawn with
            replacement).
        high: its upper end.
        t_p: p-value of the paired t-test, two-sided; nan for fewer than two cases, or where all differ by the same.
        wilcoxon_p: p-value of Wilcoxon's signed-rank test, two-sided.
        holm_p: p-value of the t-test after Holm's correction, see :func:`comparisons`.
        unit: what ``cases`` counts: test cases or patients.
        by_seed: the difference with each seed that both rows have. Where every seed has its own labelled cases, this
            says how much depends on them; the interval and the p-values do not.
    """

    row: str
    baseline: str
    labelled: int
    cases: int
    difference: float
    low: float
    high: float
    t_p: float
    wilcoxon_p: float
    holm_p: float = nan
    unit: str = "test cases"
    by_seed: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Equivalent:
    """How many labels the baseline needs to be as good as a row.

    Attributes:
        row: its name.
        labelled: number of labelled cases of the row.
        equivalent: number of labelled cases from scratch that reach the same mean; infinite if the curve from scratch
            does not reach it, 0 if the row is worse than from scratch with the fewest labels.
        low: lower end of the 95 % bootstrap interval over test cases, or patients.
        high: its upper end.
    """

    row: str
    labelled: int
    equivalent: float
    low: float
    high: float


def defined(records: Iterable[Record], measure: str) -> dict[tuple[str, int], Values]:
    """The values of a measure where it is defined, by row and number of labels."""
    values: dict = defaultdict(lambda: defaultdict(dict))
    for record in records:
        value = getattr(record.measures, measure)
        if value is not None:
            values[record.row, record.labelled][record.seed][record.case, record.structure] = value
    return values


def scores(records: Iterable[Record], measure: str) -> Scores:
    """A measure per case: the mean over those structures for which it is defined; other cases are left out."""
    return {
        run: {seed: _means((case, value) for (case, _), value in values.items()) for seed, values in seeds.items()}
        for run, seeds in defined(records, measure).items()
    }


def _means(named: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the values of each name."""
    values: dict[str, list[float]] = {}
    for name, value in named:
        values.setdefault(name, []).append(value)
    return {name: float(np.mean(each)) for name, each in values.items()}


def seed_means(records: Iterable[Record], measure: str) -> dict[tuple[str, int], list[float]]:
    """Mean of a measure over test cases for each seed, by row and number of labels."""
    return {
        run: [float(np.mean(list(cases.values()))) for _, cases in sorted(seeds.items())]
        for run, seeds in scores(records, measure).items()
    }


def case_means(records: Iterable[Record], measure: str) -> dict[tuple[str, int], dict[str, float]]:
    """Mean of a measure over seeds for each test case, by row and number of labels."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for run, seeds in scores(records, measure).items():
        cases = sorted({case for of_seed in seeds.values() for case in of_seed})
        found[run] = {case: float(np.mean([each[case] for each in seeds.values() if case in each])) for case in cases}
    return found


def paired(*runs: Values, patients: Mapping[str, str]) -> list[Floats]:
    """Scores of the test cases, or of their patients, in several runs, to be compared: (N,) each.

    Only structures of a case count for which the measure is defined in all runs, with every seed that all runs have: a
    row is not worse for having found what another one has missed. Means are over these structures and seeds, then over
    the cases of a patient.

    Args:
        runs: what is compared.
        patients: the patient of each test case; empty if every case counts by itself.
    """
    by_case = [
        _means((case, value) for values in run.values() for (case, _), value in values.items())
        for run in _in_common(*runs)
    ]
    by_patient = [_means((patients.get(case, case), score) for case, score in of_run.items()) for of_run in by_case]
    return [np.array(list(means.values())) for means in by_patient]


def _in_common(*runs: Values) -> list[Values]:
    """The values of the seeds that all runs have, and of the structures for which all of these are defined."""
    seeds = sorted(set.intersection(*map(set, runs)))
    pairs = sorted(set.intersection(*(set(run[seed]) for run in runs for seed in seeds))) if seeds else []
    return [{seed: {pair: run[seed][pair] for pair in pairs} for seed in seeds} for run in runs]


def resamples(num_cases: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Cases drawn with replacement, as often as there are cases: indices (9999, N)."""
    return np.random.default_rng(seed).integers(num_cases, size=(_RESAMPLES, num_cases))


def interval(values: Floats) -> tuple[float, float]:
    """The middle 95 % of bootstrapped values; infinite ones count as larger than all others."""
    low, high = np.percentile(values, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)], method="nearest")
    return float(low), float(high)


def compare(row: str, baseline: str, labelled: int, with_row: Floats, with_baseline: Floats) -> Comparison | None:
    """Compare paired scores (N,); None if there are none.

    Identical scores have p-values of 1. Where all cases differ by the same, which counts may do, there is no t-test.
    """
    differences = np.round(with_row - with_baseline, _DIGITS)
    if not len(differences):
        return None
    low, high = interval(differences[resamples(len(differences))].mean(axis=1))
    t_p = wilcoxon_p = 1.0
    if differences.any():
        t_p = float(stats.ttest_1samp(differences, 0).pvalue) if np.ptp(differences) else nan
        wilcoxon_p = float(stats.wilcoxon(differences).pvalue)
    mean = round(float(differences.mean()), _DIGITS) + 0.0  # and no -0.0
    return Comparison(row, baseline, labelled, len(differences), mean, low, high, t_p, wilcoxon_p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values of several tests so that the chance of any false positive stays what it is for one (Holm, 1979).

    nan stays nan and does not count as a test.

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    adjusted, largest = [nan] * len(p_values), 0.0
    order = sorted((index for index, p in enumerate(p_values) if isfinite(p)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def comparisons(
    records: Sequence[Record],
    baselines: Mapping[str, str],
    measure: str,
    patients: Mapping[str, str],
    main: str | None = None,
) -> list[Comparison]:
    """Every row against its baseline at every number of labels that both have been measured with.

    p-values of the main row, which was named before anything was measured, are corrected for its numbers of labels
    only, those of the other rows for all comparisons of these. Without a main row, all are corrected for all.

    Args:
        records: of a study.
        baselines: the baseline of each pre-trained row.
        measure: name of a field of :class:`Measures`.
        patients: see :func:`paired`.
        main: name of a row.
    """
    found, by_run = [], defined(records, measure)
    counts = sorted({labelled for _, labelled in by_run})
    for row, baseline in baselines.items():
        for labelled in counts:
            ours, theirs = by_run.get((row, labelled)), by_run.get((baseline, labelled))
            if not (ours and theirs):
                continue
            scored = paired(ours, theirs, patients=patients)
            if comparison := compare(row, baseline, labelled, *scored):
                found.append(replace(comparison, by_seed=_by_seed(ours, theirs, patients)))
    unit = "patients" if patients else "test cases"
    of_main = holm([each.t_p if each.row == main else nan for each in found])
    of_others = holm([nan if each.row == main else each.t_p for each in found])
    return [
        replace(each, holm_p=own if each.row == main else other, unit=unit)
        for each, own, other in zip(found, of_main, of_others, strict=True)
    ]


def _by_seed(run: Values, baseline: Values, patients: Mapping[str, str]) -> dict[int, float]:
    """The difference of the means of two runs with each seed that both have, over the same structures."""
    found = {}
    run, baseline = _in_common(run, baseline)
    for seed in run:
        ours, theirs = paired({seed: run[seed]}, {seed: baseline[seed]}, patients=patients)
        if len(ours):
            found[seed] = float((ours - theirs).mean())
    return found


def equivalent_labels(
    records: Sequence[Record], baselines: Mapping[str, str], patients: Mapping[str, str]
) -> list[Equivalent]:
    """For every pre-trained row, how many labels from scratch give the same Dice.

    The curve from scratch is made to rise (isotonic regression of the means over cases, or patients), and is read
    between its points on a logarithmic axis of labels; see :func:`read_curve`. Rows whose baseline was measured with
    one number of labels only have no answer. Arguments are those of :func:`comparisons`.
    """
    found, by_run = [], defined(records, "dice")
    for row, baseline in baselines.items():
        counts = sorted(labelled for name, labelled in by_run if name == baseline)
        for labelled in sorted(labelled for name, labelled in by_run if name == row):
            curve_runs = [by_run[baseline, count] for count in counts]
            with_row, *curve = paired(by_run[row, labelled], *curve_runs, patients=patients)
            if len(counts) > 1 and len(with_row):
                found.append(_equivalent(row, labelled, with_row, counts, np.array(curve)))
    return found


def _equivalent(row: str, labelled: int, with_row: Floats, counts: Sequence[int], curve: Floats) -> Equivalent:
    """Scores of the row (N,), and of the baseline (K, N) for K numbers of labels."""
    drawn = resamples(len(with_row))
    targets, curves = with_row[drawn].mean(axis=1), curve[:, drawn].mean(axis=2)
    bootstrapped = [read_curve(counts, means, target) for means, target in zip(curves.T, targets, strict=True)]
    equivalent = read_curve(counts, curve.mean(axis=1), with_row.mean())
    return Equivalent(row, labelled, equivalent, *interval(np.array(bootstrapped)))


def read_curve(counts: Sequence[int], means: Floats, target: float) -> float:
    """The smallest number of labels at which a curve reaches a target; infinite if it stays below, 0 if it is above.

    Args:
        counts: numbers of labels, rising.
        means: score with each of them, (K,).
        target: score to reach.

    Example:
        >>> read_curve([10, 40], np.array([0.6, 0.8]), 0.7)
        20.0
    """
    rising = isotonic_regression(means).x
    if target > rising[-1]:
        return float("inf")
    if target < rising[0]:
        return 0.0
    first = np.unique(rising, return_index=True)[1]  # of each level
    return float(np.round(np.exp(np.interp(target, rising[first], np.log(np.asarray(counts)[first]))), 6))


def answer(
    records: Sequence[Record],
    baselines: Mapping[str, str],
    titles: Mapping[str, str],
    patients: Mapping[str, str],
    main: str | None = None,
) -> dict[str, Any]:
    """The answer of a study as JSON: a sentence, and the figures behind it; null stands for nan and for infinite.

    Args:
        records: all that has been measured.
        baselines: the baseline of each pre-trained row.
        titles: of all rows.
        patients: see :func:`paired`.
        main: name of the row that the sentence is about; None for the last one that has been compared.
    """
    by_dice = comparisons(records, baselines, "dice", patients, main)
    labels = equivalent_labels(records, baselines, patients)
    return {
        "sentence": sentence(by_dice, labels, baselines, titles, main),
        "main": main,
        "measure": "dice",
        "comparisons": [_plain(comparison) for comparison in by_dice],
        "equivalent_labels": [_plain(each) for each in labels],
        "other_measures": {
            measure: [_plain(each) for each in comparisons(records, baselines, measure, patients, main)]
            for measure in MEASURES
            if measure != "dice"
        },
    }


def _plain(result: Comparison | Equivalent) -> dict[str, Any]:
    values = asdict(result).items()
    return {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in values}


def sentence(
    by_dice: Sequence[Comparison],
    labels: Sequence[Equivalent],
    baselines: Mapping[str, str],
    titles: Mapping[str, str],
    main: str | None = None,
) -> str:
    """The answer in a sentence, about the main row, or else about the last pre-trained row that has been compared."""
    rows = [row for row in baselines if main in (None, row) and any(each.row == row for each in by_dice)]
    if not rows:
        what = "No row has" if main is None else f"{titles[main]} has not"
        return f"{what} been measured beside its baseline yet, so there is no answer."
    of_row = [comparison for comparison in by_dice if comparison.row == rows[-1]]
    certain = [each for each in of_row if each.holm_p < LEVEL]
    gains = [each for each in certain if each.difference > 0]
    shown = [*gains, *certain, max(of_row, key=lambda each: each.difference)][0]
    title, baseline = titles[shown.row], titles[shown.baseline]
    interval = f"95 % interval {shown.low:+.3f} to {shown.high:+.3f}"
    figures = (
        f"Dice {shown.difference:+.3f}, {interval}, {_p(shown.holm_p)}, {shown.cases} {shown.unit}; better with "
        f"{sum(each > 0 for each in shown.by_seed.values())} of {len(shown.by_seed)} seeds"
    )
    with_labels = f"with {labelled_cases(shown.labelled)}"
    if not certain:
        where = ", where the difference is largest" if len(of_row) > 1 else ""
        return f"No gain of {title} over {baseline} seen {with_labels}{where} ({figures})."
    if not gains:
        return f"{with_labels.capitalize()}, {title} is worse than {baseline} ({figures})."
    gain = f"{with_labels.capitalize()}, {title} is better than {baseline} ({figures})"
    equal = [each for each in labels if (each.row, each.labelled) == (shown.row, shown.labelled)]
    return f"{gain}{_as_good_as(equal[0]) if equal else ''}."


def _as_good_as(labels: Equivalent) -> str:
    if not isfinite(labels.equivalent):
        return ", better than from scratch with the largest number of labels that was tried"
    if not labels.equivalent:  # the curve was made to rise
        return ""
    return f", as good as {labels.equivalent:.0f} labels from scratch (95 % interval {labels_interval(labels)})"


def labelled_cases(number: int) -> str:
    """A number of labelled cases in words."""
    return f"{number} labelled case{'s' * (number > 1)}"


def labels_interval(labels: Equivalent) -> str:
    """The interval of a number of labels in words."""
    low = f"{labels.low:.0f}" if labels.low else "fewer than were tried"
    return f"{low} to {f'{labels.high:.0f}' if isfinite(labels.high) else 'more than were tried'}"


def _p(value: float) -> str:
    if not isfinite(value):
        return "no p-value"
    written = p_value(value)
    return f"p {written if '<' in written else f'= {written}'} after Holm"


def p_value(value: float) -> str:
    """A p-value as people write it; a dash for nan.

    Example:
        >>> p_value(0.0049), p_value(8e-6)
        ('0.005', '< 0.001')
    """
    if not isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def seeds_so_far(seeds: Iterable[int], compared: Iterable[Comparison]) -> list[int]:
    """The seeds of a study up to the last one that anything has been compared with; none if nothing has been."""
    last = max((seed for each in compared for seed in each.by_seed), default=-1)
    return [seed for seed in seeds if seed <= last]


def signed(by_seed: Mapping[int, float], seeds: Iterable[int]) -> str:
    """Differences with their signs, in the order of the seeds; a dash for a seed that has none.

    Example:
        >>> signed({0: 0.014, 2: -0.003}, range(3))
        '+0.014 - -0.003'
    """
    return " ".join(f"{by_seed[seed]:+.3f}" if seed in by_seed else "-" for seed in seeds)
