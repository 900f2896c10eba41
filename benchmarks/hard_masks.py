"""Where AnatoMask's masks fall on a CT: on anatomy or on air?

    python benchmarks/hard_masks.py example_ct.nii.gz masks.png [--steps 80]

A small AnatoMask is pre-trained on crops of the image. Then, for many crops, patches are ranked by each hardness score
of its teacher, and the share of voxels above -500 HU in the hardest half of the hidden patches is compared with that of
all hidden ones, which chance chose.
"""

import argparse
from dataclasses import replace
from math import prod

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_topomae.methods.losses import patch_means
from nnunet_topomae.methods.masked import HARDNESS_SCORES, TeacherConfig
from nnunet_topomae.methods.masking import hardest_patches_mask, mask_to_voxels, random_patch_mask
from nnunet_topomae.methods.spark import AnatoMask, AnatoMaskConfig

LOW, HIGH, TISSUE = -175, 250, -500  # HU; the range of soft tissue, as CT of the abdomen is clipped
BATCH, NUM_CROPS = 2, 16


def make_task(crop: int) -> AnatoMask:
    """AnatoMask of a U-Net with 16^3 patches, small enough for a CPU."""
    network = PlainConvUNet(
        1, 5, [8, 16, 32, 64, 128], nn.Conv3d, 3, [1, 2, 2, 2, 2], 2, 1, [1] * 4, True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    network.apply(network.initialize)
    policy = TeacherConfig(first_momentum=0.9, last_momentum=0.99)  # a short training has no time for more
    return AnatoMask.build(network, AnatoMaskConfig(decoder_width=64, anatomask=policy), [crop] * 3)


def to_unit(hounsfield: torch.Tensor) -> torch.Tensor:
    """Clipped and scaled to [0, 1], as the paper's set-ups do; crops of nnU-Net's own plans are z-scores."""
    return (hounsfield.clamp(LOW, HIGH) - LOW) / (HIGH - LOW)


def draw(image: torch.Tensor, crop: int, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Random crops (count, 1, crop, crop, crop) of an image."""
    starts = [[rng.integers(size - crop + 1) for size in image.shape] for _ in range(count)]
    return torch.stack([image[a : a + crop, b : b + crop, c : c + crop][None] for a, b, c in starts])


def train(task: AnatoMask, image: torch.Tensor, steps: int, rng: np.random.Generator) -> None:
    """Pre-train as the trainer does."""
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        crops, progress = draw(image, task.crop_size[0], BATCH, rng), step / steps
        drawn = {
            "crop": crops,
            "mask": random_masks(task, len(crops)),
            "order": torch.rand(len(crops), *task.mask_grid),
        }
        batch = task.choose(drawn, progress)
        output = task(batch)
        loss = task.loss_terms(output, batch)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_step(output, batch, progress)
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def random_masks(task: AnatoMask, count: int) -> torch.Tensor:
    """Masks of the task's ratio."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return torch.stack([random_patch_mask(task.mask_grid, task.config.mask_ratio, generator) for _ in range(count)])


@torch.no_grad()
def hardest(task: AnatoMask, crops: torch.Tensor, given: torch.Tensor, score: str) -> torch.Tensor:
    """The hardest half of the hidden patches by a score."""
    teacher = task.teacher.eval()
    teacher.config = replace(task.config, anatomask=replace(task.config.anatomask, hardness=score))
    batch = {"crop": crops, "mask": given}
    errors = teacher.patch_errors(teacher(batch), batch) * given
    count = int(given[0].sum()) // 2
    return hardest_patches_mask(errors, count, count, torch.zeros_like(errors))


def main() -> None:
    """Print the shares and draw the figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("image")
    parser.add_argument("figure")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--crop", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    hounsfield = torch.from_numpy(nibabel.load(options.image).get_fdata(dtype=np.float32))
    task = make_task(options.crop)
    train(task, to_unit(hounsfield), options.steps, rng)

    crops_hu = draw(hounsfield, options.crop, NUM_CROPS, rng)
    crops = to_unit(crops_hu)
    given = random_masks(task, len(crops))
    tissue = patch_means((crops_hu > TISSUE).float(), task.patch_size)[:, 0]
    masks = {score: hardest(task, crops, given, score) for score in HARDNESS_SCORES}
    shares = {"random": tissue[given].mean(), **{score: tissue[mask].mean() for score, mask in masks.items()}}
    print(f"share of voxels above {TISSUE} HU in {int(given.sum())} hidden patches of {prod(given.shape)}:")
    for name, share in shares.items():
        print(f"  {name:<14}{share.item():>7.1%}")

    figure, axes = plt.subplots(1, 5, figsize=(15, 3.6), layout="constrained")
    show = {"hidden by chance": given, **{f"hardest, {score}": mask for score, mask in masks.items()}}
    slice_ = options.crop // 2
    axes[0].imshow(crops[0, 0, :, slice_].T.numpy(), cmap="gray", origin="lower", vmin=0, vmax=1)
    axes[0].set_title("crop", fontsize=11)
    for axis, (name, mask) in zip(axes[1:], show.items(), strict=True):
        axis.imshow(crops[0, 0, :, slice_].T.numpy(), cmap="gray", origin="lower", vmin=0, vmax=1)
        voxels = mask_to_voxels(mask[:1], task.patch_size)[0, 0, :, slice_].T.numpy()
        axis.imshow(np.where(voxels, 1.0, np.nan), cmap="autumn", origin="lower", alpha=0.45, vmin=0, vmax=1)
        share = shares["random" if name.endswith("chance") else name.split()[-1]]
        axis.set_title(f"{name}\n{share.item():.0%} above {TISSUE} HU", fontsize=11)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(options.figure, dpi=75)


if __name__ == "__main__":
    main()
