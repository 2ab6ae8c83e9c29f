"""Which tokens lie in the regions of a sample: boxes and masks on its patch grid, spans among the tokens of its text.

Where an image lies in what the model sees of it (resized, cropped, padded) differs from processor to processor, and no
config says it. So the processor itself is asked: it is given a ramp of the image's size, black and white beside it, and
what comes out tells for every pixel where in the image it came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnscope.loading import LoadedModel
from attnscope.samples import Region, Sample, SampleError
from attnscope.tokens import KIND_CODES, TokenLayout

# Of 255 steps of the ramp: what rounding, twice, and resampling may do to it away from the edges.
_RAMP_TOLERANCE = 2.5 / 255
_TEXT = [KIND_CODES[kind] for kind in ("text", "special", "generated")]


@dataclass(frozen=True)
class View:
    """Where a model's image lies in the original one: along each axis the pixel i begins at start + step * i.

    Each is (down, across), in pixels of the original image; `pixels` is the size of what the model sees, `patch` the
    size of its patches, 0 where its config states none.
    """

    start: tuple[float, float]
    step: tuple[float, float]
    pixels: tuple[int, int]
    patch: tuple[int, int]

    def edges(self, axis: int, patches: int) -> np.ndarray:
        """Edges of so many patches along an axis, (patch + 1,), in pixels of the original image."""
        pixels, stated = self.pixels[axis], self.patch[axis]
        strides: list[float] = [stated] * (stated > 0 and pixels // max(stated, 1) == patches)
        # Convolutional stages halve what they are given, and round up.
        strides += [2**power for power in range(11) if -(-pixels // 2**power) == patches]
        return self.start[axis] + self.step[axis] * (strides or [pixels / patches])[0] * np.arange(patches + 1)


class RegionReader:
    """Tells for every token how much of it lies in each region; views are kept by the size of the image."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._views: dict[tuple[int, int], View | None] = {}

    def shares(
        self, sample: Sample, layout: TokenLayout, row: int, count: int, boxes: np.ndarray | None = None
    ) -> np.ndarray:
        """The share of each token that lies in each region: (region, token) float32 in [0, 1].

        For a patch the share of its area, for a region of a detector, of which `boxes` (token, 4) are known in pixels,
        that of its box, for a text token that of its characters. NaN for padding, and where a
        region says nothing of the token's kind (a phrase without a box, of patches) or nobody knows where the token
        lies; 0 for tokens that have no place, such as CLS.
        """
        kind = layout.kind[row]
        found = np.full((count, len(kind)), np.nan, np.float32)
        found[: len(sample.regions), kind != KIND_CODES["padding"]] = 0
        is_image, is_text = kind == KIND_CODES["image"], np.isin(kind, _TEXT)
        if sample.regions:
            patches = self._patches(sample, layout, row, is_image)
            found[: len(sample.regions), is_image] = patches if boxes is None else _boxes(sample, boxes[is_image])
            found[: len(sample.regions), is_text] = self._words(sample, layout.text[row][is_text])
        return found

    def _patches(self, sample: Sample, layout: TokenLayout, row: int, chosen: np.ndarray) -> np.ndarray:
        places = np.stack([layout.row[row, chosen], layout.column[row, chosen]], -1).astype(int)
        found = np.full((len(sample.regions), len(places)), np.nan)
        if not len(places) or (places < 0).any() or len(np.unique(places, axis=0)) < len(places):
            return found
        image = sample.load_image()
        view = None if image is None else self._view(sample, image.size)
        if view is None:
            return found
        grid = tuple(int(n) + 1 for n in places.max(0))
        if grid[0] * grid[1] > len(places):
            # Some patches were left out, perhaps a whole last row.
            grid = tuple(p // n if n else g for p, n, g in zip(view.pixels, view.patch, grid, strict=True))
        down, across = (view.edges(axis, patches) for axis, patches in enumerate(grid))
        for number, region in enumerate(sample.regions):
            shares = _shares(region, down, across)
            if shares is not None:
                found[number] = shares[places[:, 0], places[:, 1]]
        return found

    def _view(self, sample: Sample, size: tuple[int, int]) -> View | None:
        if size not in self._views:
            self._views[size] = find_view(self._loaded, sample, size)
        return self._views[size]

    def _words(self, sample: Sample, tokens: np.ndarray) -> np.ndarray:
        found = np.full((len(sample.regions), len(tokens)), np.nan)
        offsets = find_offsets(self._loaded.tokenizer, sample.text or "", [str(t) for t in tokens])
        if offsets is None:
            return found
        for number, region in enumerate(sample.regions):
            if region.span is not None:
                overlap = np.minimum(offsets[:, 1], region.span[1]) - np.maximum(offsets[:, 0], region.span[0])
                found[number] = np.clip(overlap, 0, None) / np.maximum(offsets[:, 1] - offsets[:, 0], 1)
        return found


def find_view(loaded: LoadedModel, sample: Sample, size: tuple[int, int]) -> View | None:
    """Where images of a size (width, height) come to lie in what the model sees; None where that can't be told."""
    from PIL import Image

    width, height = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)
    ramp[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
    shown = [Image.fromarray(np.full_like(ramp, level)) for level in (0, 255)]
    try:
        # One by one, as a model that writes takes its samples.
        inputs = [loaded.family.encode([replace(sample, image=i)], loaded) for i in (*shown, Image.fromarray(ramp))]
    except SampleError:
        return None
    pixels = [one.get("pixel_values") for one in inputs]
    if any(one is None or one.ndim != 4 or one.shape[:2] != (1, 3) for one in pixels):
        return None
    black, white, seen = (one[0].double().cpu().numpy() for one in pixels)  # type: ignore[index]
    inside = np.abs(white - black).min(0) > 1e-3
    if not inside.any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ramps = (seen - black) / (white - black)
    down, across = _fit(ramps[1], inside, axis=0), _fit(ramps[0], inside, axis=1)
    if down is None or across is None:
        return None
    (top, step_down), (left, step_across) = down, across
    return View(
        (top * height, left * width),
        (step_down * height, step_across * width),
        seen.shape[1:],
        _patch_size(loaded),
    )


def _patch_size(loaded: LoadedModel) -> tuple[int, int]:
    size = getattr(getattr(loaded.config, "vision_config", loaded.config), "patch_size", None) or 0
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


def _fit(values: np.ndarray, inside: np.ndarray, axis: int) -> tuple[float, float] | None:
    """Start and step of a ramp along an axis, from the middle of what is inside; None where it is no ramp."""
    counts = inside.sum(1 - axis)
    line = np.where(inside, values, 0).sum(1 - axis) / np.maximum(counts, 1)
    places = np.flatnonzero(counts)
    # Resampling bends the ends of a ramp.
    margin = max(1, len(places) // 10)
    used = places[margin:-margin] if len(places) > 4 * margin else places
    if len(used) < 2:
        return None
    step, start = np.polyfit(used, line[used], 1)
    if step <= 0 or np.abs(start + step * used - line[used]).max() > _RAMP_TOLERANCE:
        return None
    # From the middle of the first pixel to its edge.
    return float(start - step / 2), float(step)


def _shares(region: Region, down: np.ndarray, across: np.ndarray) -> np.ndarray | None:
    """The share of each patch (row, column) that a region covers; None for a region without a place in the image."""
    area = np.outer(np.diff(down), np.diff(across))
    if region.mask is not None:
        pixels = region.mask.pixels()
        rows, columns = (
            np.stack([_overlap(edges, at, at + 1) for at in range(size)], 1)
            for edges, size in zip((down, across), pixels.shape, strict=True)
        )
        return rows @ pixels @ columns.T / area
    if region.box is None:
        return None
    left, top, right, bottom = region.box
    return np.outer(_overlap(down, top, bottom), _overlap(across, left, right)) / area


def _boxes(sample: Sample, boxes: np.ndarray) -> np.ndarray:
    """The share of each box (token, 4) that lies in each region: (region, token); NaN for regions without a place."""
    found = np.full((len(sample.regions), len(boxes)), np.nan)
    for number, region in enumerate(sample.regions):
        shares = [_shares(region, box[[1, 3]], box[[0, 2]]) for box in boxes.astype(float)]
        if shares and shares[0] is not None:
            found[number] = [share[0, 0] for share in shares if share is not None]
    return found


def _overlap(edges: np.ndarray, low: float, high: float) -> np.ndarray:
    """How much of each piece between two edges lies between low and high, (piece,)."""
    return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)


def find_offsets(tokenizer: object, text: str, tokens: list[str]) -> np.ndarray | None:
    """First and past-the-last character in the text of each token, (token, 2), 0 and 0 for tokens that aren't of it.

    The text may stand inside a prompt; its first token may be joined to what stands before it. None where it isn't
    found among the tokens.
    """
    if tokenizer is None or not text or not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)  # type: ignore[operator]
    own = [str(t) for t in tokenizer.convert_ids_to_tokens(encoded["input_ids"])]  # type: ignore[attr-defined]
    for skipped in (0, 1):
        wanted = own[skipped:]
        for start in range(skipped, len(tokens) - len(wanted) + 1):
            if wanted and tokens[start : start + len(wanted)] == wanted:
                offsets = np.zeros((len(tokens), 2), int)
                offsets[start - skipped : start + len(wanted)] = encoded["offset_mapping"]
                return offsets
    return None
