"""What MiM costs: its hybrid encoder with hidden patches against all of them, and its settings.

    python benchmarks/mim.py [--device cpu] [--repeats 5]

PyTorch counts a multiply-add as two FLOP. Seconds are medians of encoders that take turns, one crop of 96^3 voxels
each. Memory is what the planner expects on a GPU. Nothing but the seconds depends on the machine.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_step import median_seconds

from nnunet_topomae.methods.autoencoders import autoencoder_of
from nnunet_topomae.methods.base import PretextTask, to_float32
from nnunet_topomae.methods.mae import MAE, MAEConfig
from nnunet_topomae.methods.mim import MiM, MiMConfig
from nnunet_topomae.networks import UNETR, HybridUNETR
from nnunet_topomae.networks.vit import visible_indices
from nnunet_topomae.nnunet.planning.memory import GIB, trace_step

CROP, MASK_RATIO, BATCH = (96, 96, 96), 0.6, 2
HYBRID = {"crop_size": CROP, "strides": [[1, 1, 1], *[[2, 2, 2]] * 5], "encoder": {}}
VIT_B = {"patch_size": [16, 16, 16], "width": 768, "depth": 12, "num_heads": 12}
VIT = {"crop_size": CROP, "strides": [[1, 1, 1], *[[2, 2, 2]] * 4], "vit": VIT_B, "taps": [3, 6, 9]}
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {"hybrid": (HybridUNETR, HYBRID), "UNETR": (UNETR, VIT)}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "recompute: false": {"recompute": False},
    "levels: 1": {"levels": 1},
    "levels: 2": {"levels": 2},
    "beta: 2": {"beta": 2},
    "gamma: 2": {"gamma": 2},
    "alignment: off": {"alignment": "off"},
    "projection_width: 576": {"projection_width": 576},
}


def make_network(name: str) -> nn.Module:
    """A network for a crop of one channel."""
    network_class, arguments = NETWORKS[name]
    return network_class(1, 1, deep_supervision=False, **json.loads(json.dumps(arguments)))


def giga_flop(function: Callable[..., Any]) -> float:
    """10^9 FLOP of a call on the meta device, where attention is not fused, as fused kernels are not counted."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def encoder_calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """The encoder with and without hidden patches, and with the decoder of pre-training, of one crop."""
    network = make_network("hybrid").to(device).eval()
    autoencoder, encoder = autoencoder_of(network, 512).to(device).eval(), network.encoder
    crop = torch.rand(1, 1, *CROP, device=device)
    num_patches = encoder.pos_embed.shape[1]
    num_visible = num_patches - round(MASK_RATIO * num_patches)
    mask = (torch.rand(num_patches).argsort() >= num_visible).reshape(1, *encoder.grid).to(device)
    visible = visible_indices(mask, num_visible)
    return {
        "encoder, all patches": lambda: encoder(crop),
        f"encoder, {MASK_RATIO:.0%} hidden": lambda: encoder(crop, visible),
        f"with decoder, {MASK_RATIO:.0%} hidden": lambda: autoencoder.predict(
            autoencoder.decode(encoder, crop, mask, num_visible)
        ),
    }


def encoder_table(device: torch.device, repeats: int) -> None:
    """Parameters, FLOP and seconds of the encoder of the hybrid network and of its decoder in pre-training."""
    network = make_network("hybrid")
    autoencoder = autoencoder_of(network, 512)
    for what, part in {"network": network, "encoder": network.encoder, "added by pre-training": autoencoder}.items():
        print(f"{what:<24}{sum(p.numel() for p in part.parameters()) / 1e6:>8.2f} M parameters")
    calls = encoder_calls(device)
    with torch.no_grad():
        flop = {name: giga_flop(call) for name, call in encoder_calls(torch.device("meta")).items()}
        medians = median_seconds(calls, repeats, device)
    first = next(iter(calls))
    for name in calls:
        print(
            f"{name:<24}{flop[name]:>8.1f} GFLOP{flop[name] / flop[first]:>6.2f} x{medians[name] * 1000:>9.0f} ms"
            f"{medians[name] / medians[first]:>6.2f} x"
        )


def step_cost(task_class: type[PretextTask], config: Any, network: str) -> tuple[float, float]:
    """GFLOP of the forward pass of one crop, and GiB that a training step for ``BATCH`` crops takes."""

    def build() -> PretextTask:
        return task_class.build(make_network(network), config, CROP)

    def loss(task: PretextTask) -> torch.Tensor:
        batch = task.views().example(BATCH, 1)
        return task.loss_terms(to_float32(task(batch)), batch)["total"]

    with torch.device("meta"), torch.no_grad():
        task = build()
        flop = giga_flop(lambda: task(task.views().example(1, 1)))
    return flop, trace_step(build, loss) / GIB


def settings_table(network: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """What a training step of MiM takes, relative to one of MAE with a ViT-B."""
    reference = step_cost(MAE, MAEConfig(), "UNETR")
    print(f"{network}, crop {CROP}; MAE with a ViT-B: {reference[0]:.1f} GFLOP a crop, {reference[1]:.2f} GiB")
    print(f"{'settings':<26}{'volumes':>8}{'GFLOP':>8}{'x MAE':>7}{f'GiB, batch {BATCH}':>14}")
    for name, changes in settings.items():
        config = replace(MiMConfig(), **changes)
        volumes = 1 + config.gamma * (config.levels > 1) * (1 + config.beta * (config.levels > 2))
        flop, memory = step_cost(MiM, config, network)
        print(f"{name:<26}{volumes:>8}{flop:>8.0f}{flop / reference[0]:>7.1f}{memory:>14.2f}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    encoder_table(torch.device(options.device), options.repeats)
    for network in NETWORKS:
        print()
        settings_table(network, SETTINGS)


if __name__ == "__main__":
    main()
