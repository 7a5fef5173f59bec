"""Batches: every choice from (seed, epoch), every batch equal to a slow and simple reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide
from torchvision.transforms.v2 import functional as transforms

from helpers import loader
from helpers.data import Split
from helpers.loader import (
    NO_AUGMENTATION,
    Augmentation,
    EpochChoices,
    Loader,
    epoch_choices,
    jitter,
    normalise,
    trivial_augment,
)

EVERY = Augmentation(True, 4, 8, 0.3, True, 0.4)
MEAN, STD = torch.tensor([0.3, 0.5, 0.7]), torch.tensor([0.2, 0.3, 0.1])
CPU = torch.device("cpu")


def noise(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def smooth(count: int, size: int) -> Tensor:
    """Images with soft gradients, as photographs have, so that colours aren't all clipped."""
    ramp = torch.linspace(40, 200, size).expand(size, -1)
    channels = torch.stack([ramp, ramp.T, ramp.flip(1)])
    return (channels + torch.arange(count).view(-1, 1, 1, 1)).to(torch.uint8)


def loader_of(augmentation: Augmentation, *, size: int = 32, **options: object) -> Loader:
    split = Split(noise(23, size), torch.arange(23))
    return Loader(split, MEAN, STD, **{"batch_size": 5, "augmentation": augmentation} | options)


