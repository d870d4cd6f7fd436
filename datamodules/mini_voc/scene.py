"""The pictures of MiniVOC: backgrounds, clutter and objects, drawn from random numbers.

What makes it a *detection* dataset and not a toy classifier:

- six classes that share parts (a ring is an ellipse with a hole, a star and a cross have arms, rectangle and triangle
  have straight sides), in random colours, solid or bordered, slightly rotated, so that only the form tells the class;
- sizes (square root of the box area) log-uniform over `OBJECT_SIZE` and aspect ratios (height / width) log-uniform
  over `ASPECT_RATIO`, so that anchors of one scale or one ratio visibly cost average precision;
- textured backgrounds and clutter (lines, dots, soft blobs) that are no objects and never cover one;
- occlusion and truncation: later objects may cover earlier ones, the image border may cut them. A box is always the
  extent of the object's own form inside the image, covered or not;
- objects mostly covered or very small are marked difficult, none is hidden, some images hold no object at all.

Arrays: `H`, `W` image size in pixels; masks are float32 (H, W) coverages in 0..1; contours are (K, 2) xy points; a
`form` is the (width, height) of an object in pixels.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASS_NAMES: tuple[str, ...] = ("cross", "ellipse", "rectangle", "ring", "star", "triangle")

VERSION = 1  # of the drawings: to be raised with every change that alters a picture or a box
LONG_SIDE = (128, 176)  # pixels; the other side is drawn from SHORT_SIDE
SHORT_SIDE = (96, 136)
OBJECT_SIZE = (19.0, 115.0)  # square root of the box area, pixels
ASPECT_RATIO = (1 / 3, 3.0)  # height / width
MAX_OBJECTS = 6
PORTRAIT_SHARE = 0.25
EMPTY_SHARE = 0.03
CUT_SHARE = 0.06  # share of objects that reach over the image border
COVER_SHARE = 0.12  # share of objects that are put onto an earlier one
DIFFICULT_VISIBLE = 0.35  # less of the object's area visible than this: difficult
HIDDEN_VISIBLE = 0.12  # less than this: hidden, such a scene is not drawn
UNCOVERED_VISIBLE = 0.7  # objects that are not meant to cover leave this much of every other one
MAX_BOX_IOU = 0.45  # of two objects; non-maximum suppression at 0.5 can keep both
DIFFICULT_SIDE = 14  # pixels
COVERED = 0.25  # a pixel belongs to an object from this coverage on
_SUPERSAMPLE = 4
_TRIES = 40

FloatArray = NDArray[np.float32]


@dataclass
class SceneObject:
    """One placed object: its class, the coverage of its form (H, W), covered or not, and its box."""

    name: str
    mask: FloatArray
    border: FloatArray | None  # coverage of a darker or lighter rim, a part of the mask
    full_area: float  # of the form in pixels, the part beyond the image included
    truncated: bool
    box: tuple[int, int, int, int]  # xyxy, continuous coordinates
    visible: FloatArray = field(init=False)  # the mask less what later objects cover

    def __post_init__(self) -> None:
        self.visible = self.mask

    def visible_share(self) -> float:
        """Return the share of the whole form that can be seen."""
        return float(self.visible.sum()) / self.full_area

    def is_difficult(self) -> bool:
        """Return whether too little of it is seen, or a side of its box is too short, to demand that it be found."""
        x1, y1, x2, y2 = self.box
        return self.visible_share() < DIFFICULT_VISIBLE or min(x2 - x1, y2 - y1) < DIFFICULT_SIDE


@dataclass(frozen=True)
class Scene:
    """A drawn image, uint8 (H, W, 3) RGB, and its objects in the order in which they were drawn."""

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


def draw_scene(seed: int, index: int) -> Scene:
    """Draw image `index` (0-based) of the dataset with that seed."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    width = int(rng.integers(LONG_SIDE[0], LONG_SIDE[1] + 1))
    height = int(rng.integers(SHORT_SIDE[0], SHORT_SIDE[1] + 1))
    if rng.random() < PORTRAIT_SHARE:
        width, height = min(width, height), max(width, height)
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_OBJECTS + 1))
    canvas = _clutter(rng, _background(rng, height, width))
    objects: list[SceneObject] = []
    for _ in range(count):
        _place(rng, objects, height, width)
    for placed in objects:
        canvas = _paint(rng, canvas, placed)
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), tuple(objects))


