"""Packaging: maps the top-level folders ``trainers`` and ``planners`` into the package."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "nnunet_topomae"

setup(
    name="nnunet-topomae",
    version="0.1.0",
    description="Self pre-training with topology- and spatiality-aware masked autoencoders for nnU-Net v2",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=[f"{PACKAGE}*"]), f"{PACKAGE}.trainers", f"{PACKAGE}.planners"],
    package_dir={f"{PACKAGE}.trainers": "trainers", f"{PACKAGE}.planners": "planners"},
    install_requires=[
        "torch",
        "nnunetv2>=2.8,<3",
        "batchgenerators",
        "dynamic-network-architectures",
        "timm",
        "cripser",
        "POT>=0.9.7",
        "matplotlib",
    ],
    extras_require={"test": ["pytest", "hypothesis", "gudhi"], "dev": ["ruff", "pre-commit"]},
    entry_points={"console_scripts": [f"nnUNetv2_topomae={PACKAGE}.commands.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
