"""Trains every method for 20 steps and prints digests of all losses and weights, to compare two versions of the code.

    python benchmarks/same_training.py FOLDER > new.txt

Run it once with each version in a fresh process, on copies of one FOLDER, which then show that plans that the older
version wrote still work. Where FOLDER does not exist it is made: a phantom dataset, planned and preprocessed by the
version that runs. ``--interrupt`` stops every pre-training in the middle of its last epoch; ``--continue`` goes on with
what such a run has left, perhaps by the other version, and must print what an uninterrupted run prints.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

DATASET = "Dataset998_Phantom"
SCHEDULE = {
    "num_epochs": 2,
    "num_iterations_per_epoch": 10,
    "num_val_iterations_per_epoch": 2,
    "warmup_epochs": 1,
    "save_every": 1,
}
CROP = [16, 32, 32]
VIT = {"patch_size": [8, 8, 8], "width": 32, "depth": 4, "num_heads": 2}
FUSED = {
    "crop_size": CROP,
    "features_per_stage": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "vit": VIT,
    "taps": [0, 1, 2],
    "pyramid_channels": [8, 8, 16, None],
    "pyramid_blocks": [1, 1, 1, 0],
}
NESTED = {"gamma": 1, "beta": 2, "projection_width": 32}
PAIRS = {"head_width": 32, "landmarks": {"iterations": 20}}
UNETR = {"crop_size": CROP, "strides": [[1] * 3, *[[2] * 3] * 3], "vit": VIT, "features": 4}
RUNS = [  # trainer and plans; fine-tuning after the pre-training that it starts from
    ("TopoMAEPretrainer", "nnUNetTopoMAEPlans"),
    ("FusedFinetuneTrainer", "nnUNetTopoMAEPlans"),
    ("TopoMAEPretrainer", "HardMasks"),
    ("TopoMAEPretrainer", "OnlyViT"),
    ("MAEPretrainer", "TinyUNETR"),
    ("PretrainedFinetuneTrainer", "TinyUNETR"),
    ("SparKPretrainer", "nnUNetPlans"),
    ("PretrainedFinetuneTrainer", "nnUNetPlans"),
    ("AnatoMaskPretrainer", "nnUNetResEncUNetMPlans"),
    ("MiMPretrainer", "Nested"),
    ("AlicePretrainer", "Pairs"),
]


class Interruption(Exception):  # noqa: N818 - no error
    """Stands for a lost process."""


def prepare(folder: Path) -> None:
    """Let nnU-Net work in a folder, before it is imported; make the dataset in it if there is none."""
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    from nnunet_topomae import trainers

    os.environ["nnUNet_extTrainer"] = str(trainers.FOLDER)
    if not folder.exists():
        make_dataset(folder)


def main() -> None:
    """Make the folder if need be, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--interrupt", action="store_true")
    parser.add_argument("--continue", dest="resume", action="store_true")
    options = parser.parse_args()
    prepare(options.folder)
    os.environ["nnUNet_n_proc_DA"] = "0"  # in this process, whose seeds are set, not in nnU-Net's workers
    for trainer, plans in RUNS:
        if "Pretrainer" in trainer or not (options.interrupt or options.resume):
            train(options.folder, trainer, plans, options.interrupt, options.resume)