def mask_extent(mask: FloatArray) -> tuple[int, int, int, int]:
    """Return the tight xyxy box, in continuous pixels, of the covered pixels of a mask (H, W) that has some."""
    covered = mask >= COVERED
    columns, rows = np.flatnonzero(covered.any(axis=0)), np.flatnonzero(covered.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _polygon(name: str) -> NDArray[np.float64]:
    """Return the outer contour (K, 2) of a class, y down; the triangle points up."""
    if name in ("ellipse", "ring"):
        angles = np.linspace(0, 2 * math.pi, 48)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if name == "cross":
        arm = np.array([(-0.34, -0.34), (-0.34, -1), (0.34, -1)])
        return np.concatenate([_turn(arm, quarter * math.pi / 2) for quarter in range(4)])
    if name == "star":
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
        return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    corners = {"rectangle": [(-1, -1), (1, -1), (1, 1), (-1, 1)], "triangle": [(0, -1), (1, 1), (-1, 1)]}
    return np.array(corners[name], dtype=float)


def _turn(points: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """Turn points (K, 2) clockwise (as seen with y down) by an angle in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.asarray(points @ np.array([(cos, sin), (-sin, cos)]))


def _contour(rng: Generator, name: str, form: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw a contour (K, 2) of a class, slightly rotated, that spans exactly (0, 0) to `form` (width, height)."""
    ratio = float(form[1] / form[0])
    points = _polygon(name) * form
    # Long forms turn less: a strong turn would eat up their aspect ratio.
    limit = math.radians(15) / max(ratio, 1 / ratio)
    points = _turn(points, rng.uniform(-limit, limit))
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - low) / (high - low) * form)


def _coverage(shape: Image.Image) -> FloatArray:
    return np.asarray(shape.reduce(_SUPERSAMPLE), dtype=np.float32) / np.float32(255)


def _render(
    rng: Generator, name: str, form: NDArray[np.float64], offset: NDArray[np.float64]
) -> tuple[FloatArray, FloatArray | None]:
    """Draw the anti-aliased coverage of a form in its own patch, at a sub-pixel offset, and that of its rim if any."""
    contour = (_contour(rng, name, form) + offset) * _SUPERSAMPLE
    width, height = (math.ceil(side + 1) * _SUPERSAMPLE for side in form)
    filled, rim = Image.new("L", (width, height)), Image.new("L", (width, height))
    # Pillow fills the pixels on the edge too, hence half a sub-pixel less.
    points = [(float(x), float(y)) for x, y in contour - 0.5]
    ImageDraw.Draw(filled).polygon(points, fill=255)
    if name == "ring":
        hole = contour * 0.55 + (offset + form / 2) * _SUPERSAMPLE * 0.45
        ImageDraw.Draw(filled).polygon([(float(x), float(y)) for x, y in hole - 0.5], fill=0)
    style, side = rng.random(), float(form.min())
    if style < 0.5 or side < 24 or name == "ring":
        return _coverage(filled), None
    stroke = float(np.clip(0.1 * side, 3, 7)) * _SUPERSAMPLE
    ImageDraw.Draw(rim).line([*points, *points[:2]], fill=255, width=round(2 * stroke), joint="curve")
    border = np.minimum(_coverage(rim), _coverage(filled))
    return _coverage(filled), border


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _place(rng: Generator, objects: list[SceneObject], height: int, width: int) -> None:
    """Append one object that hides no other; class and size are kept over the tries, so crowding does not skew them."""
    name, size = CLASS_NAMES[int(rng.integers(len(CLASS_NAMES)))], _log_uniform(rng, *OBJECT_SIZE)
    cut, cover = rng.random() < CUT_SHARE, rng.random() < COVER_SHARE
    for attempt in range(_TRIES):
        ratio = _log_uniform(rng, *ASPECT_RATIO)
        form = np.array([size / math.sqrt(ratio), size * math.sqrt(ratio)])  # width, height
        free = np.array([width, height]) - form
        if free.min() < 4:
            continue
        corner = rng.random(2) * free
        if cut:  # up to 30 percent of one side lies outside
            axis, part = int(rng.integers(2)), rng.uniform(0.05, 0.3) * form
            corner[axis] = -part[axis] if rng.random() < 0.5 else free[axis] + part[axis]
        elif cover and objects and attempt < _TRIES // 2:
            x1, y1, x2, y2 = objects[int(rng.integers(len(objects)))].box
            centre = np.array([x1 + x2, y1 + y2]) / 2 + rng.normal(0, 0.2, 2) * (x2 - x1, y2 - y1)
            corner = np.clip(centre - form / 2, 0, free)
        placed = _form_at(rng, name, form, corner, (height, width))
        if any(_box_iou(placed.box, other.box) > MAX_BOX_IOU for other in objects):
            continue
        remaining = [other.visible * (1 - placed.mask) for other in objects]
        shares = [float(rest.sum()) / other.full_area for rest, other in zip(remaining, objects, strict=True)]
        if min(shares, default=1.0) >= (HIDDEN_VISIBLE if cover else UNCOVERED_VISIBLE):
            for other, rest in zip(objects, remaining, strict=True):
                other.visible = rest
            objects.append(placed)
            return


