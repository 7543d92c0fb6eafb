"""What every protocol refuses: one sentence with the rule and the value."""

import torch
from torch import Tensor


def check_fraction(value: float, name: str) -> None:
    """Refuse a number outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_finite(rows: Tensor, name: str) -> None:
    """Refuse (n,) or (n, D) with NaN or infinity, naming the first such row."""
    if rows.numel() and all(extreme.isfinite() for extreme in rows.aminmax()):
        return  # NaN is both extremes of what has one
    finite = rows.isfinite()
    broken = (~(finite if rows.ndim == 1 else finite.all(1))).nonzero()
    if len(broken) > 0:
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {int(broken[0])}")


def check_embeddings(embeddings: Tensor, name: str = "embeddings") -> None:
    """Refuse what is not (n, D) of finite floats."""
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"{name} must be (n, D) float, got {tuple(embeddings.shape)} {embeddings.dtype}"
        )
    check_finite(embeddings, name)


def check_column(column: Tensor, name: str, n: int, dtype: torch.dtype) -> None:
    """Refuse what is not one value of ``dtype`` for each of n rows."""
    if column.shape != (n,) or column.dtype != dtype:
        raise ValueError(
            f"{name} must be ({n},) {str(dtype).removeprefix('torch.')}, one a row, "
            f"got {tuple(column.shape)} {column.dtype}"
        )
