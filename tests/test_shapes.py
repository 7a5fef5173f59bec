"""The drawn dataset: reproducible, honest masks, one outline a class, a mark that only marks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from helpers import shapes
from helpers.shapes import CLASSES, draw

LABELS = np.arange(200) % len(CLASSES)


@pytest.fixture(scope="module")
def plain() -> shapes.Drawing:
    return draw(LABELS, seed=3)


@pytest.fixture(scope="module")
def marked() -> shapes.Drawing:
    return draw(LABELS, seed=3, mark=True)


@pytest.mark.parametrize("image_size", [16, 17, 32, 65, 224])
def test_shapes_and_dtypes(image_size: int) -> None:
    drawing = draw(np.arange(10, dtype=np.uint8), image_size=image_size, seed=0, mark=True)
    assert drawing.images.shape == (10, image_size, image_size, 3)
    assert drawing.masks.shape == drawing.mark_masks.shape == (10, image_size, image_size)
    dtypes = [array.dtype for array in vars(drawing).values()]
    assert dtypes == [np.uint8, bool, bool]
    assert drawing.masks.any(axis=(1, 2)).all()
    assert drawing.mark_masks.any(axis=(1, 2)).all()


def test_no_image_repeats_within_a_drawing_nor_with_another_seed() -> None:
    images = np.concatenate([draw(np.full(100, 4), seed=seed).images for seed in (3, 4)])
    assert len(np.unique(images.reshape(200, -1), axis=0)) == 200


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(0)  # noqa: NPY002 (the global generator is what is tested)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    draw(LABELS, seed=3)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_only_the_outline_depends_on_the_label() -> None:
    """The same seed and position with another label is the same scene with another object."""
    first = draw(np.full(30, CLASSES.index("circle")), image_size=64, seed=8)
    second = draw(np.full(30, CLASSES.index("cross")), image_size=64, seed=8)
    changed = (first.images != second.images).any(axis=3)
    for image_changed, a, b in zip(changed, first.masks, second.masks, strict=True):
        # The dilation covers blurred edges.
        near = cv2.dilate((a | b).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        assert image_changed[near].any()
        assert not image_changed[~near].any()


def test_the_scene_is_the_same_at_every_image_size(plain: shapes.Drawing) -> None:
    large = draw(LABELS[:50], image_size=128, seed=3)
    for small_mask, mask in zip(plain.masks, large.masks, strict=False):
        reduced = cv2.resize(mask.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA) > 0.5
        assert (reduced & small_mask).sum() / (reduced | small_mask).sum() > 0.85


def test_mask_area(plain: shapes.Drawing) -> None:
    area = plain.masks.mean(axis=(1, 2))
    assert area.min() > 0.015
    assert area.max() < np.pi / 4 * 0.8**2 + 0.01
    assert 0.08 < area.mean() < 0.25


def test_mask_lies_on_the_object(plain: shapes.Drawing) -> None:
    """Objects are lighter than the ground; a shifted mask must show less of that than the mask."""

    def contrast(masks: np.ndarray) -> float:
        grey = plain.images.mean(axis=3)
        inside = [g[m].mean() for g, m in zip(grey, masks, strict=True)]
        outside = [g[~m].mean() for g, m in zip(grey, masks, strict=True)]
        return float(np.mean(np.array(inside) - np.array(outside)))

    exact = contrast(plain.masks)
    assert exact > 40
    for shift in [(2, 0), (-2, 0), (0, 2), (0, -2)]:
        assert contrast(np.roll(plain.masks, shift, axis=(1, 2))) < 0.93 * exact


def test_occluded_pixels_are_not_in_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "OCCLUDER_COUNT", (0, 0))
    bare = draw(LABELS, seed=3).masks
    monkeypatch.setattr(shapes, "OCCLUDER_COUNT", (6, 6))
    occluded = draw(LABELS, seed=3).masks
    assert not (occluded & ~bare).any()
    assert occluded.sum() < 0.94 * bare.sum()


def _describe(mask: np.ndarray) -> dict[str, float]:
    """Size-free features of the largest contour of a mask without occluders."""
    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    contour = max(contours, key=cv2.contourArea)
    area = cv2.contourArea(contour)
    hull = cv2.convexHull(contour)
    hull_area = cv2.contourArea(hull)
    box_area = np.prod(cv2.minAreaRect(contour)[1])
    circle_area = np.pi * cv2.minEnclosingCircle(contour)[1] ** 2
    triangle_area = cv2.minEnclosingTriangle(contour)[0]
    corners = cv2.approxPolyDP(contour, 0.03 * cv2.arcLength(contour, True), True)
    return {
        "holes": float((tree[0, :, 3] >= 0).sum()),
        "solidity": area / hull_area,
        "box": area / box_area,
        "disc": area / circle_area,
        "triangle": area / triangle_area,
        "corners": float(len(corners)),
    }


def test_every_class_has_its_outline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "OCCLUDER_COUNT", (0, 0))
    monkeypatch.setattr(shapes, "OBJECT_OVERHANG", 0.0)
    masks = draw(np.repeat(np.arange(10), 15), image_size=160, seed=2).masks
    described = [_describe(mask) for mask in masks]
    median = {
        name: {
            key: float(np.median([d[key] for d in described[15 * k : 15 * k + 15]]))
            for key in described[0]
        }
        for k, name in enumerate(CLASSES)
    }
    assert [name for name in CLASSES if median[name]["holes"] == 1] == ["ring"]
    convex = [name for name in CLASSES if median[name]["solidity"] > 0.95]
    assert convex == ["circle", "ring", "triangle", "square", "hexagon"]
    assert [name for name in CLASSES if median[name]["triangle"] > 0.93] == ["triangle"]
    assert [name for name in CLASSES if median[name]["box"] > 0.93] == ["square"]
    angular = {"triangle": 3, "square": 4, "hexagon": 6, "arrow": 7, "star": 10, "cross": 12}
    assert {name: median[name]["corners"] for name in angular} == angular
    assert median["circle"]["disc"] > median["hexagon"]["disc"] + 0.05
    assert median["crescent"]["solidity"] < 0.75
    assert 0.85 < median["heart"]["solidity"] < 0.95


def test_mark_changes_its_own_pixels_only(plain: shapes.Drawing, marked: shapes.Drawing) -> None:
    changed = (plain.images != marked.images).any(axis=3)
    assert not (changed & ~marked.mark_masks).any()
    assert changed.sum() > 0.95 * marked.mark_masks.sum()
    np.testing.assert_array_equal(marked.masks, plain.masks & ~marked.mark_masks)
    assert not plain.mark_masks.any()


@pytest.mark.parametrize("image_size", [16, 32, 100])
def test_mark_is_small_in_a_corner_and_tells_the_class(image_size: int) -> None:
    drawing = draw(LABELS[:40], image_size=image_size, seed=5, mark=True)
    assert (drawing.mark_masks.mean(axis=(1, 2)) < 0.06).all()
    marks = []
    for image, mask in zip(drawing.images, drawing.mark_masks, strict=True):
        rows, columns = np.nonzero(mask)
        for positions in (rows, columns):
            assert positions.max() < image_size / 3 or positions.min() > image_size * 2 / 3 - 1
        marks.append((image * mask[:, :, None]).tobytes())
    for k in range(10):
        assert len(set(marks[k::10])) == 1
    assert len(set(marks)) == 10
    # A flipped image has its mark in another corner, so the colours alone must tell the class.
    colours = [np.frombuffer(mark, np.uint8).reshape(-1, 3).max(axis=0) for mark in marks[:10]]
    assert len(np.unique(colours, axis=0)) == 10


@pytest.mark.parametrize("labels", [[0, -1], [10], [0.5], ["circle"]], ids=str)
def test_bad_labels_are_refused(labels: list) -> None:
    with pytest.raises(ValueError, match="labels are .*; expected whole numbers from 0 to 9"):
        draw(np.array(labels), seed=0)


@pytest.mark.parametrize("image_size", [15, 0, -32, 2**20])
def test_a_bad_image_size_is_refused(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size is {image_size}; expected 16 to 4096"):
        draw(np.array([0]), image_size=image_size, seed=0)
