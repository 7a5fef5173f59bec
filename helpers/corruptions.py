"""Common corruptions of test images: noise, blur and low contrast, in five severities.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), with the strengths of their CIFAR-10-C. Images are corrupted as they
are needed, and nothing is chosen by them.
"""

from __future__ import annotations

import zlib

import cv2
import numpy as np
import torch
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)

STRENGTHS = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation; the range of values is 1
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation in pixels, at an image size of 32
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # what remains of it
}


def _noise(image: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    return image + 255 * strength * generator.standard_normal(image.shape)


def _blur(image: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    # Grows with the image; not below 32 pixels, where so narrow a kernel would do nothing.
    return cv2.GaussianBlur(image, (0, 0), strength * max(1.0, min(image.shape[:2]) / 32))


def _contrast(image: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    mean = image.mean(axis=(0, 1))
    return mean + strength * (image - mean)


CORRUPTIONS = {"noise": _noise, "blur": _blur, "contrast": _contrast}


def corrupt(images: Tensor, corruption: str, severity: int, *, seed: int = 0) -> Tensor:
    """Return corrupted copies of images N x 3 x H x W (uint8, on the CPU), of the same form.

    `corruption` is a name in `CORRUPTIONS`, `severity` 1 (mild) to 5. An image's noise is drawn
    from `seed` and the image itself: it doesn't depend on the batch, and from one severity to the
    next it only grows.

    Raises ValueError for an unknown corruption or severity, or images of another form.
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"corruption {corruption!r} is unknown; choose one of {list(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity!r}; expected a whole number from 1 to 5")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images are {images.dtype}, {tuple(images.shape)}; expected uint8 and N x 3 x H x W"
        )
    strength = STRENGTHS[corruption][severity - 1]
    pictures = images.permute(0, 2, 3, 1).contiguous().numpy()
    changed = np.empty_like(pictures)
    for i, picture in enumerate(pictures):
        generator = np.random.default_rng((seed, zlib.crc32(picture)))
        image = CORRUPTIONS[corruption](picture.astype(np.float32), strength, generator)
        changed[i] = np.clip(np.rint(image), 0, 255)
    return torch.from_numpy(changed).permute(0, 3, 1, 2).contiguous()


def corrupt_all(images: Tensor) -> Tensor:
    """Return images as they are and in 5 severities: corruptions x 6 x N x 3 x H x W, uint8."""
    every = [[images, *(corrupt(images, name, s) for s in SEVERITIES)] for name in CORRUPTIONS]
    return torch.stack([torch.stack(severities) for severities in every])
