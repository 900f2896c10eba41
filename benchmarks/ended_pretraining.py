"""Names a pre-training of TopoMAE that has ended, on the command line; for the benchmarks that look at one."""

import argparse

TRAINER = "TopoMAEPretrainer"


def parser(batches: int) -> argparse.ArgumentParser:
    """Options that name dataset, plans, configuration and fold.

    Args:
        batches: how many validation batches are used if the user does not say.
    """
    options = argparse.ArgumentParser()
    options.add_argument("dataset", type=int, help="ID of the dataset")
    options.add_argument("-p", "--plans", default="nnUNetTopoMAEPlans")
    options.add_argument("-c", "--configuration", default="3d_fullres")
    options.add_argument("-f", "--fold", type=int, default=0)
    options.add_argument("--batches", type=int, default=batches, help="validation batches")
    return options
