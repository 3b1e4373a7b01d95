"""8-bit pixels <-> the model's range, for every level."""

import pytest
import torch

from ddpm_notes_pipeline.data import to_model_range, to_uint8

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_model_range_is_the_float32_nearest_to_k_over_127_5_minus_1(device):
    k = torch.arange(256, dtype=torch.uint8, device=device)
    x = to_model_range(k)
    assert torch.equal(x.cpu(), (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float())
    assert torch.equal(x, -x.flip(0)) and (x[0], x[-1]) == (-1, 1)
    assert torch.equal(k.cpu(), torch.arange(256, dtype=torch.uint8))  # the argument is left alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_pixel_value_survives_the_round_trip(dtype):
    k = torch.arange(256, dtype=torch.uint8).view(2, 2, 8, 8)
    x = to_model_range(k).to(dtype)
    if dtype is not torch.bfloat16:  # whose 8 bits do not tell 256 values apart
        assert torch.equal(to_uint8(x), k)
    assert (to_uint8(x).int() - k.int()).abs().max() <= 1
    # In between it rounds to the nearest, outside it clamps.
    assert to_uint8(torch.tensor([-7.0, -1.01, -0.999, 0.999, 1.01, 7.0], dtype=dtype)).tolist() == [
        0,
        0,
        0,
        255,
        255,
        255,
    ]
    assert to_uint8(torch.tensor([-1 + 0.4 / 127.5, -1 + 0.6 / 127.5])).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8])
def test_pixels_of_another_dtype_are_refused(dtype):
    with pytest.raises(ValueError, match=f"{dtype}; it must be torch.uint8"):
        to_model_range(torch.zeros(3, dtype=dtype))
    if dtype is not torch.float32:
        with pytest.raises(ValueError, match=str(dtype)):
            to_uint8(torch.zeros(3, dtype=dtype))
