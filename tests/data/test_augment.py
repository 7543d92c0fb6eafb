"""Augmentation agrees with plain code for one image at a time, and is blind to the data."""

import math
from itertools import permutations
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import RandAugment

from fastface_lightning.data.augment import (
    INTERPOLATIONS,
    Augment,
    coarsen_some,
    crop_some,
    recolor_some,
    resizing_matrix,
    resizing_tables,
)
from fastface_lightning.data.datasets.synthetic_faces import draw_face

KINDS = ("flip", "crop", "low_resolution", "photometric")


def noise(n: int, height: int = 112, width: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(n + height)
    shape = n, 3, height, width or height
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def faces(n: int) -> Tensor:
    return torch.from_numpy(np.stack([draw_face(5, i, 0) for i in range(n)]))


def only(kind: str, p: float = 1.0) -> Augment:
    return Augment(**{**dict.fromkeys(KINDS, 0.0), kind: p})


def with_draws(draws: list[list[float]]) -> "patch[object]":
    """Let the next ``torch.rand`` give these numbers, reshaped as it was asked for."""
    numbers = torch.tensor(draws)
    return patch("torch.rand", lambda *shape, device: numbers.reshape(shape).to(device))


def changed(before: Tensor, after: Tensor) -> list[bool]:
    return (before != after).flatten(1).any(1).tolist()


class TestContract:
    def test_the_default_is_the_papers_flip_in_one_draw(self) -> None:
        images = noise(64)
        torch.manual_seed(3)
        mirrored = torch.rand(64, 1, 1, 1) < 0.5
        after = torch.rand(())
        expected = torch.stack(
            [x.flip(-1) if m else x for x, m in zip(images, mirrored, strict=True)]
        )
        torch.manual_seed(3)
        assert torch.equal(Augment()(images), expected)
        assert torch.rand(()) == after

    def test_probabilities_of_zero_draw_nothing_and_copy_nothing(self) -> None:
        images = noise(4)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        assert Augment(0, 0, 0, 0)(images) is images
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_seed_alone_decides_not_memory_format_nor_precision(
        self, layout: torch.memory_format
    ) -> None:
        images, augment = faces(20), Augment(1, 1, 1, 1, 2)
        before = images.clone()
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(runs)):
                runs.append(augment(images.contiguous(memory_format=layout) if runs else images))
        assert torch.equal(images, before), "the batch given is changed"
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
        assert runs[1].is_contiguous(memory_format=layout)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_share_of_changed_images_is_the_probability(self, kind: str) -> None:
        images, n = faces(16).repeat(125, 1, 1, 1)[:, :, 40:72, 40:72], 2000
        torch.manual_seed(1)
        share = sum(changed(images, only(kind, 0.2)(images))) / n
        assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n)
        # A window of all but the whole area, or 31 of 32 pixels, is a change one may not see.
        assert sum(changed(images, only(kind, 1.0)(images))) > 0.9 * n
        assert not any(changed(images, only(kind, 1e-12)(images)))

    @given(n=st.integers(0, 3), height=st.integers(1, 24), width=st.integers(1, 24))
    @settings(max_examples=30)
    def test_any_shape(self, n: int, height: int, width: int) -> None:
        images = noise(n, height, width)
        found = Augment(1, 1, 1, 1, 3)(images)
        assert found.shape == images.shape and found.dtype == torch.uint8

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_nothing_depends_on_the_data(self, device: str) -> None:
        # A fake tensor has no values: `.item()`, `nonzero` and Boolean masks raise here, and
        # those are what makes a host wait for its device.
        resizing_tables.cache_clear()
        with FakeTensorMode():
            images = torch.empty(6, 3, 112, 112, dtype=torch.uint8, device=device)
            found = Augment(0.5, 0.5, 0.5, 0.5)(images)
        resizing_tables.cache_clear()
        assert found.shape == images.shape and found.dtype == images.dtype
        assert found.device.type == device

    def test_other_probabilities_and_images_are_refused(self) -> None:
        for kind in KINDS:
            for p in (-0.1, 1.1, float("nan")):
                with pytest.raises(ValueError, match=f"{kind} must be a probability"):
                    only(kind, p)
        for ops in (-1, 0.5, True):
            with pytest.raises(ValueError, match=f"rand_augment must be .*, got {ops}"):
                Augment(rand_augment=ops)
        for shape, dtype in (((2, 3, 8, 8), torch.float), ((3, 8, 8), torch.uint8)):
            with pytest.raises(ValueError, match="images must be uint8"):
                Augment()(torch.zeros(shape, dtype=dtype))


