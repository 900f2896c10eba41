"""What a study has come to, and what it has found, as tables of text."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from nnunet_topomae.studies.definition import Row, Run, Study
from nnunet_topomae.studies.measures import MEASURES
from nnunet_topomae.studies.records import Record
from nnunet_topomae.studies.statistics import Comparison, comparisons, p_value, seed_means, seeds_so_far, signed
from nnunet_topomae.studies.steps import FINETUNE, PREDICT, PRETRAIN, Step, Steps

_WAITING, _FAILED = "-", "failed"
_STATES = {PRETRAIN: "pre-trained", FINETUNE: "fine-tuned", PREDICT: "predicted"}  # once that stage is done


def progress_table(steps: Steps, failed: Mapping[str, Step]) -> str:
    """How far each run has come: a line for each row and number of labels, a column for each seed."""

    def state(row: Row, run: Run) -> str:
        done = [step.stage for step in steps.of_run(row, run) if step.is_done]
        if PREDICT in done or row.name not in failed:
            return _STATES[done[-1]] if done else _WAITING
        return _FAILED

    study = steps.study
    return _table(
        ["row", "labelled", *(f"seed {seed}" for seed in study.seeds)],
        ([row.name, f"{labelled}", *states] for row, labelled, states in _by_seed(study, state)),
    )


def _by_seed(study: Study, state: Callable[[Row, Run], str]) -> Iterable[tuple[Row, int, list[str]]]:
    for row in study.rows:
        for labelled in study.label_counts:
            runs = {run.seed: run for run in row.runs if run.labelled == labelled}
            yield row, labelled, [state(row, runs[seed]) if seed in runs else "" for seed in study.seeds]


def dice_comparisons(study: Study, records: Sequence[Record]) -> list[Comparison]:
    """Every pre-trained row against its baseline by Dice, with the study's correction for several comparisons."""
    return comparisons(records, study.baselines, "dice", study.patients, study.main)


def results_table(study: Study, records: Sequence[Record]) -> str:
    """Dice, HD95 and surface Dice of every row, and how its Dice differs from that of its baseline."""
    by_measure = {measure: seed_means(records, measure) for measure in ("dice", "hd95", "nsd")}
    all_compared = dice_comparisons(study, records)
    compared = {(each.row, each.labelled): each for each in all_compared}
    of_seeds = seeds_so_far(study.seeds, all_compared)
    lines = []
    for row in study.rows:
        for labelled in study.label_counts:
            if not (seeds := by_measure["dice"].get((row.name, labelled))):
                continue
            found = compared.get((row.name, labelled))
            against = (
                [
                    f"{found.difference:+.3f}",
                    f"{found.low:+.3f} to {found.high:+.3f}",
                    p_value(found.holm_p),
                    signed(found.by_seed, of_seeds),
                ]
                if found
                else [""] * 4
            )
            measured = [_mean_and_deviation(of_it.get((row.name, labelled), [])) for of_it in by_measure.values()]
            lines.append([row.title, f"{labelled}", f"{len(seeds)}", *measured, *against])
    nsd = f"NSD ({study.nsd_tolerance:g} mm)"
    headings = ["row", "labelled", "seeds", "Dice", "HD95, mm", nsd]
    return _table([*headings, "gain", "95 % interval", "p (Holm)", "gain by seed"], lines)


def comparison_table(study: Study, records: Sequence[Record], row: str, other: str) -> str:
    """How a row differs from another one in every measure, as text."""
    headings, *lines = compared_by_measure(study, records, row, other)
    return _table(headings, lines)


def compared_by_measure(study: Study, records: Sequence[Record], row: str, other: str) -> list[list[str]]:
    """How a row differs from another one: headings, and a line for each measure and number of labels.

    p-values are those of single tests.
    """
    unit = "patients" if study.patients else "cases"
    headings = ["measure", "labelled", "difference", "95 % interval", "p, t-test", "p, Wilcoxon", unit]
    compared = [
        (measure, name, each)
        for measure, name in MEASURES.items()
        for each in comparisons(records, {row: other}, measure, study.patients)
    ]
    of_seeds = seeds_so_far(study.seeds, (each for *_, each in compared))
    lines = [
        [
            f"{name} ({study.nsd_tolerance:g} mm)" if measure == "nsd" else name,
            f"{each.labelled}",
            f"{each.difference:+.3f}",
            f"{each.low:+.3f} to {each.high:+.3f}",
            *map(p_value, (each.t_p, each.wilcoxon_p)),
            f"{each.cases}",
            signed(each.by_seed, of_seeds),
        ]
        for measure, name, each in compared
    ]
    return [[*headings, "by seed"], *lines]


def _mean_and_deviation(seeds: Sequence[float]) -> str:
    """Mean over seeds, and the standard deviation if there are several."""
    if not seeds:
        return "-"
    deviation = f" ± {np.std(seeds, ddof=1):.3f}" if len(seeds) > 1 else ""
    return f"{np.mean(seeds):.3f}{deviation}"


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first one to the left."""
    everything = [list(headings), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in everything
    )
