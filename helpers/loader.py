"""Batches: augmented, normalised images from a split that lies in memory as one uint8 tensor.

All random choices of an epoch are drawn at once from (seed, epoch), so that an epoch repeats
exactly. Shuffling and cropping a batch are one indexing operation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide

from helpers.config import memory_format, settings
from helpers.data import Split


@settings
class Augmentation:
    """What happens to a training image: it is mirrored, shifted, partly blanked out, recoloured.

    `crop_padding` and `cutout` are pixels at an image size of 32 and scale with it. A shift is a
    random crop after reflect-padding by `crop_padding`; cutout (DeVries and Taylor, 2017) sets a
    square of side `cutout` to the mean colour. `colour_jitter` is the largest relative change of
    brightness, contrast and saturation. `trivial_augment` applies one random operation of random
    strength (Müller and Hutter, ICCV 2021, wide space). `mixup` is the parameter alpha of the Beta
    distribution from which the share of a second image, and of its label, is drawn (Zhang et al.,
    ICLR 2018); labels are then class probabilities. Raises ValueError for a setting out of range.
    """

    flip: bool = True
    crop_padding: Annotated[int, Field(ge=0, le=16)] = 4
    cutout: Annotated[int, Field(ge=0, le=32)] = 0
    colour_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    trivial_augment: bool = False
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0


NO_AUGMENTATION = Augmentation(flip=False, crop_padding=0)


class EpochChoices(NamedTuple):
    """Every random choice of one epoch of N images."""

    order: Tensor  # N
    flips: Tensor  # N, bool
    shifts: Tensor  # N x 2
    holes: Tensor  # N x 2, centres of cut-outs
    colours: Tensor  # N x 3, changes in -1 to 1
    seeds: Tensor  # N, of the operations of TrivialAugment
    shares: Tensor  # of the image in a mixture, one a batch


def epoch_choices(
    count: int, augmentation: Augmentation, image_size: int, flippable: bool, seed: int, epoch: int
) -> EpochChoices:
    """Draw an epoch's choices from one CPU generator that (seed, epoch) alone decide.

    Flips alternate: an image mirrored in one epoch isn't in the next (Jordan, "94% on CIFAR-10 in
    3.29 Seconds", 2024).
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=generator)
    padding = round(augmentation.crop_padding * image_size / 32)
    shifts = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
    holes = torch.randint(0, image_size, (count, 2), generator=generator)
    first = torch.Generator().manual_seed((seed * 1_000_003 + 999_983) % 2**63)
    flips = (torch.randint(0, 2, (count,), generator=first) + epoch) % 2 == 1
    flips &= augmentation.flip and flippable
    colours = 2 * torch.rand((count, 3), generator=generator) - 1
    seeds = torch.randint(0, 2**62, (count,), generator=generator)
    shares = torch.ones(count)
    if augmentation.mixup:  # torch's Beta distribution takes no generator of one's own
        drawn = np.random.default_rng([seed, epoch]).beta(*[augmentation.mixup] * 2, count)
        shares = torch.from_numpy(drawn.astype(np.float32))
    return EpochChoices(order, flips, shifts, holes, colours, seeds, shares)


def cut_out(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Set a square of `side` pixels around each centre (N x 2: row, column) to 0, the mean."""
    places, first = torch.arange(images.shape[-1], device=images.device), centres - side // 2
    inside = (places >= first[..., None]) & (places < first[..., None] + side)
    hole = inside[:, 0, None, :, None] & inside[:, 1, None, None, :]
    # masked_fill would return another memory format; the copy keeps channels last.
    return images.clone().masked_fill_(hole, 0.0)


def jitter(images: Tensor, changes: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of N x 3 x H x W uint8 images.

    `changes` is N x 3: relative changes above -1; 0 leaves the image as it is. Contrast spreads the
    values around the image's mean luma, saturation around each pixel's (ITU-R BT.601 weights).
    """
    brightness, contrast, saturation = (1 + changes).view(-1, 3, 1, 1, 1).unbind(1)

    def luma(image: Tensor) -> Tensor:  # a tensor of the weights would be sent, and waited for
        red, green, blue = image.split(1, 1)
        return 0.299 * red + 0.587 * green + 0.114 * blue

    image = (images.float() * brightness).clamp(0, 255)
    mean = luma(image).mean((2, 3), keepdim=True)
    image = (mean + contrast * (image - mean)).clamp(0, 255)
    gray = luma(image)
    return (gray + saturation * (image - gray)).clamp(0, 255).round().to(torch.uint8)


def trivial_augment(images: Tensor, seeds: Tensor) -> Tensor:
    """Apply TrivialAugment (torchvision's, wide space) to N x 3 x H x W uint8 images, one by one.

    `seeds` (N, int64) decide operation and strength. torch's global generator stays as it was.
    Images and seeds lie in main memory: a GPU would be waited for several times an image.
    """
    operation = TrivialAugmentWide()
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)  # no GPU's, which dropout draws from
            changed.append(operation(image))
    return torch.stack(changed)


