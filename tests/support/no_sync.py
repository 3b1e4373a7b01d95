"""What would make the host wait for a GPU, or fail there, found without one: on the device "meta".

A tensor on "meta" has a device and a shape and no values, so `.item()`, `bool(tensor)`, `.tolist()`
and a copy to the CPU are errors by themselves: each would wait for the device's queue. `no_sync`
adds what "meta" lets pass.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# torch has no public names for these two
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701
from torch.utils._pytree import tree_leaves  # noqa: PLC2701

META = torch.device("meta")


class HostSync(AssertionError):
    """An operation that waits for the device, or that a device refuses."""


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """A block in which all that passes between CPU and device is copies that nobody waits for.

    Raises HostSync for a blocking copy from the CPU (`x.to(device)`, `torch.tensor(1.0,
    device=device)`), for one to the CPU that is not (its values may be read before they arrive),
    and for any other operation on tensors of both.
    """
    with Constructors(), Operations():
        yield


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is torch.ops.aten._to_copy.default:  # noqa: SLF001
            check_copy(args[0].device, kwargs.get("device") or args[0].device, kwargs.get("non_blocking", False))
        elif func is torch.ops.aten.copy_.default:
            check_copy(args[1].device, args[0].device, args[2] if len(args) > 2 else False)
        elif len({x.device for x in tensors}) > 1:
            seen = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
            raise HostSync(f"{func} of tensors on several devices: {seen}")
        return func(*args, **kwargs)


class Constructors(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            source = args[0].device if isinstance(args[0], torch.Tensor) else torch.device("cpu")
            check_copy(source, torch.device(kwargs["device"]), non_blocking=False)
        return func(*args, **kwargs)


def check_copy(source: torch.device, target: torch.device, non_blocking: bool) -> None:
    if source.type == target.type:
        return
    if target.type == "cpu":
        raise HostSync("a copy to the CPU " + ("may be read too early" if non_blocking else "waits for its values"))
    if not non_blocking:
        raise HostSync(f"a blocking copy from {source} to {target}")
