"""Epochs of pre-training that follow the images: how many the planner would plan for those that there are now."""

from dataclasses import fields
from pathlib import Path

from nnunet_topomae.files import read_json, write_json
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.data.pretraining_cases import count_images
from nnunet_topomae.nnunet.planning.planner import PretrainingPlanner
from nnunet_topomae.nnunet.planning.plans import PRETRAINING
from nnunet_topomae.settings import StageConfig, read_block

_SCHEDULE = ("num_epochs", "warmup_epochs")


def follow_images(
    dataset: PlannedDataset, configuration: str, planner: type[PretrainingPlanner], plans_file: Path, *, update: bool
) -> str:
    """Compare the planned number of pre-training epochs with the one for all images, and write the latter if asked.

    Args:
        dataset: a planned dataset.
        configuration: name of a configuration of its plans.
        planner: says how many epochs there are at most, and the share of the warm-up.
        plans_file: the file of these plans.
        update: whether ``num_epochs`` and ``warmup_epochs`` are written into it.

    Returns:
        A sentence that says what is planned, and what was done.

    Raises:
        ValueError: if the plans or the split of the dataset make no sense.
    """
    settings = dataset.plans.get_configuration(configuration)
    block = settings.configuration.get(PRETRAINING, {})
    shared = {field.name for field in fields(StageConfig)}
    present = read_block(StageConfig, {key: block[key] for key in shared & block.keys()}, PRETRAINING)
    num_images = count_images(dataset, configuration, planner.training_share)
    planned = planner.schedule(present, num_images, settings.batch_size)
    counted = f"{num_images} images to pre-train on; pretraining.num_epochs"
    if present.num_epochs == planned.num_epochs:
        return f"{counted} stays {present.num_epochs}"
    if not update:
        return f"{counted} is {present.num_epochs}, and would be {planned.num_epochs} now (--update_epochs sets it)"
    content = read_json(plans_file)
    content["configurations"][configuration][PRETRAINING] = {
        **block,
        **{key: getattr(planned, key) for key in _SCHEDULE},
    }
    write_json(content, plans_file)
    return f"{counted} was {present.num_epochs} and is {planned.num_epochs} now"