def _form_at(
    rng: Generator, name: str, form: NDArray[np.float64], corner: NDArray[np.float64], shape: tuple[int, int]
) -> SceneObject:
    """Draw an object of width and height `form`, its upper left corner at `corner`, in an image of `shape` (H, W)."""
    left, top = (math.floor(value) for value in corner)
    patch, rim = _render(rng, name, form, corner - (left, top))
    mask = _on_canvas(patch, left, top, shape)
    box, (x1, y1, x2, y2) = mask_extent(mask), mask_extent(patch)
    border = None if rim is None else _on_canvas(rim, left, top, shape)
    truncated = box != (x1 + left, y1 + top, x2 + left, y2 + top)
    return SceneObject(name, mask, border, float(patch.sum()), truncated, box)


def _on_canvas(patch: FloatArray, left: int, top: int, shape: tuple[int, int]) -> FloatArray:
    canvas = np.zeros(shape, dtype=np.float32)
    y1, x1 = max(top, 0), max(left, 0)
    y2, x2 = min(top + patch.shape[0], shape[0]), min(left + patch.shape[1], shape[1])
    canvas[y1:y2, x1:x2] = patch[y1 - top : y2 - top, x1 - left : x2 - left]
    return canvas


def _box_iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def _paint(rng: Generator, canvas: FloatArray, placed: SceneObject) -> FloatArray:
    """Blend an object into the canvas (H, W, 3) in a colour that differs from what lies under and around it."""
    x1, y1, x2, y2 = placed.box
    around = canvas[max(y1 - 4, 0) : y2 + 4 : 2, max(x1 - 4, 0) : x2 + 4 : 2].reshape(-1, 3)
    colour = _visible_colour(rng, around, 70 if rng.random() < 0.05 else 120)
    height, width = placed.mask.shape
    slope = rng.uniform(-18, 18, size=2)
    shade = slope[0] * (np.arange(width) - x1) / (x2 - x1) + (slope[1] * (np.arange(height) - y1) / (y2 - y1))[:, None]
    paint = np.clip(colour + shade[..., None], 0, 255)
    if placed.border is not None:
        rim = colour * 0.5 if colour.mean() > 110 else colour * 0.5 + 128
        paint += placed.border[..., None] * (rim - paint)
    return np.asarray(canvas + placed.mask[..., None] * (paint - canvas), dtype=np.float32)


