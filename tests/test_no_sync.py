"""The guard of the device tests: what a GPU would be waited for is refused, the rest passes."""

import pytest
import torch

from tests.support.no_sync import META, HostSync, no_sync

WAITS = {
    "item": lambda x, y: x.sum().item(),
    "bool": lambda x, y: bool((x > 0).any()),
    "tolist": lambda x, y: x.tolist(),
    "to the CPU": lambda x, y: x.cpu(),
    "to the CPU, unwaited": lambda x, y: x.to("cpu", non_blocking=True),
    "into the CPU": lambda x, y: y.copy_(x),
    "from the CPU": lambda x, y: y.to(META),
    "from the CPU, cast": lambda x, y: y.to(META, torch.float64),
    "copied from the CPU": lambda x, y: x.copy_(y),
    "a number as a tensor": lambda x, y: torch.tensor(1.0, device=META),
    "a list as a tensor": lambda x, y: torch.as_tensor([1.0], device="meta"),
    "an index on the CPU": lambda x, y: x[torch.tensor([0])],
    "a mix": lambda x, y: x + y,
    "a CPU scalar in where": lambda x, y: torch.where(x > 0, x, torch.tensor(1.0)),
    "rows by a mask": lambda x, y: x[x > 0],
}
PASSES = {
    "from the CPU, unwaited": lambda x, y: y.to(META, torch.float64, non_blocking=True),
    "arithmetic": lambda x, y: torch.where(x > 0, x, 1.0).sum() * 2,
    "on the CPU": lambda x, y: (y[torch.tensor([0])].tolist(), bool(y.any())),
    "rows by number": lambda x, y: x[torch.zeros(1, dtype=torch.int64, device=META)],
}


@pytest.mark.parametrize("case", WAITS)
def test_what_waits_for_a_device_is_refused(case):
    with no_sync(), pytest.raises((HostSync, RuntimeError, NotImplementedError)):
        WAITS[case](torch.empty(3, device=META), torch.zeros(3))


@pytest.mark.parametrize("case", PASSES)
def test_what_does_not_passes(case):
    with no_sync():
        PASSES[case](torch.empty(3, device=META), torch.zeros(3))
