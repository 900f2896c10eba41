"""Checks of sizes that crops, patches and strides have to satisfy."""

from collections.abc import Sequence

Size = tuple[int, int, int]


def divided(crop_size: Sequence[int], divisor: Sequence[int], what: str) -> Size:
    """``crop_size / divisor`` per axis.

    Raises:
        ValueError: if an axis is not divisible; ``what`` names the divisor in the message.
    """
    if len(crop_size) != 3 or len(divisor) != 3:
        raise ValueError(f"crop size {tuple(crop_size)} and {what} {tuple(divisor)} must have three axes")
    if any(d < 1 or size % d for size, d in zip(crop_size, divisor, strict=True)):
        raise ValueError(
            f"crop size {tuple(crop_size)} is not divisible by {what} {tuple(divisor)}; "
            f"choose a crop size whose axes are multiples of it"
        )
    return tuple(size // d for size, d in zip(crop_size, divisor, strict=True))