def gathered(batches: Loader, epoch: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches.batches(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def choices(seed: int, epoch: int, augmentation: Augmentation = EVERY) -> EpochChoices:
    return epoch_choices(200, augmentation, 32, True, seed, epoch)


def test_choices_follow_from_seed_and_epoch_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = choices(0, 1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator stays as it was"
    torch.manual_seed(1)
    for name, chosen in first._asdict().items():
        assert torch.equal(chosen, getattr(choices(0, 1), name))
        for other in (choices(0, 2), choices(1, 1), choices(1, 0), choices(2**32 - 1, 1)):
            assert not torch.equal(chosen, getattr(other, name)), name


def test_choices_cover_their_ranges_evenly() -> None:
    found = epoch_choices(20_000, Augmentation(crop_padding=2, mixup=0.4), 32, True, 0, 0)
    assert sorted(found.order.tolist()) == list(range(20_000))
    assert found.flips.float().mean() == pytest.approx(0.5, abs=0.02)
    for axis in (0, 1):
        shares = torch.bincount(found.shifts[:, axis]) / 20_000
        torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.015, rtol=0)
        assert (found.holes[:, axis].min(), found.holes[:, axis].max()) == (0, 31)
    for drawn in (found.shifts.float(), found.holes.float(), found.colours):
        assert (torch.corrcoef(drawn.T) - torch.eye(drawn.shape[1])).abs().max() < 0.03
    assert -1 <= found.colours.min() < -0.99 and 0.99 < found.colours.max() <= 1
    assert len(found.seeds.unique()) == 20_000
    # Mean and variance of Beta(a, a).
    assert found.shares.mean() == pytest.approx(0.5, abs=0.01)
    assert found.shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.005)


def test_flips_alternate_by_epoch_and_only_where_they_may() -> None:
    flips = [choices(3, epoch).flips for epoch in range(6)]
    for earlier, later in zip(flips, flips[1:], strict=False):
        assert torch.equal(earlier, ~later)
    for flip, flippable in ((False, True), (True, False)):
        for epoch in range(3):
            augmentation = Augmentation(flip=flip)
            assert not epoch_choices(64, augmentation, 32, flippable, 0, epoch).flips.any()


AUGMENTATIONS = {
    "none": NO_AUGMENTATION,
    "flip": Augmentation(flip=True, crop_padding=0),
    "large crop": Augmentation(flip=False, crop_padding=16),
    "cutout": Augmentation(flip=False, crop_padding=0, cutout=7),
    "two": Augmentation(flip=True, crop_padding=4, cutout=12),
    "jitter": Augmentation(colour_jitter=0.4),
    "operations": Augmentation(trivial_augment=True),
    "mixup": Augmentation(mixup=0.4),
    "every": EVERY,
}


def reference(batches: Loader, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Do an epoch slowly, image by image, in numpy and float64 where possible."""
    split, augmentation = batches.split, batches.augmentation
    size = split.images.shape[-1]
    chosen = epoch_choices(len(split), augmentation, size, batches.flippable, batches.seed, epoch)
    padding = round(augmentation.crop_padding * size / 32)
    side = round(augmentation.cutout * size / 32)
    images, labels = [], []
    for index in chosen.order.tolist()[: len(batches) * batches.batch_size]:
        image = split.images[index].numpy()
        image = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
        top, left = chosen.shifts[index].tolist()
        image = image[:, top : top + size, left : left + size]
        if chosen.flips[index]:
            image = image[:, :, ::-1]
        if augmentation.trivial_augment:
            torch.manual_seed(int(chosen.seeds[index]))
            image = TrivialAugmentWide()(torch.from_numpy(image.copy())).numpy()
        changes = augmentation.colour_jitter * chosen.colours[index : index + 1]
        image = jitter(torch.from_numpy(image.copy())[None], changes)[0].numpy()
        pixels = (image / 255 - MEAN.numpy()[:, None, None]) / STD.numpy()[:, None, None]
        row, column = (n - side // 2 for n in chosen.holes[index].tolist())
        columns = slice(max(column, 0), max(column + side, 0))
        pixels[:, max(row, 0) : max(row + side, 0), columns] = 0
        images.append(pixels)
        labels.append(np.eye(len(split))[index] if augmentation.mixup else index)
    for batch, share in enumerate(chosen.shares[: len(batches)].tolist()):
        places = slice(batch * batches.batch_size, (batch + 1) * batches.batch_size)
        for values in (images, labels) if augmentation.mixup else ():
            pairs = zip(values[places], values[places][::-1], strict=True)
            values[places] = [share * a + (1 - share) * b for a, b in pairs]
    return np.stack(images), np.array(labels)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
@pytest.mark.parametrize("size", [16, 33])
def test_batches_equal_the_slow_reference(augmentation: Augmentation, size: int) -> None:
    batches = loader_of(augmentation, size=size, seed=4)
    for epoch in (0, 3, 0):
        images, labels = gathered(batches, epoch)
        expected, expected_labels = reference(batches, epoch)
        np.testing.assert_allclose(labels, expected_labels, atol=1e-6)
        np.testing.assert_allclose(images, expected, atol=2e-5)


@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, EVERY])
def test_batches_have_a_shape_a_type_and_a_memory_format(augmentation: Augmentation) -> None:
    torch.manual_seed(0)
    state, batches = torch.get_rng_state(), loader_of(augmentation)
    before = batches.split.images.clone()
    found = list(batches.batches(0))
    assert len(found) == len(batches) == 4
    for images, labels in found:
        assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        soft = augmentation.mixup > 0
        assert labels.shape == ((5, 23) if soft else (5,))
        assert labels.dtype == (torch.float32 if soft else torch.int64)
        images.zero_()
    assert torch.equal(batches.split.images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_image_comes_at_most_once_an_epoch_and_all_in_time() -> None:
    seen: set[int] = set()
    for epoch in range(6):
        labels = gathered(loader_of(NO_AUGMENTATION), epoch)[1].tolist()
        assert len(set(labels)) == len(labels) == 20
        seen |= set(labels)
    assert seen == set(range(23))


def test_half_of_the_free_memory_of_a_gpu_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert loader.fits(torch.device("cuda"), 499) and not loader.fits(torch.device("cuda"), 500)
    assert loader.fits(CPU, 1e15)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_batches_come_to_the_device_wherever_the_images_lie(
    fits: bool, mixup: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On "meta" any tensor left behind would raise: operations take tensors of one device."""
    asked = []
    monkeypatch.setattr(loader, "fits", lambda device, size: asked.append(size) or fits)
    batches = loader_of(Augmentation(True, 4, 8, 0.3, False, mixup), device=torch.device("meta"))
    for images, labels in batches.batches(0):
        assert images.device.type == labels.device.type == "meta"
        assert images.shape == (5, 3, 32, 32)
    assert asked == [pytest.approx(23 * 3 * 40 * 40)], "the padded images, once"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_batches_are_equal_on_every_device(
    augmentation: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gathered(loader_of(augmentation), 1)
    for fits in (True, False):
        monkeypatch.setattr(loader, "fits", lambda device, size, fits=fits: fits)
        found = gathered(loader_of(augmentation, device=torch.device("cuda")), 1)
        torch.testing.assert_close(found[1].cpu(), expected[1])
        torch.testing.assert_close(found[0].cpu(), expected[0], atol=0.05, rtol=0)


def test_jitter_is_torchvisions_brightness_then_contrast_then_saturation() -> None:
    images = smooth(6, 16)
    changes = torch.tensor(
        [[0.0, 0, 0], [0.3, 0, 0], [0, -0.4, 0], [0, 0, 0.5], [-0.2, 0.3, -0.6], [0.9, 0.9, 0.9]]
    )
    changed = jitter(images, changes)
    assert changed.dtype == torch.uint8 and torch.equal(changed[0], images[0])
    for image, found, change in zip(images, changed, (1 + changes).tolist(), strict=True):
        expected = transforms.adjust_brightness(image.float() / 255, change[0])
        expected = transforms.adjust_contrast(expected, change[1])
        expected = transforms.adjust_saturation(expected, change[2])
        torch.testing.assert_close(found.float(), 255 * expected, atol=1.0, rtol=0)


def test_trivial_augment_is_torchvisions_decided_by_each_images_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, seeds = smooth(40, 16), torch.arange(40)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.delattr(torch.cuda, "manual_seed_all")  # dropout draws from the GPU's generator
        changed = trivial_augment(images, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trivial_augment(images[3:7], seeds[3:7]), changed[3:7])
    assert not torch.equal(trivial_augment(images, seeds + 100), changed)
    for image, seed, found in zip(images, seeds.tolist(), changed, strict=True):
        torch.manual_seed(seed)
        assert torch.equal(TrivialAugmentWide()(image), found)
    same = [torch.equal(a, b) for a, b in zip(images, changed, strict=True)]
    assert sum(same) < 20  # one of its operations leaves the image as it is


def test_normalised_images_have_mean_zero_and_standard_deviation_one() -> None:
    images = noise(30, 12)
    std, mean = torch.std_mean(images / 255, (0, 2, 3), correction=0)
    out = normalise(images, mean, std)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    with pytest.raises(TypeError, match=r"torch.float32; expected uint8"):
        normalise(images / 255, MEAN, STD)
