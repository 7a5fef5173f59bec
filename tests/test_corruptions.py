"""Corruptions: stronger with severity, the same for the same seed, and each as it is defined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from helpers.shapes import draw


@pytest.fixture(scope="module")
def images() -> Tensor:
    drawn = draw(np.arange(10), image_size=32, seed=0).images
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
class TestEveryCorruption:
    def test_changes_more_with_each_severity(self, corruption: str, images: Tensor) -> None:
        corrupted = torch.stack([corrupt(images, corruption, s) for s in SEVERITIES])
        changes = (corrupted.double() - images).square().mean((1, 2, 3, 4)).tolist()
        assert changes[0] > 0.5
        assert all(a < 1.01 * b for a, b in zip(changes, changes[1:], strict=False))
        assert changes[-1] > 1.5 * changes[0]

    def test_keeps_form_and_leaves_its_input_alone(self, corruption: str, images: Tensor) -> None:
        before = images.clone()
        for wide in (images, images[:, :, :20]):
            found = corrupt(wide, corruption, 3)
            assert found.dtype == torch.uint8 and found.shape == wide.shape
        assert torch.equal(images, before)

    def test_only_noise_depends_on_the_seed(self, corruption: str, images: Tensor) -> None:
        first, second, again = (corrupt(images, corruption, 4, seed=seed) for seed in (1, 2, 1))
        assert torch.equal(first, again)
        assert torch.equal(first, second) == (corruption != "noise")

    def test_an_image_does_not_depend_on_its_batch(self, corruption: str, images: Tensor) -> None:
        together = corrupt(images, corruption, 5)
        backwards = corrupt(images.flip(0), corruption, 5).flip(0)
        alone = torch.cat([corrupt(image[None], corruption, 5) for image in images])
        assert torch.equal(together, backwards) and torch.equal(together, alone)


def test_images_get_noise_of_their_own_and_of_the_stated_size() -> None:
    gray = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    gray[1] += 1
    first, second = corrupt(gray, "noise", 5).double() - gray.double()
    assert first.std() == pytest.approx(0.1 * 255, rel=0.03)
    assert abs(first.mean()) < 1
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.05


def test_noise_grows_along_one_direction(images: Tensor) -> None:
    gray = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    mild, strong = (corrupt(gray, "noise", s).double() - 128 for s in (1, 5))
    torch.testing.assert_close(mild * 2.5, strong, atol=2, rtol=0)


def test_noise_does_not_wrap() -> None:
    black, white = (torch.full((1, 3, 16, 16), v, dtype=torch.uint8) for v in (0, 255))
    assert corrupt(black, "noise", 5).max() < 128 < corrupt(white, "noise", 5).min()


@pytest.mark.parametrize(("size", "expected"), [(16, 1.0), (32, 1.0), (96, 3.0)])
def test_blur_spreads_a_point_by_its_strength(size: int, expected: float) -> None:
    point = torch.zeros((1, 3, size, size), dtype=torch.uint8)
    # A bright line: its profile across is the kernel, whatever the rounding in the other direction.
    point[..., size // 2] = 255
    profile = corrupt(point, "blur", 5)[0, 0, size // 2].double()
    position = torch.arange(size) - size // 2
    spread = ((profile * position**2).sum() / profile.sum()) ** 0.5
    assert float(spread) == pytest.approx(expected, rel=0.05)
    assert float(profile.sum()) == pytest.approx(255, abs=size / 4)


def test_contrast_scales_the_distance_from_each_channels_mean() -> None:
    image = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    image[0, 0, :4], image[0, 0, 4:] = 60, 100
    image[0, 2] = 200
    found = corrupt(image, "contrast", 2)[0]
    assert found[0].unique().tolist() == [70, 90]  # half the distance from 80
    assert found[1].unique().tolist() == [0] and found[2].unique().tolist() == [200]


def test_what_is_unknown_or_wrong_says_what_is_expected(images: Tensor) -> None:
    with pytest.raises(ValueError, match="'fog' is unknown; choose one of .'noise', 'blur"):
        corrupt(images, "fog", 1)
    for severity in (0, 6, -1, 2.5, "3", None):
        with pytest.raises(ValueError, match=f"severity is {severity!r}; expected a whole number"):
            corrupt(images, "blur", severity)
    for wrong in (images.float(), images[0], images[:, :1]):
        with pytest.raises(ValueError, match="expected uint8 and N x 3 x H x W"):
            corrupt(wrong, "blur", 1)