def window(image: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is not black in a white image."""
    rows, columns = image[0].any(1).nonzero(), image[0].any(0).nonzero()
    (top, bottom), (left, right) = rows.aminmax(), columns.aminmax()
    return int(top), int(left), int(bottom - top) + 1, int(right - left) + 1


class TestCrop:
    def test_inside_the_window_all_stays_and_outside_is_black(self) -> None:
        torch.manual_seed(0)
        images = noise(32).clamp_(min=1)
        for image, found in zip(images, crop_some(images, 1.0), strict=True):
            top, left, height, width = window(found)
            expected = torch.zeros_like(image)
            inside = (..., slice(top, top + height), slice(left, left + width))
            expected[inside] = image[inside]
            assert torch.equal(found, expected)

    def test_numbers_become_the_window_that_torchvision_would_take(self) -> None:
        # Plain twin: the rule of RandomResizedCrop.get_params with the draws given.
        generator = np.random.default_rng(0)
        draws = generator.random((23, 50), np.float32)
        white = torch.full((50, 3, 90, 112), 255, dtype=torch.uint8)
        with with_draws(draws.tolist()):
            found = crop_some(white, 1.0)
        for image, u in zip(found, draws.T.astype(float), strict=True):
            for scale, aspect in zip(u[3:13], u[13:], strict=True):
                area = 90 * 112 * (0.2 + 0.8 * scale)
                ratio = math.exp(math.log(3 / 4) + aspect * math.log(16 / 9))
                height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
                if height <= 90 and width <= 112:
                    break
            top, left = int(u[1] * (90 - height + 1)), int(u[2] * (112 - width + 1))
            assert window(image) == (top, left, height, width)

    def test_where_no_window_fits_the_image_stays(self) -> None:
        images = noise(1, 112, 30)  # narrower than 3 : 4, and the full area is asked for
        draws = [0.0, 0.5, 0.5] + 10 * [0.999] + 10 * [0.9]
        with with_draws([[u] for u in draws]):
            assert torch.equal(crop_some(images, 1.0), images)


# cv2.resize of the float32 line below by OpenCV 5.0.0, from 8 pixels to 5 and to 11.
LINE = np.array([10, 200, 30, 90, 250, 0, 120, 60], np.float32)
OPENCV: dict[str, tuple[list[float], list[float]]] = {
    "nearest": (
        [10.0, 200.0, 90.0, 250.0, 120.0],
        [10.0, 10.0, 200.0, 30.0, 30.0, 90.0, 250.0, 0.0, 0.0, 120.0, 60.0],
    ),
    "area": (
        [81.25, 80.0, 170.0, 61.25, 82.5],
        [10.0, 128.75, 157.5, 30.0, 82.5, 170.0, 218.75, 0.0, 90.0, 97.5, 60.0],
    ),
    "linear": (
        [67.0, 47.0, 170.0, 12.0, 78.0],
        [10.0, 122.273, 145.909, 32.727, 76.364, 170.0, 193.182, 11.364, 81.818, 95.455, 60.0],
    ),
    "cubic": (
        [71.042, 41.578, 199.062, -4.942, 82.41],
        [-4.494, 142.573, 167.234, 26.618, 56.427, 199.062, 211.861, 5.408, 77.898, 108.97, 55.423],
    ),
    "lanczos": (
        [75.84, 49.304, 223.678, -6.765, 94.658],
        [-9.405, 147.1, 175.937, 22.355, 35.372, 223.678, 205.024, 5.482, 66.724, 126.016, 49.673],
    ),
}


class TestLowResolution:
    @pytest.mark.parametrize("kind", INTERPOLATIONS)
    def test_matrices_against_opencv(self, kind: str) -> None:
        for expected in OPENCV[kind]:
            found = resizing_matrix(kind, 8, len(expected)) @ LINE
            np.testing.assert_allclose(found, expected, atol=2e-3)

    @pytest.mark.parametrize("sharp", [False, True])
    def test_a_batch_against_one_image_at_a_time(self, sharp: bool) -> None:
        images = (noise(40) > 127).byte() * 255 if sharp else faces(40)
        overshoots = 0
        draws = np.random.default_rng(0).random((4, 40), np.float32)
        draws[0] = np.where(np.arange(40) % 4, 0.1, 0.9)
        with with_draws(draws.tolist()):
            found = coarsen_some(images, 0.5)
        for image, result, (chosen, ratio, down, up) in zip(images, found, draws.T, strict=True):
            if chosen >= 0.5:
                assert torch.equal(result, image)
                continue
            side = int((0.2 + 0.8 * float(ratio)) * 112)
            shrink = resizing_matrix(INTERPOLATIONS[int(down * 5)], 112, side)
            enlarge = resizing_matrix(INTERPOLATIONS[int(up * 5)], side, 112)
            small = shrink @ image.numpy().astype(float) @ shrink.T
            plain = enlarge @ small @ enlarge.T
            np.testing.assert_allclose(result, plain.clip(0, 255), atol=0.5 + 1e-3)
            overshoots += bool((plain < -20).any() and (plain > 275).any())
        assert overshoots > 10 or not sharp  # where a byte would wrap


ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)


def draws_for(order: tuple[int, ...], factors: tuple[float, ...]) -> list[list[float]]:
    """Numbers that make one image's changes come in this order with these factors."""
    ranks = [0.0] * 3
    for place, kind in enumerate(order):
        ranks[kind] = 0.1 + 0.3 * place
    return [[0.0], *([r] for r in ranks), *([f - 0.5] for f in factors)]


class TestPhotometric:
    @pytest.mark.parametrize("order", list(permutations(range(3))))
    def test_all_orders_against_torchvision_in_floats(self, order: tuple[int, ...]) -> None:
        for factors in ((1.4, 0.7, 1.35), (0.5, 1.0, 1.0), (1.49, 1.0, 1.0)):
            for image in faces(4):
                expected = image / 255
                for kind, factor in zip(order, factors, strict=True):
                    expected = ADJUST[kind](expected, factor)
                with with_draws(draws_for(order, factors)):
                    result = recolor_some(image[None], 1.0)[0]
                # torchvision's gray is 0.2989 R + ..., of weights that add up to 0.9999
                assert (result - expected * 255).abs().max() < 0.6

    def test_white_and_black_do_not_wrap(self) -> None:
        images = torch.zeros(2, 3, 7, 7, dtype=torch.uint8)
        images[1] = 255
        for factor, white in ((1.5, 255), (0.5, 128)):  # 127.5 is rounded to the even byte
            draws = [[u, u] for (u,) in draws_for((0, 1, 2), (factor, 1.0, 1.0))]
            with with_draws(draws):
                found = recolor_some(images, 1.0)
            assert not found[0].any() and (found[1] == white).all()


class TestRandAugment:
    def test_each_eighth_of_a_batch_is_as_torchvisions_of_its_own_draw(self) -> None:
        images = faces(20)
        torch.manual_seed(2)
        expected = torch.cat([RandAugment(2)(part) for part in images.split(3)])  # 7 parts
        torch.manual_seed(2)
        assert torch.equal(Augment(flip=0, rand_augment=2)(images), expected)

    def test_parts_differ_and_identity_is_one_of_fourteen(self) -> None:
        """An image augmented 800 times: it stays as often as its operation is the identity."""
        images = faces(1).expand(8, -1, -1, -1)
        torch.manual_seed(0)
        found = torch.cat([Augment(flip=0, rand_augment=1)(images) for _ in range(100)])
        kinds, counts = found.flatten(1).unique(dim=0, return_counts=True)
        assert len(kinds) == 14 + 9  # nine have two signs
        (same,) = counts[(kinds == images[0].flatten()).all(1)]
        assert abs(same / 800 - 1 / 14) < 4 * math.sqrt(1 / 14 * 13 / 14 / 800)
