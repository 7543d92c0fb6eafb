"""What a GPU's host would wait for in a piece of code, found without a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Their results go to the host, or have a size that the numbers decide.
WAITS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    "_coalesce",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class HostWaits(TorchDispatchMode):
    """Lists, in ``names``, the operations within it that a GPU's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        waits = name in WAITS
        if name in INDEXING:  # by a mask: as nonzero
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            # A Python number that is assigned is a tensor of the host, and copied.
            waits |= any(value.device != args[0].device for value in args[2:3])
        if name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and isinstance(result, Tensor):
            source = args[1] if name == "copy_" else args[0]
            at_once = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            waits = source.device.type != result.device.type and not at_once
        if waits:
            self.names.append(name)
        return result
