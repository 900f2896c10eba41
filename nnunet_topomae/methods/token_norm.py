"""A batch norm of tokens, which takes away what all of them have in common."""

from torch import Tensor, nn


class TokenNorm(nn.Module):
    """A batch norm over all tokens of all crops.

    In validation, too, the statistics are those of the batch: running ones would lag behind the weights.

    Args:
        channels: of a token.
        affine: whether there is a learned scale and shift.
    """

    def __init__(self, channels: int, affine: bool = True):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=affine, track_running_stats=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        return self.norm(tokens.flatten(0, 1)).view_as(tokens)
