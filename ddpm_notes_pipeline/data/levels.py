"""8-bit pixels and the model's range [-1, 1]."""

import torch


def to_model_range(pixel_values: torch.Tensor) -> torch.Tensor:
    """uint8 k in 0..255 -> float32 x = k/127.5 - 1 in [-1, 1], of the same shape.

    Computed as (2k - 255)/255: the numerator is exact and one division rounds, so x is the float32
    nearest to the true value on any device, and 255 - k gives -x.

    Raises:
        ValueError: `pixel_values` is not uint8.
    """
    if pixel_values.dtype != torch.uint8:
        raise ValueError(f"pixel_values has dtype {pixel_values.dtype}; it must be torch.uint8 (0..255)")
    # By a tensor: CUDA divides by a Python number as a product with its rounded reciprocal.
    return pixel_values.float().mul_(2).sub_(255).div_(torch.full((), 255.0, device=pixel_values.device))


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Floating-point x in [-1, 1] -> uint8 k = round((x + 1) * 127.5), clamped to 0..255.

    Raises:
        ValueError: `x` is not floating-point.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; it must be a floating-point image in [-1, 1]")
    return ((x.to(torch.promote_types(x.dtype, torch.float32)) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