def mix(images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mix `share` of each image and its label (class probabilities) with the batch in reverse."""
    images = share * images + (1 - share) * images.flip(0)
    return images, share * labels + (1 - share) * labels.flip(0)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (images / 255 - mean) / std of N x 3 x H x W uint8 images: float32, channels last.

    Channels aren't last on a device of another `memory_format`. Raises TypeError for images of
    another type.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}; expected uint8, 0 to 255")
    mean, std = (part.view(-1, 1, 1).to(images.device) for part in (mean, std))
    images = images.contiguous(memory_format=memory_format(images.device))
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))


def fits(device: torch.device, size: float) -> bool:
    """Tell whether so many bytes take less than half of the memory that is free on a device."""
    if device.type != "cuda":  # in main memory images lie anyway
        return True
    # Blocks that torch keeps for later are free, too.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size < (torch.cuda.mem_get_info(device)[0] + kept) / 2


def send(images: Tensor, device: torch.device) -> Tensor:
    """Copy images to a device without waiting for what it is doing.

    To CUDA only a copy from memory that stays in its place (pinned) does so.
    """
    if device.type == "cuda" and not images.is_cuda:
        images = images.pin_memory()
    return images.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class Loader:
    """Batches of augmented, normalised images from a split, on a device.

    The images are one uint8 tensor, reflect-padded once; every crop window is a view of it
    (`unfold`), so shuffling and cropping a batch are one gather. The tensor lies on the device, or,
    if it would take half of the memory there or for TrivialAugment, in main memory, from where each
    batch is sent. An incomplete last batch is left out: other images each epoch.
    """

    split: Split
    mean: Tensor
    std: Tensor
    batch_size: int
    augmentation: Augmentation = NO_AUGMENTATION
    flippable: bool = True
    seed: int = 0
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.split) // self.batch_size

    @functools.cached_property
    def _windows(self) -> Tensor:
        """All crops as a view: N x shifts x shifts x 3 x H x W."""
        images, size = self.split.images, self.split.images.shape[-1]
        padding = round(self.augmentation.crop_padding * size / 32)
        on_cpu = self.augmentation.trivial_augment
        if not on_cpu and fits(self.device, images.numel() * (1 + 2 * padding / size) ** 2):
            images = images.to(self.device)
        if padding:  # by index: torch reflects floating-point images only, four times as large
            places = torch.arange(-padding, size + padding, device=images.device).abs()
            places = torch.where(places < size, places, 2 * (size - 1) - places)
            images = images[:, :, places[:, None], places]
        return images.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches: images B x 3 x H x W (float32, channels last) and labels.

        Labels are classes (B, int64) or, with mixup, their probabilities (B x K, float32).
        """
        augmentation, size = self.augmentation, self.split.images.shape[-1]
        labels = F.one_hot(self.split.labels).float() if augmentation.mixup else self.split.labels
        choices = epoch_choices(len(labels), augmentation, size, self.flippable, self.seed, epoch)
        # Sent once an epoch: a copy in each step would make the host wait for the device.
        there = EpochChoices(*(part.to(self._windows.device) for part in choices))
        here = EpochChoices(*(part.to(self.device) for part in choices))
        labels, mean, std = (part.to(self.device) for part in (labels, self.mean, self.std))
        for batch in range(len(self)):
            places = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            chosen = there.order[places]
            rows, columns = there.shifts[chosen].unbind(1)
            images = self._windows[chosen, rows, columns]
            if augmentation.flip:
                images = torch.where(there.flips[chosen, None, None, None], images.flip(-1), images)
            if augmentation.trivial_augment:
                images = trivial_augment(images, there.seeds[chosen])
            images, chosen = send(images, self.device), here.order[places]
            if augmentation.colour_jitter:
                images = jitter(images, augmentation.colour_jitter * here.colours[chosen])
            images = normalise(images, mean, std)
            if augmentation.cutout:
                side = round(augmentation.cutout * size / 32)
                images = cut_out(images, here.holes[chosen], side)
            if augmentation.mixup:
                yield mix(images, labels[chosen], float(choices.shares[batch]))
            else:
                yield images, labels[chosen]
