"""The embedded dataset: ten classes of drawn objects, each with its exact mask.

Every image is one scene: a textured background, clutter behind the object, the object itself,
a few occluders in front of it, then blur and pixel noise. Only the outline tells the class. The
pixels that show the object are known exactly, which is what judging a heatmap needs.

A scene is described in units of the image side and painted on a canvas at least twice as fine as
the image, which is then averaged down: the same seed gives the same scene at every image size.

An optional mark in a corner encodes the class without fail: a shortcut (Geirhos et al., 2020,
"Shortcut learning in deep neural networks") planted on purpose, which an explanation should expose.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

_NAMES = "circle ring triangle square star cross heart crescent arrow hexagon"
CLASSES = tuple(_NAMES.split())
CORNERS = {"circle": 64, "ring": 64, "triangle": 3, "star": 10, "hexagon": 6}

# Difficulty. Lengths are fractions of the image side, colours are in grey levels (0 to 255).
# Objects are lighter than the ground and roughly upright: else a few thousand images teach a small
# network little within ten epochs.
OBJECT_DIAMETER = (0.5, 0.8)
OBJECT_STRETCH = 1.15  # largest ratio between the two axes
OBJECT_OVERHANG = 0.1  # part of the radius that may lie outside the image
OBJECT_ROTATION = 0.32  # radians either way from upright
GROUND_GREY = (40.0, 130.0)
GROUND_TINT = (-30.0, 30.0)  # added to each channel
OBJECT_CONTRAST = (85.0, 210.0)  # how far the object's colour lies above the background's
TEXTURE_AMPLITUDE = (4.0, 15.0)
CLUTTER_COUNT = (2, 5)
CLUTTER_CAMOUFLAGE = 0.35  # probability that clutter has nearly the object's colour
OCCLUDER_COUNT = (0, 2)
BLUR_SIGMA = 0.012
NOISE_SIGMA = (2.0, 8.0)

CANVAS_SIDE = 128  # the least side of the canvas on which a scene is painted
TEXTURE_SIDE = 64  # cells along the side of the finest texture
FRACTION_BITS = 6  # OpenCV takes vertices as integers with this many fractional bits

# The corner mark: three by three cells, a colour for each class, a corner for every fourth class.
_COLOURS = "e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 aa6e28 ffffff"
MARK_COLOURS = np.array([list(bytes.fromhex(colour)) for colour in _COLOURS.split()], np.uint8)
_PATTERNS = ("111 111 111", "101 010 101", "111 101 111")
MARK_PATTERNS = np.array([[list(row) for row in cells.split()] for cells in _PATTERNS]) == "1"


@dataclass(frozen=True)
class Drawing:
    """Drawn images and where in them, pixel by pixel, the object and the mark are visible."""

    images: np.ndarray  # N x H x W x 3 (uint8, RGB)
    masks: np.ndarray  # N x H x W (bool), the object, neither occluded nor marked
    mark_masks: np.ndarray  # N x H x W (bool), the mark: all False without one


def draw(labels: np.ndarray, *, image_size: int = 32, seed: int, mark: bool = False) -> Drawing:
    """Draw one image for each label (N positions in `CLASSES`), `image_size` pixels a side.

    Image i depends only on the seed (from 0), i, its label, the image size and `mark`: a longer set
    begins with the images of a shorter one, and sets that must not overlap (training and test) need
    different seeds. `mark` also paints the corner mark that gives the class away; all other pixels
    stay the same.
    """
    if not np.isin(labels, range(len(CLASSES))).all():
        raise ValueError(f"labels are {labels}; expected whole numbers from 0 to 9")
    if not 16 <= image_size <= 4096:
        raise ValueError(f"image_size is {image_size}; expected 16 to 4096 pixels")
    shape = (len(labels), image_size, image_size)
    images = np.empty((*shape, 3), dtype=np.uint8)
    masks, mark_masks = np.empty(shape, dtype=bool), np.zeros(shape, dtype=bool)
    cell = max(1, round(image_size / 16))  # of the mark, whose ends on both axes these are:
    margin, end = cell // 2, cell // 2 + 3 * cell
    ends = (slice(margin, end), slice(image_size - end, image_size - margin))
    for index, label in enumerate(labels.tolist()):
        rng = np.random.default_rng([seed, index])
        images[index], masks[index] = _scene(rng, label, image_size)
        if mark:
            pattern = MARK_PATTERNS[label // 4].repeat(cell, axis=0).repeat(cell, axis=1)
            rows, columns = ends[label % 4 // 2], ends[label % 2]
            images[index, rows, columns] = pattern[:, :, None] * MARK_COLOURS[label]
            mark_masks[index, rows, columns] = True
            masks[index, rows, columns] = False
    return Drawing(images, masks, mark_masks)


def _scene(rng: np.random.Generator, label: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint one scene; return the image (H x W x 3, uint8) and the object's mask (H x W, bool)."""
    scale = max(2, -(-CANVAS_SIDE // image_size))
    side = scale * image_size
    ground = rng.uniform(*GROUND_GREY) + rng.uniform(*GROUND_TINT, size=3)
    # The object's colour lies at a random distance from the ground's, in no channel below it.
    direction = np.abs(rng.standard_normal(3))
    step = direction * rng.uniform(*OBJECT_CONTRAST) / np.linalg.norm(direction)
    colour = np.minimum(ground + step, 250)
    canvas = _texture(rng, ground, side)
    for _ in range(rng.integers(CLUTTER_COUNT[0], CLUTTER_COUNT[1] + 1)):
        place = rng.uniform(0, 1, size=2)
        _paint_clutter(rng, place, 1.0, (canvas, _clutter_colour(rng, colour)))

    radius = rng.uniform(*OBJECT_DIAMETER) / 2
    margin = radius * (1 - OBJECT_OVERHANG)
    centre = rng.uniform(margin, 1 - margin, size=2)
    angle = rng.uniform(-OBJECT_ROTATION, OBJECT_ROTATION)
    stretch = rng.uniform(1, OBJECT_STRETCH)
    # Every class takes the same random values, so that nothing else in the scene tells the class.
    proportions = rng.random(3)
    contours = [
        _rotated(contour * (1, 1 / stretch), angle) * radius + centre
        for contour in _outline(CLASSES[label], proportions)
    ]
    visible = np.zeros((side, side), dtype=np.uint8)
    cv2.fillPoly(visible, [_vertices(c, side) for c in contours], 255, shift=FRACTION_BITS)
    cv2.copyTo(_texture(rng, colour, side), visible, canvas)

    for _ in range(rng.integers(OCCLUDER_COUNT[0], OCCLUDER_COUNT[1] + 1)):
        place = centre + rng.uniform(-radius, radius, size=2)
        _paint_clutter(rng, place, 0.6, (canvas, _clutter_colour(rng, ground)), (visible, [0]))

    sigma = rng.uniform(0, BLUR_SIGMA) * side
    canvas = cv2.GaussianBlur(canvas, (0, 0), max(sigma, 0.1))
    image = cv2.resize(canvas, (image_size, image_size), interpolation=cv2.INTER_AREA)
    visible = cv2.resize(visible, (image_size, image_size), interpolation=cv2.INTER_AREA)
    # Noise comes last, because it alone takes a number of random values that depends on the size.
    noise_sigma = rng.uniform(*NOISE_SIGMA)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image = np.clip(image + noise * np.float32(noise_sigma), 0, 255).astype(np.uint8)
    return image, visible > 127


def _outline(name: str, proportions: np.ndarray) -> list[np.ndarray]:
    """Contours (V x 2) of an object of radius about 1; proportions, 0 to 1, vary it."""
    first, second, third = proportions
    if name in CORNERS:
        points = _regular(CORNERS[name])
        if name == "star":
            points[1::2] *= 0.4 + 0.12 * first
        return [points, points * (0.45 + 0.23 * first)] if name == "ring" else [points]
    if name == "square":
        return [_rotated(_regular(4), np.pi / 4)]
    if name == "cross":
        arm = 0.2 + 0.14 * first
        corner = np.array([(1, arm), (arm, arm), (arm, 1)])
        return [np.concatenate([_rotated(corner, turn * np.pi / 2) for turn in range(4)])]
    if name == "heart":
        t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack([x, -y - 2.5], axis=1) / 16]
    if name == "crescent":
        # A unit disc without the disc of the given radius whose centre is shifted along x.
        shift = 0.4 + 0.2 * first
        radius = 0.75 + 0.15 * second
        x = (1 - radius**2 + shift**2) / (2 * shift)
        y = np.sqrt(1 - x**2)
        outer = _arc(np.arctan2(y, x), 1)
        inner = _arc(np.arctan2(y, x - shift), radius)[::-1] + (shift, 0)
        return [np.concatenate([outer, inner]) + ((1 - x) / 2, 0)]
    # The arrow.
    shaft, head, neck = 0.13 + 0.11 * first, 0.5 + 0.2 * second, -0.1 + 0.35 * third
    upper = np.array([(-1, shaft), (neck, shaft), (neck, head), (1, 0)])
    return [np.concatenate([upper, upper[-2::-1] * (1, -1)])]


def _regular(corners: int) -> np.ndarray:
    angles = np.arange(corners) * (2 * np.pi / corners) - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _arc(start: float, radius: float) -> np.ndarray:
    """Points of the arc that runs the long way round, from `start` to minus `start`."""
    angles = np.linspace(start, 2 * np.pi - start, 40)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rotated(points: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return points @ np.array([(cosine, sine), (-sine, cosine)])


def _vertices(points: np.ndarray, side: int) -> np.ndarray:
    """Points in units of the image side as OpenCV's integers, pixel centres at whole numbers."""
    return np.round((points * side - 0.5) * 2**FRACTION_BITS).astype(np.int32)


def _clutter_colour(rng: np.random.Generator, like: np.ndarray) -> list[float]:
    anything = rng.uniform(0, 255, size=3)
    nearly = like + rng.uniform(-20, 20, size=3)
    return (nearly if rng.random() < CLUTTER_CAMOUFLAGE else anything).tolist()


def _texture(rng: np.random.Generator, colour: np.ndarray, side: int) -> np.ndarray:
    """A square of uint8 RGB: smooth shading, grain and sometimes stripes around one colour."""
    cells = (TEXTURE_SIDE, TEXTURE_SIDE)
    shading, grain, stripes = rng.uniform(*TEXTURE_AMPLITUDE, size=3)
    coarse = rng.standard_normal((4, 4, 3), dtype=np.float32) * np.float32(shading)
    fine = rng.standard_normal((16, 16), dtype=np.float32) * np.float32(grain)
    field, grey = (cv2.resize(x, cells, interpolation=cv2.INTER_CUBIC) for x in (coarse, fine))
    wave = rng.uniform(-1, 1, size=2) * 2 * np.pi * rng.uniform(2, 8)
    phase = rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.5:
        along = np.linspace(0, 1, TEXTURE_SIDE)
        ramp = (wave[0] * along)[:, None] + (wave[1] * along + phase)[None]
        grey += np.sin(ramp, dtype=np.float32) * np.float32(stripes)
    small = np.clip(field + grey[:, :, None] + colour.astype(np.float32), 0, 255).astype(np.uint8)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)


def _paint_clutter(
    rng: np.random.Generator, place: np.ndarray, size: float, *canvases: tuple[np.ndarray, list]
) -> None:
    """Paint one line, arc, blob or splinter at a place, on each canvas in its colour."""
    side, kind = len(canvases[0][0]), rng.integers(4)
    angle = rng.uniform(0, 2 * np.pi)
    length = size * rng.uniform(0.12, 0.5)
    thickness = max(1, round(size * rng.uniform(0.02, 0.06) * side))
    if kind == 0:  # a line
        points = _rotated(np.array([(-length, 0), (length, 0)]), angle) + place
    elif kind == 1:  # an arc
        bend = np.linspace(0, rng.uniform(0.8, 2.5), 12)
        points = np.stack([np.cos(bend + angle), np.sin(bend + angle)], axis=1) * length / 2 + place
    elif kind == 2:  # a blob
        bumps = rng.uniform(0.5, 1.3, size=(9, 1))
        points = _rotated(_regular(9) * bumps * (1, 0.6), angle) * length / 3 + place
    else:  # a splinter with three or four uneven corners
        points = rng.uniform(-0.4, 0.4, size=(rng.integers(3, 5), 2)) * length + place
    vertices = [_vertices(points, side)]
    for canvas, colour in canvases:
        if kind < 2:
            cv2.polylines(canvas, vertices, False, colour, thickness, shift=FRACTION_BITS)
        else:
            cv2.fillPoly(canvas, vertices, colour, shift=FRACTION_BITS)
