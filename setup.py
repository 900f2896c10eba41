"""Maps the top-level folders trainers/ and planners/ into the package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

if __name__ == "__main__":  # nnU-Net imports this file if nnUNet_extTrainer names the checkout
    setup(
        packages=[*find_packages(include=["nnunet_topomae*"]), "nnunet_topomae.trainers", "nnunet_topomae.planners"],
        package_dir={"nnunet_topomae.trainers": "trainers", "nnunet_topomae.planners": "planners"},
    )
