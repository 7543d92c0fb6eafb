"""Freeze parts of a network: their parameters and batch norm statistics stay, dropout is off."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import nn

WHOLE = "all"
FreezableT = TypeVar("FreezableT", bound="Freezable")


class Freezable(nn.Module):
    """A network of which parts can be frozen, whatever ``train()`` says later."""

    frozen: frozenset[str] = frozenset()

    def freeze(self, names: str | Iterable[str]) -> None:
        """Freeze parts: no gradient for their parameters, and their modules stay in eval mode.

        Args:
            names: submodules or single parameters by their names in the state_dict, such as
                ``layer1``, ``trunk.stem`` or ``trunk.pos_embed``; ``all`` is the whole network.

        Raises:
            ValueError: a name the network has not; nothing is frozen then.
        """
        names = [names] if isinstance(names, str) else [str(name) for name in names]
        parts = dict[str, Any](self.named_parameters()) | dict(self.named_modules())
        parts[WHOLE] = parts.pop("")
        for name in names:
            if name not in parts:
                near = get_close_matches(name, parts, n=5) or dict(self.named_children())
                raise ValueError(
                    f"freeze must name parts of the backbone, such as {', '.join(near)}, "
                    f"got {name!r}"
                )
        for name in names:
            parts[name].requires_grad_(False)
        self.frozen = self.frozen.union(names)
        self.train(self.training)

    def train(self: FreezableT, mode: bool = True) -> FreezableT:
        """Training mode or evaluation mode; what is frozen is in evaluation mode in both."""
        super().train(mode)
        if mode and self.frozen:
            for name, module in self.named_modules():
                if (name or WHOLE) in self.frozen:
                    module.eval()
        return self
