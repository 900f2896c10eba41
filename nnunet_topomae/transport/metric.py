"""What it costs to move a point of a persistence diagram."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Values = npt.NDArray[np.float64]
Ground = Literal["inf"] | int | float


@dataclass(frozen=True)
class Metric:
    """Cost of moving a point: its distance in the ground norm, to the power of the order.

    Args:
        order: at least 1.
        ground: "inf", or p of an Lp norm.

    Raises:
        ValueError: for another order or norm.
    """

    order: float = 2
    ground: Ground = "inf"

    def __post_init__(self):
        if not isinstance(self.order, int | float) or not 1 <= self.order < math.inf:
            raise ValueError(f"order must be a finite number of at least 1, got {self.order!r}")
        if self.ground != "inf" and not (isinstance(self.ground, int | float) and self.ground >= 1):
            raise ValueError(f'ground must be "inf" or a number of at least 1, got {self.ground!r}')

    @property
    def norm(self) -> float:
        """The p of the ground norm."""
        return float(self.ground)

    def to_diagonal(self, points: Points) -> Values:
        """Cost of sending points (N, 2) to the diagonal."""
        return (np.abs(points[:, 0] - points[:, 1]) * 2 ** (1 / self.norm - 1)) ** self.order

    def cost(self, birth_offset: Values, death_offset: Values) -> Values:
        """Cost of moving points by these absolute offsets of birth and death."""
        if math.isinf(self.norm):
            return np.maximum(birth_offset, death_offset) ** self.order
        return (birth_offset**self.norm + death_offset**self.norm) ** (self.order / self.norm)

    def costs(self, x: Points, y: Points) -> Values:
        """Cost of moving each row of x (N, 2) to the same row of y."""
        offsets = np.abs(x - y)
        return self.cost(offsets[:, 0], offsets[:, 1])


def check_tolerance(tolerance: float) -> None:
    """Make sure that a tolerance is in range.

    Raises:
        ValueError: unless it is at least 0 and below 1.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance}")
