"""SGD for weights that fill a GPU: in place without a copy, and row by row for sparse gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

BLOCK = 4096  # rows


class SGD(torch.optim.SGD):
    r"""torch's SGD with momentum, in place, and row-sparse for a sparse gradient.

    .. math::

        b \leftarrow \mu b + (g + \lambda w), \qquad
        w \leftarrow w - \eta b \quad
        (\text{Nesterov: } w \leftarrow w - \eta (g + \lambda w + \mu b))

    with the gradient g, the momentum buffer b and the weights w.

    torch's own adds :math:`\lambda w` to a copy of the gradient, which for 617,970 identities is
    another 1.3 GB, unless its fused kernel is asked for; and that one takes over the work of the
    loss scaler, so that under float16 gradients cannot be clipped. This one uses the fused kernel
    on every processor and CUDA device, on gradients the scaler has unscaled already.

    A sparse gradient (``torch.sparse_coo``, as of
    :class:`fastface_lightning.classifiers.PartialClassifier`) updates the rows it holds alone: of
    all others weights and momentum stay as they are, without weight decay. A row that it holds is
    updated however small its gradient is.

    Args:
        params: as every torch optimizer.
        lr: :math:`\eta`, at least 0.
        momentum: :math:`\mu`, at least 0.
        weight_decay: :math:`\lambda`, at least 0.
        nesterov: whether the momentum looks ahead; needs a momentum.

    References:
        Sutskever et al., On the importance of initialization and momentum in deep learning, 2013,
        in torch's form (no dampening).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients, once ``closure`` has computed them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            dense = []
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    self._update_rows(p, p.grad.coalesce(), group)
                elif p.grad is not None:
                    dense.append(p)
            if dense:
                sgd(
                    dense,
                    [p.grad for p in dense],
                    [self._buffer(p, group) for p in dense],
                    fused=all(p.device.type in ("cpu", "cuda") for p in dense),
                    weight_decay=group["weight_decay"],
                    momentum=group["momentum"],
                    lr=group["lr"],
                    dampening=0,
                    nesterov=group["nesterov"],
                    maximize=False,
                )
        return loss

    def _buffer(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor | None:
        if not group["momentum"]:
            return None
        state = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        match_memory_format(state, p)
        return state["momentum_buffer"]

    def _update_rows(self, p: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        """Update the rows of p (C, D) that a coalesced sparse ``grad`` of its shape holds."""
        momentum, buffer = group["momentum"], self._buffer(p, group)
        # A block at a time: all rows at once would be copied three times.
        blocks = zip(grad.indices()[0].split(BLOCK), grad.values().split(BLOCK), strict=True)
        for rows, values in blocks:
            step = values.add(p[rows], alpha=group["weight_decay"])
            if buffer is not None:
                b = buffer[rows].mul_(momentum).add_(step)
                buffer[rows] = b
                step = step.add_(b, alpha=momentum) if group["nesterov"] else b
            p.index_add_(0, rows, step, alpha=-group["lr"])


def match_memory_format(state: dict[str, Any], p: Tensor) -> None:
    """Bring an optimizer's state of a parameter into the parameter's memory format.

    A state that was saved with another one, by a run that had ``channels_last`` set otherwise,
    would be taken element by element in the wrong order: the fused kernels look at memory only.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
            state[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
