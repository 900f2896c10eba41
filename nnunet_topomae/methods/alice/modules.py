"""What Alice adds to an encoder: projection heads, predictors, and CASA."""

import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from nnunet_topomae.methods.token_norm import TokenNorm

FEATURES = 256  # of the bottleneck of a projection head, and C in CASA; the authors' code
_PREDICTOR_WIDTH = 512


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ProjectionHead(nn.Module):
    """An MLP of three layers whose output has length 1: phi and psi of the paper (section 3.2; DINO, section 3.1).

    Batch norms, as in the heads of MoCo v3 and BYOL that section 4.2 names, take away what all tokens have in common.
    Without them all crops have nearly the same features from the start, and nothing is left to learn.

    Args:
        channels: of a token.
        width: of the hidden layers.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, width, bias=False),
            TokenNorm(width),
            nn.GELU(),
            nn.Linear(width, width, bias=False),
            TokenNorm(width),
            nn.GELU(),
            nn.Linear(width, FEATURES, bias=False),
            TokenNorm(FEATURES, affine=False),
        )
        self.apply(_initialize)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, channels) to (B, N, 256)."""
        return F.normalize(self.mlp(tokens), dim=-1)


class Predictor(nn.Sequential):
    """An MLP of two layers that only the student has, so that a constant is no answer (BYOL; SimSiam)."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, _PREDICTOR_WIDTH), nn.GELU(), nn.Linear(_PREDICTOR_WIDTH, FEATURES))
        self.apply(_initialize)


class CASA(nn.Module):
    """Conditional anatomical semantic alignment: what a masked view finds in a whole one (equations 3 and 4).

    Student and teacher are made by the same projections, and from the same queries. The last of them, zeta, ends with a
    batch norm, as :class:`ProjectionHead` does.

    Args:
        channels: of the online encoder's tokens.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.query_norm, self.query = nn.LayerNorm(channels), nn.Linear(channels, FEATURES, bias=False)
        self.norm = nn.LayerNorm(FEATURES)
        self.key = nn.Linear(FEATURES, FEATURES, bias=False)
        self.value = nn.Linear(FEATURES, FEATURES, bias=False)
        self.projection = nn.Sequential(nn.Linear(FEATURES, FEATURES, bias=False), TokenNorm(FEATURES, affine=False))
        self.apply(_initialize)

    def forward(self, visible: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from the visible tokens to those of a whole view.

        Args:
            visible: (B, N_visible, channels), V of the paper.
            whole: (B, N, 256), H or Y of the paper.

        Returns:
            S or T, (B, N_visible, 256), and the attention, (B, N_visible, N).
        """
        query, normalised = self.query(self.query_norm(visible)), self.norm(whole)
        attention = (query @ self.key(normalised).transpose(1, 2) / FEATURES**0.5).softmax(dim=-1)
        return self.projection(attention @ self.value(normalised)), attention