def _visible_colour(rng: Generator, around: FloatArray, contrast: float) -> NDArray[np.float64]:
    """Draw 30 colours (3,); return the first that 80 percent of the pixels `around` (P, 3) differ from, or the best."""
    colours = rng.uniform(10, 245, size=(30, 3))
    distances = np.linalg.norm(colours[:, None] - around[None], axis=2)
    margins = np.sort(distances, axis=1)[:, distances.shape[1] // 5]
    enough = np.flatnonzero(margins >= contrast)
    return np.asarray(colours[enough[0] if len(enough) else margins.argmax()])


def _noise(rng: Generator, height: int, width: int, cells: int) -> FloatArray:
    """Draw smooth noise (H, W), about 0..1, with that many bumps along a side."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)


def _background(rng: Generator, height: int, width: int) -> FloatArray:
    """Draw noise, a gradient, stripes or a checkerboard between two colours, float32 (H, W, 3) in 0..255."""
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    angle, period = rng.uniform(0, math.pi), rng.uniform(8, 32)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    wave, other = np.sin(2 * math.pi / period * along), np.sin(2 * math.pi / period * across)
    noise = sum((_noise(rng, height, width, cells) for cells in (3, 7, 16)), np.zeros_like(x)) / 3
    stripes, checks = 0.5 + 0.5 * np.tanh(3 * wave), 0.5 + 0.5 * np.tanh(4 * wave * other)
    patterns = (noise, (along - along.min()) / np.ptp(along), stripes, checks)
    kind = int(rng.choice(4, p=(0.4, 0.2, 0.2, 0.2)))
    mix = 0.65 * patterns[kind] + 0.35 * noise
    first = rng.uniform(20, 235, size=3)
    step = rng.normal(size=3)
    reach = rng.uniform(30, 80) if kind < 2 else rng.uniform(20, 45)
    second = np.clip(first + reach * step / np.linalg.norm(step), 0, 255)
    grain = rng.normal(0, rng.uniform(2, 6), size=(height, width, 3))
    return (first + mix[..., None] * (second - first) + grain).astype(np.float32)


def _clutter(rng: Generator, canvas: FloatArray) -> FloatArray:
    """Draw lines, groups of dots and soft blobs on the background (H, W, 3): edges and colour that are no objects."""
    height, width, _ = canvas.shape
    y, x = np.ogrid[:height, :width]
    for _ in range(int(rng.integers(0, 5))):
        start, kind = rng.random(2) * (width, height), int(rng.integers(3))
        if kind == 0:
            radius = rng.uniform(8, 30)
            mask = np.exp(-((x - start[0]) ** 2 + (y - start[1]) ** 2) / (2 * radius**2)).astype(np.float32) * 0.4
        else:
            mask = _strokes(rng, start, height, width, dots=kind == 1) * np.float32(rng.uniform(0.5, 0.9))
        canvas = canvas + mask[..., None] * (rng.uniform(10, 245, size=3).astype(np.float32) - canvas)
    return canvas


def _strokes(rng: Generator, start: NDArray[np.float64], height: int, width: int, dots: bool) -> FloatArray:
    """Draw some dots around a point, smaller than any object, or a bent line from it; return the coverage (H, W)."""
    layer = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    draw = ImageDraw.Draw(layer)
    if dots:
        for centre in (start + rng.normal(0, 14, size=(int(rng.integers(3, 9)), 2))) * _SUPERSAMPLE:
            radius = rng.uniform(0.8, 2) * _SUPERSAMPLE
            draw.ellipse([*(centre - radius).tolist(), *(centre + radius).tolist()], fill=255)
    else:
        points = start + np.cumsum(rng.normal(0, 30, size=(int(rng.integers(2, 5)), 2)), axis=0)
        line = [(float(px), float(py)) for px, py in points * _SUPERSAMPLE]
        draw.line(line, fill=255, width=round(rng.uniform(1, 2.2) * _SUPERSAMPLE), joint="curve")
    return _coverage(layer)
