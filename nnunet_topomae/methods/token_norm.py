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
        """(B, N, C) to (B, N, C).

        Raises:
            ValueError: if there is one token in all, which has no statistics; other processes may have more.
        """
        flat = tokens.flatten(0, 1)
        if len(flat) == 1 and isinstance(self.norm, nn.BatchNorm1d):
            raise ValueError(
                "a batch norm needs more than one token; set a larger batch_size in a copy of the plans or a larger "
                "pretraining.gamma if the method has it, or, with several processes, pretraining.sync_batch_norm to "
                "true"
            )
        return self.norm(flat).view_as(tokens)
