"""Names pre-trainings of TopoMAE that have ended, on the command line; for the benchmarks that look at them."""

import argparse

TRAINER = "TopoMAEPretrainer"


def parser(batches: int, *, several: bool = False) -> argparse.ArgumentParser:
    """Options that name dataset, plans, configuration and fold.

    Args:
        batches: how many validation batches are used if the user does not say.
        several: whether more than one name of plans may be given, so that ``plans`` is a list.
    """
    options = argparse.ArgumentParser()
    options.add_argument("dataset", type=int, help="ID of the dataset")
    default = "nnUNetTopoMAEPlans"
    options.add_argument("-p", "--plans", nargs="+" if several else None, default=[default] if several else default)
    options.add_argument("-c", "--configuration", default="3d_fullres")
    options.add_argument("-f", "--fold", type=int, default=0)
    options.add_argument("--batches", type=int, default=batches, help="validation batches")
    return options
