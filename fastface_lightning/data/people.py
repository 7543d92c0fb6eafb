"""Who is trained on and who is held out: by their names, which a checkpoint keeps."""

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import printable
from .formats.names import Names

logger = logging.getLogger(__name__)


class People(NamedTuple):
    """Names of the identities of a run.

    Attributes:
        trained: those it trains on, by label.
        held_out: those it does not train on but verifies on.
        earlier: those that the weights it started from had been trained on, as far as is known.
    """

    trained: Sequence[str]
    held_out: Sequence[str] = ()
    earlier: Sequence[str] = ()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors: ``names``, (B,) uint8, all names in UTF-8, one after the other, and ``ends``,
        (N + 1,) int64, name i being ``names[ends[i]:ends[i + 1]]``; ``held_out``, (N,) bool; and
        ``earlier`` with ``earlier_ends``."""
        here = Names.of([*self.trained, *self.held_out])
        earlier = Names.of(self.earlier)
        held_out = torch.arange(len(here)) >= len(self.trained)
        arrays = {"names": here.blob, "ends": here.ends}
        arrays |= {"earlier": earlier.blob, "earlier_ends": earlier.ends}
        return {
            **{key: torch.from_numpy(np.array(value)) for key, value in arrays.items()},
            "held_out": held_out,
        }

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "People":
        """What :meth:`state_dict` gave."""
        here = Names(state["names"].numpy(), state["ends"].numpy())
        trained = len(here) - int(state["held_out"].sum())
        earlier = Names(state["earlier"].numpy(), state["earlier_ends"].numpy())
        return cls(here[:trained], here[trained:], earlier)

    @classmethod
    def in_checkpoint(cls, checkpoint: Any) -> "People | None":
        """Those whom a checkpoint tells of, by whatever data module; None where it does not."""
        for state in checkpoint.values() if isinstance(checkpoint, Mapping) else ():
            if isinstance(state, Mapping) and {"names", "ends", "held_out"} <= state.keys():
                return cls.of(state)
        return None

    def check_same(self, before: "People") -> None:
        """Refuse other people, or other labels, than before.

        Raises:
            ValueError: names the first difference.
        """
        for what, *lists in (
            ("trained on", before.trained, self.trained),
            ("held out", before.held_out, self.held_out),
        ):
            both = zip_longest(*lists)
            for number, (old, new) in enumerate(both):
                if (old and as_compared(old)) != (new and as_compared(new)):
                    old, new = (repr(printable(name)) if name else "nobody" for name in (old, new))
                    raise ValueError(
                        f"the people {what} must be those of the checkpoint, got "
                        f"{new} for {old}, the first that differ, as number {number + 1}: give the "
                        f"data it had, or begin anew with weights=FILE classifier.reinit=true"
                    )

    def warn_of_trained(self, name: str, shown: Sequence[str]) -> int:
        """Warn if a verification set shows people trained on, as far as names tell; returns how
        many."""
        if trained := common(shown, [*self.trained, *self.earlier]):
            logger.warning(
                "%s: %d of its %d people have names of people the model was trained on, such as "
                "%s: figures of them are no measure of the model",
                *(name, len(trained), len(shown), printable(min(trained))),
            )
        return len(trained)


def as_compared(name: str) -> str:
    """A name as it is compared with others: in NFC, of which file systems keep other forms."""
    return unicodedata.normalize("NFC", name)


def common(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Those of ``names`` that are among the others. Numbers are no names: any set has them."""
    if all(name.isdecimal() for name in names) or all(name.isdecimal() for name in others):
        return []
    known = set(map(as_compared, others))
    return [name for name in names if as_compared(name) in known]


def is_held_out(name: str, share: float) -> bool:
    """Whether a share of all people, chosen by their names alone, holds the one of this name.

    It does where the name's BLAKE2b hash of 64 bits (of its NFC form in UTF-8, read as a big-endian
    integer) lies below ``share`` x 2^64: more people, or others renamed, move nobody else. The
    share is met only approximately.

    Args:
        name: of the identity.
        share: in [0, 1].
    """
    text = as_compared(name).encode(errors="surrogateescape")  # any folder name
    digest = blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
