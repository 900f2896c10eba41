"""Which cases a pre-training draws from, and which it is validated on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_topomae.nnunet.data.preprocessed import Cases, JoinedCases, PlannedDataset, open_cases
from nnunet_topomae.nnunet.data.splits import Split, read_splits

_FOLDS, _SPLIT_SEED = 5, 12345  # nnU-Net's


@dataclass(frozen=True)
class PretrainingCases:
    """The cases of a dataset that pre-training may use, labelled or not.

    Attributes:
        dataset: the dataset that the plans were made for.
        configuration: name of the configuration in these plans.
        split: what ``splits_final.json`` says about the fold.
    """

    dataset: PlannedDataset
    configuration: str
    split: Split

    @property
    def without_labels(self) -> bool:
        """Whether the dataset has unlabelled cases only."""
        labelled = self.dataset.labelled_folder(self.configuration)
        return not labelled.is_dir() and bool(self._unlabelled)

    @property
    def _unlabelled(self) -> list[str]:
        return self.dataset.unlabelled_cases(self.configuration)

    def split_unlabelled(self, fold: int, validated_on: Collection[str] = ()) -> tuple[list[str], list[str]]:
        """Split unlabelled cases into cases to train and to validate on, by nnU-Net's rule for labelled ones.

        For datasets that have no labels. That rule splits anew whenever a case is added or deleted.

        Args:
            fold: number of the fold.
            validated_on: the validation cases of a run that goes on; those that are left of them stay.

        Raises:
            ValueError: if there is no such fold, or there are fewer cases than folds.
        """
        if fold >= _FOLDS:
            raise ValueError(
                f"{self.dataset.folder.name} has no labels and so folds 0 to {_FOLDS - 1} only, not {fold}; use one of "
                f"these, or fold all"
            )
        cases = self._unlabelled
        if kept := [case for case in cases if case in validated_on]:
            return [case for case in cases if case not in kept], kept
        if len(cases) < _FOLDS:
            raise ValueError(
                f"{self.dataset.unlabelled_folder(self.configuration)} holds {len(cases)} cases, too few for {_FOLDS} "
                f"folds; use fold all"
            )
        split = generate_crossval_split(cases, seed=_SPLIT_SEED, n_splits=_FOLDS)[fold]
        return list(split["train"]), list(split["val"])

    def training(self, own: Cases, others: Sequence[int], others_plans: str | None) -> Cases:
        """All cases to draw from: the fold's own, all that were added without labels, and every case of other datasets.

        Args:
            own: the fold's training cases, and those that the split keeps as unlabelled.
            others: IDs of the other datasets.
            others_plans: name of their plans; None: that of this dataset's plans.

        Raises:
            FileNotFoundError, ValueError: if a case is there with and without labels, an added one is of the same
                patient as a validation or test case, or for another dataset, see :meth:`PlannedDataset.open_others`.
        """
        parts: list[Cases] = [own]
        if self._unlabelled and not self.without_labels:
            self._check_distinct()
            self.split.check_added(self._unlabelled)
            parts.append(open_cases(self.dataset.unlabelled_folder(self.configuration), self._unlabelled))
        parts += self.dataset.open_others(others, others_plans, self.configuration)
        return own if len(parts) == 1 else JoinedCases(*parts)

    def _check_distinct(self) -> None:
        labelled = {*self.dataset.labelled_cases(self.configuration), *self.split.test}
        if twice := sorted(labelled.intersection(self._unlabelled)):
            raise ValueError(
                f"{twice[0]} is a labelled case and lies in {self.dataset.unlabelled_folder(self.configuration)} too; "
                f"remove it there with nnUNetv2_topomae add_unlabelled --remove {twice[0]}"
            )

    def count(self, training: Cases) -> str:
        """How many cases of which kind, for the log."""
        others = [case for case in training.identifiers if "/" in case]
        unlabelled = len({*self._unlabelled, *self.split.unlabelled}.intersection(training.identifiers))
        return (
            f"{len(training.identifiers) - unlabelled - len(others)} labelled and {unlabelled} unlabelled cases"
            f"{f' and {len(others)} of other datasets' if others else ''}"
        )


def count_images(dataset: PlannedDataset, configuration: str, training_share: float) -> int:
    """How many images of a dataset pre-training draws from: those of the split's largest fold, and all added ones.

    Args:
        dataset: a preprocessed dataset.
        configuration: name of a configuration of its plans.
        training_share: share of the labelled cases that is trained on, where there is no split yet.

    Raises:
        ValueError: see :func:`~nnunet_topomae.nnunet.data.splits.read_splits`.
    """
    splits = read_splits(dataset.folder)
    labelled = [len(split.images) for split in splits]
    labelled = labelled or [round(training_share * len(dataset.labelled_cases(configuration)))]
    return max(labelled) + len(dataset.unlabelled_cases(configuration))
