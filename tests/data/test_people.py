"""Who is trained on and who is held out, by name, and what a checkpoint keeps of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastface_lightning.data import People, is_held_out
from fastface_lightning.data.people import common

NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, max_size=8)


def test_who_is_held_out_is_a_function_of_the_name() -> None:
    # b2sum -l 64 of the names in UTF-8: 2408415a125a9f1b and dbfdd8f55175fdad
    for name, place in (("José", 0x2408415A125A9F1B), ("Aaron_Peirsol", 0xDBFDD8F55175FDAD)):
        share = place / 2**64
        assert [is_held_out(name, s) for s in (0, share - 1e-9, share + 1e-9, 1)] == [0, 0, 1, 1]
    assert is_held_out("Jose\u0301", 0.141) and not is_held_out("Jose\u0301", 0.140)
    assert is_held_out("no UTF-8 \udcff", 1.0)
    share = np.mean([is_held_out(str(number), 0.3) for number in range(5000)])
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 5000) ** 0.5


@given(NAMES, NAMES, NAMES)
def test_a_checkpoint_keeps_them(
    trained: list[str], held_out: list[str], earlier: list[str]
) -> None:
    people = People(trained, held_out, earlier)
    again = People.of(people.state_dict())
    assert all(list(a) == list(b) for a, b in zip(people, again, strict=True))
    again.check_same(people)


def test_a_file_with_them_holds_tensors_alone(tmp_path: Path) -> None:
    state = People(["ann", "cem"], ["bob"], ["no UTF-8 \udcff"]).state_dict()
    torch.save({"run": {}, "AnyData": state}, tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert bytes(saved["AnyData"]["names"]) == b"anncembob"
    assert saved["AnyData"]["ends"].tolist() == [0, 3, 6, 9]
    assert saved["AnyData"]["held_out"].tolist() == [False, False, True]
    assert People.in_checkpoint(saved) == (["ann", "cem"], ["bob"], ["no UTF-8 \udcff"])
    assert People.in_checkpoint({"state_dict": {}}) is People.in_checkpoint([]) is None


def test_names_are_compared_in_one_form_and_numbers_not_at_all() -> None:
    assert common(["Jose\u0301", "ann"], ["José", "bob"]) == ["Jose\u0301"]
    assert common(["7", "8"], ["7", "9"]) == common(["7", "8"], ["7", "ann"]) == ["7"] * 0
    People(["Jose\u0301"]).check_same(People(["José"]))


@pytest.mark.parametrize(
    ("people", "first"),
    [
        (
            People(["ann", "bill", "cem"], ["dan", "eva"]),
            "trained on .* got 'bill' for 'bob'.*number 2",
        ),
        (People(["ann", "bob"], ["dan", "eva"]), "trained on .* got nobody for 'cem'.*number 3"),
        (People(["ann", "bob", "cem"], ["dan", "eva", "flo"]), "held out .* got 'flo' for nobody"),
        (People(["bob", "ann", "cem"], ["dan", "eva"]), "trained on .* got 'bob' for 'ann'"),
    ],
)
def test_other_people_are_refused_by_the_first_difference(people: People, first: str) -> None:
    with pytest.raises(ValueError, match=first):
        people.check_same(People(["ann", "bob", "cem"], ["dan", "eva"]))