def make_dataset(folder: Path) -> None:
    """Phantoms, planned by our planner and nnU-Net's two, with small networks."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments, preprocess

    from nnunet_topomae.commands.phantom import write_dataset

    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(parents=True)
    write_dataset(folder / "raw" / DATASET, num_training=5, num_test=0)
    command = [str(Path(sys.executable).parent / "nnUNetv2_topomae"), "plan_and_preprocess", "-d", "998"]
    subprocess.run([*command, "-c", "3d_fullres", "-np", "1", "-npfp", "1", "--no_pbar"], check=True, stdout=sys.stderr)
    plan_experiments([998], "ExperimentPlanner")
    plan_experiments([998], "nnUNetPlannerResEncM")
    preprocess([998], "nnUNetPlans", ("3d_fullres",), (1,))
    preprocessed = folder / "preprocessed" / DATASET
    for name in ("nnUNetTopoMAEPlans", "nnUNetPlans", "nnUNetResEncUNetMPlans"):
        plans = json.loads((preprocessed / f"{name}.json").read_text())
        configuration = plans["configurations"]["3d_fullres"]
        configuration.update(batch_size=2, patch_size=CROP)
        arguments = configuration["architecture"]["arch_kwargs"]
        if name == "nnUNetTopoMAEPlans":
            arguments.update(FUSED)
            configuration["pretraining"].update(SCHEDULE, topology={"grid": [8, 16, 16]})
            configuration["finetuning"].update(SCHEDULE)
            write(preprocessed, "HardMasks", plans, {"pretraining": {"mask_source": "anatomask"}})
            write(preprocessed, "OnlyViT", plans, {"pretraining": {"branches": ["vit"]}})
            network = {"network_class_name": "nnunet_topomae.networks.unetr.UNETR", "arch_kwargs": UNETR}
            changes = {"architecture": {**network, "_kw_requires_import": []}, "pretraining": {}}
            write(preprocessed, "TinyUNETR", plans, changes)
            write(preprocessed, "Nested", plans, {**changes, "pretraining": NESTED})
            write(preprocessed, "Pairs", plans, {**changes, "pretraining": PAIRS})
        else:
            arguments["features_per_stage"] = [4 * 2**n for n in range(arguments["n_stages"])]
            configuration.update(pretraining={**SCHEDULE, "decoder_width": 16}, finetuning=SCHEDULE)
        write(preprocessed, name, plans, {})


def write(folder: Path, name: str, plans: dict, changes: dict) -> None:
    """A copy of plans with another name and configuration; another network drops TopoMAE's settings."""
    plans = json.loads(json.dumps({**plans, "plans_name": name}))
    configuration = plans["configurations"]["3d_fullres"]
    if "architecture" in changes:
        configuration["pretraining"] = SCHEDULE
    for block, values in changes.items():
        configuration[block] = {**configuration[block], **values}
    (folder / f"{name}.json").write_text(json.dumps(plans))


def train(folder: Path, name: str, plans: str, interrupt: bool, resume: bool) -> None:
    """Train in this process and print digests of what came out."""
    import numpy as np
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    torch.set_num_threads(1)
    random.seed(1)
    np.random.seed(1)
    silenced, sys.stdout = sys.stdout, sys.stderr
    trainer = get_trainer_from_args(DATASET, "3d_fullres", 0, name, plans, resume, torch.device("cpu"))
    if resume:
        maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    if interrupt:
        interrupt_last_epoch(trainer)
    try:
        trainer.run_training()
    except Interruption:
        return
    finally:
        sys.stdout = silenced
    checkpoint = torch.load(
        folder / "results" / DATASET / f"{name}__{plans}__3d_fullres" / "fold_0" / "checkpoint_final.pth",
        weights_only=True,
    )
    losses = {key: v for key, v in checkpoint["logging"].items() if "timestamps" not in key}
    weights = checkpoint["network_weights"]
    moments = [t for state in checkpoint["optimizer_state"]["state"].values() for t in state.values()]
    for what, tensors in (("weights", [weights[key] for key in sorted(weights)]), ("moments", moments)):
        sys.stdout.write(f"{name:<26}{plans:<24}{what:<9}{digest(tensors)}\n")
    sys.stdout.write(f"{name:<26}{plans:<24}{'losses':<9}{json.dumps(losses, sort_keys=True)}\n")
    sys.stdout.flush()


def interrupt_last_epoch(trainer) -> None:
    """Stop in the middle of the last epoch."""
    trainer.initialize()
    step, count = trainer.train_step, iter(range(15))

    def interrupted(batch):
        if next(count, None) is None:
            raise Interruption
        return step(batch)

    trainer.train_step = interrupted


def digest(tensors: list) -> str:
    """SHA-256 of all values."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    main()
