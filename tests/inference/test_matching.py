"""Whom a face belongs to, and from which cosine on."""

import pytest
import torch
from torch.nn import functional as F

from fastface_lightning.inference.matching import Gallery, find_threshold

SETS = {
    "few": {
        "accuracy": 0.8,
        "mirror": True,
        "people": 9,
        "impostors": 300,
        "far": {"1e-02": 0.01, "1e-01": 0.1},
        "cosine_thresholds": {"1e-02": 0.3, "1e-01": 0.2},
    },
    "many": {
        "accuracy": 0.9,
        "mirror": False,
        "people": None,
        "impostors": 30_000,
        "far": {"1e-04": 0.0, "1e-03": 0.0012, "1e-02": 0.01, "1e-01": 0.1},
        "cosine_thresholds": {"1e-04": None, "1e-03": 0.5, "1e-02": 0.0, "1e-01": -0.1},
    },
}


def test_a_threshold_is_that_of_the_largest_set_unless_another_is_named() -> None:
    """At the rate that was measured, the nearest to the one wanted."""
    model = {"thresholds": SETS}
    assert find_threshold(model) == (0.5, 0.0012, 30_000, None, "many", 0.9, False)
    assert find_threshold(model, 0.01) == (0.0, 0.01, 30_000, None, "many", 0.9, False)
    # As good as 300 pairs can say.
    assert find_threshold(model, measured_on="few") == (0.3, 1e-2, 300, 9, "few", 0.8, True)


@pytest.mark.parametrize(
    ("about", "settings", "message"),
    [
        ({}, {}, "threshold"),
        ({"thresholds": {}}, {}, "threshold"),
        ({"thresholds": SETS}, {"measured_on": "lfw"}, "few, many, got lfw"),
        ({"thresholds": SETS}, {"far": 1e-4}, "0.001, 0.01, 0.1, got 0.0001"),
        ({"thresholds": SETS}, {"far": 0.05, "measured_on": "few"}, "0.01, 0.1, got 0.05"),
    ],
)
def test_a_threshold_that_is_not_known_is_refused(
    about: dict, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_threshold(about, **settings)


def test_a_search_finds_what_comparing_with_everyone_finds() -> None:
    """Against loops; 5000 queries take more than one block of products."""
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(60, 16))
    names = [f"person {int(k)}" for k in torch.randint(20, (60,))]
    queries = F.normalize(torch.randn(5000, 16))
    gallery = Gallery(embeddings, names)
    assert gallery.people == list(dict.fromkeys(names))
    means = torch.stack(
        [
            torch.stack([e for e, n in zip(embeddings, names, strict=True) if n == name]).mean(0)
            for name in gallery.people
        ]
    )
    cosines = F.cosine_similarity(queries[:, None].double(), means[None].double(), dim=2)
    found = gallery.search(queries)
    torch.testing.assert_close(found.cosine.double(), cosines.max(1).values, atol=1e-6, rtol=0)
    assert torch.equal(found.person, cosines.argmax(1))
    for person, query in zip(found.person[:50].tolist(), queries, strict=False):
        mine = [i for i, name in enumerate(names) if name == gallery.people[person]]
        best = max(mine, key=lambda i: float(embeddings[i] @ query))
        assert gallery.nearest_entry(person, query) == best


def test_a_gallery_refuses_what_it_cannot_search() -> None:
    with pytest.raises(ValueError, match="a name for each"):
        Gallery(torch.eye(3), ["anna"])
    with pytest.raises(ValueError, match="at least 1"):
        Gallery(torch.empty(0, 3), [])
    with pytest.raises(ValueError, match="finite"):
        Gallery(torch.full((1, 3), torch.nan), ["anna"])
    gallery = Gallery(torch.eye(3), ["anna", "ben", "anna"])
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        gallery.search(torch.eye(4))
    with pytest.raises(ValueError, match="finite"):
        gallery.search(torch.full((1, 3), torch.nan))
    assert len(gallery.search(torch.empty(0, 3)).person) == 0
