"""What coefficients must be."""

from rlhf_lightning.errors import UserError


def require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name} must be positive, not {value}")


def require_not_negative(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not value >= 0:
            raise UserError(f"{name} must not be negative, not {value}")


def require_flip_probability(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing is a flip probability in [0, 0.5), not {label_smoothing}")
