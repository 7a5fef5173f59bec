"""Recipes: the optimizer, its learning rate and schedule, the batch and its augmentation.

Four are published, two fit a profile; `dataclasses.replace` makes another from one of them.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from helpers.config import settings
from helpers.loader import NO_AUGMENTATION, Augmentation


@settings
class Recipe:
    """How a network is trained. Raises ValueError for a setting outside what is allowed.

    `learning_rate` is the highest of the schedule. With `reference_batch_size` it is meant for
    that batch size and scales with the square root of the batch's share of it, which keeps the
    variance of a step (Hoffer et al., NIPS 2017). `epochs` is what the protocol is known with.
    """

    name: Annotated[str, Field(pattern=r"^[^/\\]+$")]  # part of the name of a run's folder
    optimizer: Literal["sgd", "adam", "adamw"]
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "step", "triangular", "onecycle"]
    batch_size: Annotated[int, Field(ge=1)]
    epochs: Annotated[int, Field(ge=1)]
    reference_batch_size: Annotated[int, Field(ge=1)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augmentation: Augmentation = NO_AUGMENTATION

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate, after scaling with the batch size."""
        share = self.batch_size / (self.reference_batch_size or self.batch_size)
        return self.learning_rate * math.sqrt(share)


TWO = Augmentation(flip=True, crop_padding=4)
THREE = Augmentation(flip=True, crop_padding=4, cutout=12)
SLIGHT = Augmentation(flip=True, crop_padding=2)
ALL = (
    # As many tutorials do it: five epochs of Adam, nothing else.
    Recipe("adam", "adam", 1e-3, "constant", batch_size=64, epochs=5),
    # Smith and Topin, "Super-Convergence" (2018), with torch's OneCycleLR shape.
    Recipe("onecycle", "sgd", 0.1, "onecycle", 128, 30, weight_decay=5e-4, augmentation=TWO),
    # He et al. (2016), section 4.2: divide by 10 at half and three quarters of 64,000 steps.
    Recipe("textbook", "sgd", 0.1, "step", 128, 164, weight_decay=1e-4, augmentation=TWO),
    # A standard ResNet-18 reaches 95 % on CIFAR-10 with these settings in 80 epochs.
    Recipe("fast", "sgd", 0.2, "triangular", 512, 80, 500, 0.9, True, 5e-4, augmentation=THREE),
    # What fits the little training of a profile: cutout, and wider shifts, leave these networks
    # short of learning their training images. Chosen on validation images: ResNet-18 of width 0.25
    # on cifar10-jpeg in 12 epochs had 85.4 % so, 85.1 with shifts of 4 pixels, 84.1 with these and
    # a weight decay of 2e-4; on 6,000 shapes of 20 pixels ResNet-50 had learnt 97.9 % in 6 epochs.
    Recipe("quick", "sgd", 0.05, "triangular", 32, 6, None, 0.9, True, 5e-4),
    Recipe("long", "sgd", 0.2, "triangular", 128, 24, 500, 0.9, True, 5e-4, augmentation=SLIGHT),
)
RECIPES = {recipe.name: recipe for recipe in ALL}


def learning_rate_at(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of a step (from 0) of `steps`: the schedule has no other state.

    constant    the peak throughout
    step        the peak; a tenth from half of the steps on; a hundredth from three quarters on
    triangular  rises in a straight line over the first fifth, then falls in one to 0
    onecycle    torch's OneCycleLR: cosine from 1/25 up over 30 %, cosine down to 1/250,000
    """
    peak = recipe.peak_learning_rate
    if recipe.schedule == "constant":
        return peak
    if recipe.schedule == "step":
        return peak * 0.1 ** ((step >= 0.5 * steps) + (step >= 0.75 * steps))
    if recipe.schedule == "triangular":
        rise = max(1, 0.2 * steps)
        return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))

    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    top = 0.3 * steps - 1
    if step <= top:
        return cosine(peak / 25, peak, step / top)
    return cosine(peak, peak / 25e4, (step - top) / max(1, steps - 1 - top))
