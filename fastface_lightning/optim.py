"""Optimizers for weights that fill a GPU: in place without a copy, row by row if sparse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

BLOCK = 4096  # rows


class RowSparse(ABC, Optimizer):
    """An optimizer that updates, of a sparse gradient, the rows that it holds alone.

    Of all other rows of a parameter whose gradient is ``torch.sparse_coo``, as of
    :class:`fastface_lightning.classifiers.PartialClassifier`, weights and states stay as they are,
    without weight decay. A row that it holds is updated however small its gradient is.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients, once ``closure`` has computed them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            dense = [p for p in given if not self._is_by_rows(p)]
            if dense:
                self._update(dense, all(p.device.type in ("cpu", "cuda") for p in dense), group)
            for p in given:
                if self._is_by_rows(p):
                    self._update_by_rows(p, group)
        return loss

    def _is_by_rows(self, p: nn.Parameter) -> bool:
        return p.grad is not None and p.grad.is_sparse

    def _update_by_rows(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            grad = grad.coalesce()
            rows, values = grad.indices()[0], grad.values()
        else:
            rows, values = torch.arange(len(p), device=p.device), grad
        # A block at a time: all rows at once would be copied several times.
        for block in zip(rows.split(BLOCK), values.split(BLOCK), strict=True):
            self._update_rows(p, *block, group)

    @abstractmethod
    def _update(self, params: list[Any], fused: bool, group: dict[str, Any]) -> None:
        """Update parameters by their dense gradients; ``fused`` where their devices have kernels
        that do it in place."""

    @abstractmethod
    def _update_rows(
        self, p: nn.Parameter, rows: Tensor, grad: Tensor, group: dict[str, Any]
    ) -> None:
        """Update different ``rows`` (K,) of p (C, D) by their gradients (K, D), holding at most
        two blocks (K, D) besides."""


class SGD(RowSparse, torch.optim.SGD):
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

    Of a sparse gradient see :class:`RowSparse`.

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

    def _update(self, params: list[Any], fused: bool, group: dict[str, Any]) -> None:
        sgd(
            params,
            [p.grad for p in params],
            [self._buffer(p, group) for p in params],
            fused=fused,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0,
            nesterov=group["nesterov"],
            maximize=False,
        )

    def _buffer(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor | None:
        if not group["momentum"]:
            return None
        state = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        match_memory_format(state, p)
        return state["momentum_buffer"]

    def _update_rows(
        self, p: nn.Parameter, rows: Tensor, grad: Tensor, group: dict[str, Any]
    ) -> None:
        momentum, buffer = group["momentum"], self._buffer(p, group)
        step = grad.add(p[rows], alpha=group["weight_decay"])
        if buffer is not None:
            b = buffer[rows].mul_(momentum).add_(step)
            buffer[rows] = b
            step = step.add_(b, alpha=momentum) if group["nesterov"] else b
        p.index_add_(0, rows, step.mul_(-group["lr"]))  # as alpha a tensor would be waited for


class AdamW(RowSparse, torch.optim.AdamW):
    r"""torch's AdamW, in place, and row-sparse for a sparse gradient.

    .. math::

        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        w \leftarrow w - \eta \left( \lambda w +
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \right)

    with the gradient g, its running moments m and v, the weights w and the count t of their steps.

    As :class:`SGD` it uses torch's fused kernel on gradients that a loss scaler has unscaled
    already, so that under float16 they can be clipped. Of a sparse gradient see
    :class:`RowSparse`: each row is as a parameter of its own that takes a step only when a
    gradient holds it, with its own t. So the state ``step`` of a parameter that has had a sparse
    gradient is (C,) float32, and its later dense gradients hold all rows.

    Args:
        params: as every torch optimizer.
        lr: :math:`\eta`, at least 0.
        betas: :math:`\beta_1, \beta_2`, in [0, 1).
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\lambda`, at least 0.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019 (arXiv 1711.05101).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _is_by_rows(self, p: nn.Parameter) -> bool:
        return super()._is_by_rows(p) or bool(self.state[p] and self.state[p]["step"].ndim)

    def _update(self, params: list[Any], fused: bool, group: dict[str, Any]) -> None:
        states = [self._state(p) for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, p: nn.Parameter) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            # torch neither casts nor moves a state of this name when it is loaded.
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] = state["step"].to(p.device, torch.float32)
        if super()._is_by_rows(p) and not state["step"].ndim:
            state["step"] = state["step"].repeat(len(p))
        match_memory_format(state, p)
        return state

    def _update_rows(
        self, p: nn.Parameter, rows: Tensor, grad: Tensor, group: dict[str, Any]
    ) -> None:
        state, (beta1, beta2) = self._state(p), group["betas"]
        state["step"][rows] += 1
        t = state["step"][rows].to(torch.promote_types(p.dtype, torch.float32))
        t = t.view(-1, *[1] * (p.ndim - 1))
        v = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg_sq"][rows] = v
        v.div_(_one_minus_power(beta2, t)).sqrt_().add_(group["eps"])
        m = state["exp_avg"][rows].lerp_(grad, 1 - beta1)
        state["exp_avg"][rows] = m
        step = m.div_(_one_minus_power(beta1, t)).div_(v)
        del v  # before the next of its size
        step.add_(p[rows], alpha=group["weight_decay"])
        p.index_add_(0, rows, step.mul_(-group["lr"]))


def _one_minus_power(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t, without the digits that the difference would lose where beta^t is near 1."""
    return -torch.expm1(t * (math.log(beta) if beta else -math.inf))


def match_memory_format(state: dict[str, Any], p: Tensor) -> None:
    """Bring an optimizer's state of a parameter into the parameter's memory format.

    A state that was saved with another one, by a run that had ``channels_last`` set otherwise,
    would be taken element by element in the wrong order: the fused kernels look at memory only.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
            state[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
