"""Whose face is it? Two embeddings compared, or one searched for among the people enrolled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..evaluation.checks import check_embeddings

BLOCK = 4096  # queries compared at a time
DEFAULT_FAR = 1e-3


class Threshold(NamedTuple):
    """From which cosine on two images are taken for one person, and what that is known from.

    Attributes:
        cosine: the least that is accepted.
        far: false accept rate there, the share of pairs of two people that pass.
        impostors: number of pairs of two people that it was measured on.
        people: number of people in them, as far as that is known.
        measured_on: name of their set.
        accuracy: of the model on it, over ten folds.
        mirror: whether the embeddings were those of an image plus its mirror image; with others
            the rate is another.
    """

    cosine: float
    far: float | None = None
    impostors: int | None = None
    people: int | None = None
    measured_on: str | None = None
    accuracy: float | None = None
    mirror: bool = True

    def __str__(self) -> str:
        if self.far is None:
            return f"{self.cosine:.4f}"
        of = "" if self.people is None else f" of {self.people:,} people"
        return (
            f"{self.cosine:.4f}, passed by {100 * self.far:.2g} % of pairs of two people "
            f"({self.measured_on}, {self.impostors:,} such pairs{of}; accuracy {self.accuracy:.1%})"
        )


def find_threshold(
    about: Mapping[str, Any], far: float | None = None, measured_on: str | None = None
) -> Threshold:
    """The threshold that a model's file holds.

    Args:
        about: of an :class:`fastface_lightning.inference.embedder.Embedder`; its ``thresholds``
            come from the run, or from the evaluation that ``recipes/export.py`` was given.
        far: wanted false accept rate, one of 1e-6, 1e-5 … 1e-1; None: 1e-3, or the least that the
            set can show if that is more. The threshold's own is the nearest that was measured.
        measured_on: name of the set; None: that with the most pairs of two people.

    Raises:
        ValueError: the file holds no threshold, not of this set, or not at this rate.

    Example:
        >>> lfw = {"accuracy": 0.99, "impostors": 3000, "people": None, "mirror": True}
        >>> lfw |= {"far": {"1e-03": 0.001}, "cosine_thresholds": {"1e-03": 0.25}}
        >>> find_threshold({"thresholds": {"lfw": lfw}}).cosine
        0.25
    """
    sets = about.get("thresholds") or {}
    if not sets:
        raise ValueError(
            "a model must hold a threshold, got one that was verified on no ten pairs of two "
            "people it was not trained on: give threshold=COSINE, or export it with evaluation=FILE"
        )
    name = measured_on or max(sets, key=lambda each: sets[each]["impostors"])
    if name not in sets:
        raise ValueError(f"measured_on must be one of {', '.join(sets)}, got {name}")
    rates = sets[name]
    known = {
        float(key): key for key, cosine in rates["cosine_thresholds"].items() if cosine is not None
    }
    if far is None:
        far = min((each for each in known if each >= DEFAULT_FAR), default=None)
    if far not in known:
        listed = ", ".join(f"{each:g}" for each in sorted(known)) or "none"
        raise ValueError(f"far must be one that {name} has a threshold for, {listed}, got {far}")
    return Threshold(
        rates["cosine_thresholds"][known[far]],
        rates["far"][known[far]],
        rates["impostors"],
        rates["people"],
        name,
        rates["accuracy"],
        rates["mirror"],
    )


class Matches(NamedTuple):
    """The nearest person of each query.

    Attributes:
        person: place in ``Gallery.people``, (N,) int64.
        cosine: to that person's template, (N,) float32.
    """

    person: Tensor
    cosine: Tensor


class Gallery:
    """People enrolled, each by the mean of the embeddings of his or her images, of length 1.

    Args:
        embeddings: (M, D) float32, of length 1, one or several of each person.
        names: M names, of each embedding's person.

    Attributes:
        people: the P different names, in order of first occurrence.
        templates: (P, D), of length 1.

    Raises:
        ValueError: no embedding, one that is not finite, or unequal numbers.

    Example:
        >>> gallery = Gallery(torch.eye(3), ["anna", "ben", "ben"])
        >>> gallery.search(torch.tensor([[0.0, 0.6, 0.8]])).person
        tensor([1])
    """

    def __init__(self, embeddings: Tensor, names: Sequence[str]) -> None:
        check_embeddings(embeddings)
        if len(names) != len(embeddings) or not len(names):
            raise ValueError(
                f"a gallery must have a name for each of its embeddings, at least 1, got "
                f"{len(names)} names and {len(embeddings)} embeddings"
            )
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        self.people = list(places)
        self._person = torch.tensor([places[name] for name in names])
        self._embeddings = embeddings
        sums = embeddings.new_zeros(len(places), embeddings.shape[1])
        self.templates = F.normalize(sums.index_add_(0, self._person, embeddings))

    def search(self, queries: Tensor) -> Matches:
        r"""Find the nearest person of each query, whoever it is: compare ``cosine`` with a
        threshold. In a gallery of P people a stranger is above the threshold of a false accept rate
        f for one of them about :math:`1 - (1 - f)^P` of the time.

        Args:
            queries: (N, D) float32, of length 1.

        Raises:
            ValueError: an embedding that is not finite, or of another width.
        """
        check_embeddings(queries)
        if queries.shape[1] != self.templates.shape[1]:
            raise ValueError(
                f"queries must be (N, {self.templates.shape[1]}), got {tuple(queries.shape)}"
            )
        best = [(rows @ self.templates.T).max(1) for rows in queries.split(BLOCK)]
        cosines, people = zip(*best, strict=True)
        return Matches(torch.cat(people), torch.cat(cosines))

    def nearest_entry(self, person: int, query: Tensor) -> int:
        """Which of the embeddings enrolled, of ``person``, is most like a query, (D,)."""
        entries = (self._person == person).nonzero()[:, 0]
        return int(entries[(self._embeddings[entries] @ query).argmax()])
