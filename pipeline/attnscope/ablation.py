"""Applying a condition to a batch of model inputs: which tokens go, what stands in their place, what is asked for.

Image tokens are changed in the inputs themselves (the pixels of a patch, or the features of a region), or hidden from
attention; words are masked or taken out of the text. What a kind of input does not allow is refused in one sentence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from attnscope.conditions import Condition, Phrase
from attnscope.families import Inputs
from attnscope.families.labels import LABELS, UNASKED, WRITTEN
from attnscope.families.layouts import patch_grid
from attnscope.families.losses import writes_forward
from attnscope.families.regions import given_boxes
from attnscope.loading import LoadedModel, ModelError
from attnscope.samples import Sample, image_size
from attnscope.tokens import KIND_CODES

_PIXELS = "pixel_values"
_FEATURES = ("visual_feats", "visual_embeds")
_PLACEHOLDERS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of one sample in one stream: places on a grid, or places in a list (rows 0, column = place)."""

    rows: int
    columns: int
    row: np.ndarray
    column: np.ndarray
    tokens: np.ndarray
    on_grid: bool
    stream: str = ""

    @classmethod
    def of(cls, kind: np.ndarray, row: np.ndarray, column: np.ndarray, stream: str = "") -> "ImageTokens":
        """Those among the tokens (token,) of a stream."""
        tokens = np.flatnonzero(kind == KIND_CODES["image"])
        on_grid = bool(tokens.size) and bool((row[tokens] >= 0).all())
        if on_grid:
            rows, columns = int(row[tokens].max()) + 1, int(column[tokens].max()) + 1
            return cls(rows, columns, row[tokens].astype(int), column[tokens].astype(int), tokens, True, stream)
        places = np.arange(tokens.size)
        return cls(1, max(1, tokens.size), np.zeros_like(places), places, tokens, False, stream)

    def covered(self, grid: np.ndarray) -> np.ndarray | None:
        """Which of these tokens a mask of a grid, or of a list (one row), covers, (image token,); None if unclear."""
        if grid.all():
            return np.ones(len(self.tokens), bool)
        rows, columns = grid.shape
        if self.on_grid == (rows > 1) or (rows, columns) == (self.rows, self.columns):
            return grid[self.row * rows // self.rows, self.column * columns // self.columns]
        # Patches that nobody placed stand in row-major order, if there are as many.
        return grid.ravel() if not self.on_grid and len(self.tokens) == grid.size else None

    def on(self, chosen: np.ndarray) -> np.ndarray:
        """The chosen of these tokens (image token,) as a mask (row, column)."""
        grid = np.zeros((self.rows, self.columns), bool)
        grid[self.row[chosen], self.column[chosen]] = True
        return grid


@dataclass(frozen=True)
class Case:
    """A sample as a batch has it: what its tokens are, by stream, and the phrase that the condition is about."""

    position: int
    sample: Sample
    phrase: Phrase | None
    image: ImageTokens | None
    ranks: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Applied:
    """A batch under a condition: inputs, what is hidden (row, column) per sample, and what is asked for."""

    inputs: Inputs
    hidden: list[np.ndarray | None]
    labels: torch.Tensor | None
    asked_place: list[tuple[int, int] | None]
    applies: np.ndarray
    changed: np.ndarray
    content: np.ndarray


@dataclass(frozen=True)
class ImageStatistics:
    """Mean and standard deviation of the image inputs of a run: by colour of pixels, or by feature of regions."""

    mean: torch.Tensor
    spread: torch.Tensor


def image_statistics(batches: Sequence[Inputs]) -> ImageStatistics | None:
    """The statistics over some batches; None where they hold no images that have such."""
    parts = [_flat(batch) for batch in batches]
    values = [p for p in parts if p is not None]
    if not values:
        return None
    joined = torch.cat(values).double()
    return ImageStatistics(joined.mean(dim=0).float(), joined.std(dim=0, correction=0).float())


def _flat(inputs: Inputs) -> torch.Tensor | None:
    """Image values (value, channel)."""
    pixels = inputs.get(_PIXELS)
    if pixels is not None:
        return pixels.movedim(1, -1).reshape(-1, pixels.shape[1]).float() if pixels.ndim == 4 else None
    name = next((n for n in _FEATURES if n in inputs), None)
    if name is None:
        return None
    features = inputs[name].float()
    mask = inputs.get("visual_attention_mask")
    return features[mask > 0] if mask is not None else features.flatten(0, 1)


def overlaps(cells: np.ndarray, boxes: Sequence[Sequence[float]], on_grid: bool) -> np.ndarray:
    """How far each token belongs to an object, (token,) in [0, 1], over the object's boxes the most.

    `cells` and `boxes` are (left, top, right, bottom). For regions of a detector it is the share of the object's box
    that the region covers (intersection over target, Frank et al., EMNLP 2021); a patch is smaller than most objects,
    so for patches it is the share of the patch that lies in the box.
    """
    best = np.zeros(len(cells))
    for box in boxes:
        shared = _intersections(cells, box)
        whole = _area(cells) if on_grid else _area(np.asarray(box, float))
        best = np.maximum(best, shared / np.maximum(whole, 1e-12))
    return best


def intersections_over_union(cells: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Intersection over union of each token with the object's boxes, the most of them, (token,)."""
    best = np.zeros(len(cells))
    for box in boxes:
        shared = _intersections(cells, box)
        best = np.maximum(best, shared / np.maximum(_area(cells) + _area(np.asarray(box, float)) - shared, 1e-12))
    return best


def _intersections(cells: np.ndarray, box: Sequence[float]) -> np.ndarray:
    low = np.maximum(cells[:, :2], np.asarray(box[:2], float))
    high = np.minimum(cells[:, 2:], np.asarray(box[2:], float))
    return np.clip(high - low, 0, None).prod(axis=1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


class Ablation:
    """Conditions applied to the batches of one run.

    `other` gives the inputs of another sample than the one at a position (for the operator 'other').
    """

    def __init__(
        self, loaded: LoadedModel, statistics: ImageStatistics | None, other: Callable[[int, int], Inputs]
    ) -> None:
        self._loaded = loaded
        self._statistics = statistics
        self._other = other

    def apply(self, condition: Condition, inputs: Inputs, cases: Sequence[Case]) -> Applied:
        """The batch under a condition; rows that it doesn't apply to are marked and left as they are."""
        count = len(cases)
        done = Applied(
            inputs={name: tensor.clone() for name, tensor in inputs.items()},
            hidden=[None] * count,
            labels=None,
            asked_place=[None] * count,
            applies=np.ones(count, bool),
            changed=np.zeros(count, np.int64),
            content=np.zeros(count, np.int64),
        )
        self._image(condition, done, cases)
        self._text(condition, done, cases)
        return done

    # -- image ------------------------------------------------------------------------------------------------------

    def _image(self, condition: Condition, done: Applied, cases: Sequence[Case]) -> None:
        if condition.image == "intact" and condition.ask != "object":
            return
        takes = np.zeros(len(cases), bool)
        grids: list[np.ndarray | None] = [None] * len(cases)
        for row, case in enumerate(cases):
            if case.image is None:
                done.applies[row] = False
                continue
            chosen, place = self._chosen_image(condition, done.inputs, row, case)
            if chosen is None:
                done.applies[row] = False
                continue
            grids[row] = case.image.on(chosen)
            done.asked_place[row] = place
            takes[row] = chosen.any()
            done.changed[row] += int(chosen.sum()) if condition.image != "intact" else 0
            done.content[row] += len(chosen)
        if condition.operator == "drop":
            done.hidden = grids
            return
        if not takes.any():
            return
        if done.inputs.get(_PIXELS) is not None and done.inputs[_PIXELS].ndim == 4:
            self._replace_pixels(condition, done, cases, grids)
        elif any(name in done.inputs for name in _FEATURES):
            self._replace_features(condition, done, cases, grids)
        else:
            raise ModelError(
                f"operator {condition.operator!r} changes pixels or region features, and {self._loaded.name!r} takes"
                " its images in another form; use the operator 'drop'"
            )

    def _chosen_image(
        self, condition: Condition, inputs: Inputs, row: int, case: Case
    ) -> tuple[np.ndarray | None, tuple[int, int] | None]:
        """Which image tokens go, (image token,) bool, and the place that is asked for; None where none can be told."""
        image = case.image
        assert image is not None
        count = len(image.tokens)
        chosen = np.zeros(count, bool)
        place = None
        if condition.image == "all":
            chosen[:] = True
        elif condition.image == "ranked":
            ranks = case.ranks.get("image")
            if ranks is None or not np.isfinite(ranks).any():
                return None, None
            chosen = first_of(ranks, condition, case.position)
        if condition.image == "object" or condition.ask == "object":
            boxes = () if case.phrase is None else case.phrase.boxes
            cells = None if not boxes else token_boxes(image, inputs, row, case.sample, self._loaded)
            if cells is None:
                return None, None
            belongs = overlaps(cells, boxes, image.on_grid) > condition.threshold
            if not belongs.any():
                return None, None
            chosen = chosen | belongs
            if condition.ask == "object":
                # Of equal ones the middle one, which is least likely to show an edge.
                fit = np.where(belongs, intersections_over_union(cells, boxes), -1)
                best = np.flatnonzero(fit >= fit.max() - 1e-9)
                at = int(best[len(best) // 2])
                place = (int(image.row[at]), int(image.column[at]))
        return chosen, place

    def _replace_pixels(
        self, condition: Condition, done: Applied, cases: Sequence[Case], grids: Sequence[np.ndarray | None]
    ) -> None:
        pixels = done.inputs[_PIXELS]
        for row, (case, grid) in enumerate(zip(cases, grids, strict=True)):
            if grid is None or not grid.any():
                continue
            stands_in = self._instead(condition, pixels[row], case)
            if stands_in is None:
                done.applies[row] = False
                continue
            where = torch.from_numpy(_pixel_mask(grid, pixels, done.inputs, row, self._loaded))
            pixels[row] = torch.where(where, stands_in.to(pixels.dtype), pixels[row])

    def _replace_features(
        self, condition: Condition, done: Applied, cases: Sequence[Case], grids: Sequence[np.ndarray | None]
    ) -> None:
        name = next(n for n in _FEATURES if n in done.inputs)
        features = done.inputs[name]
        for row, (case, grid) in enumerate(zip(cases, grids, strict=True)):
            if grid is None or not grid.any():
                continue
            stands_in = self._instead(condition, features[row].T[..., None], case)
            if stands_in is None:
                done.applies[row] = False
                continue
            where = torch.zeros(features.shape[1], dtype=torch.bool)
            where[: grid.shape[1]] = torch.from_numpy(grid[0])
            new = stands_in[..., 0].T.to(features.dtype)
            features[row] = torch.where(where[:, None], new, features[row])

    def _instead(self, condition: Condition, one: torch.Tensor, case: Case) -> torch.Tensor | None:
        """What stands in the place of an image (channel, ...); None where there is nothing of that size."""
        if condition.operator == "zero":
            return torch.zeros_like(one)
        if condition.operator == "other":
            given = self._other(case.position, condition.seed)
            name = next((n for n in (_PIXELS, *_FEATURES) if n in given), None)
            if name is None:
                return None
            found = given[name][0] if name == _PIXELS else given[name][0].T[..., None]
            return found if found.shape == one.shape else None
        assert self._statistics is not None
        wide = [-1] + [1] * (one.ndim - 1)
        mean = self._statistics.mean.view(wide).expand(one.shape)
        if condition.operator == "mean":
            return mean
        generator = torch.Generator().manual_seed(1_000_003 * condition.seed + case.position)
        return mean + self._statistics.spread.view(wide) * torch.randn(one.shape, generator=generator)

    # -- text -------------------------------------------------------------------------------------------------------

    def _text(self, condition: Condition, done: Applied, cases: Sequence[Case]) -> None:
        if condition.text in ("intact", "negative", "given") and condition.ask != "phrase":
            return
        ids = done.inputs.get("input_ids")
        if ids is None:
            raise ModelError(f"{self._loaded.name!r} takes no text, which the condition {condition.name!r} changes")
        dropped = np.zeros(tuple(ids.shape), bool)
        masked = np.zeros_like(dropped)
        labels = torch.full_like(ids, UNASKED)
        for row, case in enumerate(cases):
            chosen = self._chosen_words(condition, done, row, case)
            if chosen is None:
                continue
            (dropped if condition.text_operator == "drop" else masked)[row] |= chosen
            if condition.ask == "phrase":
                asked = self.phrase_words(done.inputs, row, case)
                if asked is None:
                    done.applies[row] = False
                    continue
                labels[row, torch.from_numpy(asked)] = ids[row, torch.from_numpy(asked)]
                if not writes_forward(self._loaded):
                    masked[row] |= asked
                dropped[row] &= ~asked
        if masked.any():
            ids[torch.from_numpy(masked)] = self._mask_token(condition)
        if condition.ask == "phrase":
            done.labels = labels
        if dropped.any():
            self._drop_words(done, dropped)

    def _chosen_words(self, condition: Condition, done: Applied, row: int, case: Case) -> np.ndarray | None:
        """Which words go, (token,) bool; None where the condition doesn't apply to the sample."""
        words = self.content_words(done.inputs, row)
        chosen = np.zeros(len(words), bool)
        done.content[row] += int(words.sum()) if condition.text != "intact" else 0
        if condition.text == "all":
            chosen = words
        elif condition.text == "phrase":
            found = self.phrase_words(done.inputs, row, case)
            if found is None:
                done.applies[row] = False
                return None
            chosen = found
        elif condition.text == "ranked":
            ranks = case.ranks.get("text")
            if ranks is None or not np.isfinite(ranks).any():
                done.applies[row] = False
                return None
            if len(ranks) != words.sum():
                raise ModelError(
                    f"sample {case.sample.id!r} was ranked with {len(ranks)} words and now has {int(words.sum())}"
                )
            chosen[words] = first_of(ranks, condition, case.position)
        done.changed[row] += int(chosen.sum())
        return chosen

    def content_words(self, inputs: Inputs, row: int) -> np.ndarray:
        """The tokens of a text that are words: no padding, no special token, no place of an image, (token,) bool."""
        ids = inputs["input_ids"][row]
        real = torch.ones_like(ids, dtype=torch.bool)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == inputs["input_ids"].shape:
            real = mask[row] > 0
        tokenizer = self._loaded.tokenizer
        special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
        special |= {n for name in _PLACEHOLDERS if isinstance(n := getattr(self._loaded.config, name, None), int)}
        if WRITTEN in inputs and inputs[LABELS].shape == inputs["input_ids"].shape:
            # What the model wrote is its answer, which is asked for.
            real = real & (inputs[LABELS][row] == UNASKED)
        return real.cpu().numpy() & ~np.isin(ids.cpu().numpy(), list(special))

    def phrase_words(self, inputs: Inputs, row: int, case: Case) -> np.ndarray | None:
        """The tokens of the case's phrase, (token,) bool; None where its text isn't found in the input."""
        tokenizer, text = self._loaded.tokenizer, case.sample.text
        span = None if case.phrase is None else phrase_span(case.phrase, text or "")
        if tokenizer is None or text is None or span is None:
            return None
        read = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, text[: span[0]])]
        whole, before = read[0], len(read[1])
        until = len(tokenizer(text[: span[1]], add_special_tokens=False)["input_ids"])
        if getattr(tokenizer, "is_fast", False):
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            inside = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0] and end > start]
            if not inside:
                return None
            before, until = inside[0], inside[-1] + 1
        ids = inputs["input_ids"][row].tolist()
        first = next((i for i in range(len(ids) - len(whole) + 1) if ids[i : i + len(whole)] == whole), None)
        if first is None or until <= before:
            return None
        chosen = np.zeros(len(ids), bool)
        chosen[first + before : first + until] = True
        return chosen

    def _mask_token(self, condition: Condition) -> int:
        found = getattr(self._loaded.tokenizer, "mask_token_id", None)
        if found is None:
            raise ModelError(
                f"{self._loaded.name!r} has no mask token, which the condition {condition.name!r} puts in the place of"
                " words; use the text operator 'drop'"
            )
        return int(found)

    def _drop_words(self, done: Applied, dropped: np.ndarray) -> None:
        """Take words out of the texts: what is left moves together, and padding fills the row up again."""
        ids = done.inputs["input_ids"]
        mask = done.inputs.get("attention_mask")
        left = bool(mask is not None and mask.shape == ids.shape and (mask[:, 0] == 0).any())
        order = np.argsort(dropped, axis=1, kind="stable")
        if left:
            order = np.argsort(~dropped, axis=1, kind="stable")
        order_ = torch.from_numpy(order)
        gone = torch.from_numpy(np.take_along_axis(dropped, order, axis=1))
        pad = getattr(self._loaded.tokenizer, "pad_token_id", None) or 0
        for name, tensor in done.inputs.items():
            if tensor.shape[:2] == ids.shape and tensor.ndim == 2 and not tensor.is_floating_point():
                moved = tensor.gather(1, order_)
                fill = {"input_ids": pad, LABELS: UNASKED}.get(name, 0)
                done.inputs[name] = moved.masked_fill(gone, fill)
        if mask is None and self._loaded.takes("attention_mask") and not self._fills_up():
            done.inputs["attention_mask"] = (~gone).long()
        if done.labels is not None:
            done.labels = done.labels.gather(1, order_).masked_fill(gone, UNASKED)

    def _fills_up(self) -> bool:
        """Whether the model reads padding as part of every text, as SigLIP does."""
        return self._loaded.family.name.startswith("siglip")


def first_of(ranks: np.ndarray, condition: Condition, position: int) -> np.ndarray:
    """The fraction of tokens that a ranking puts first (or last), (token,) bool; ties are broken at random.

    As many as the fraction of the count rounds to, half up; a token without a rank comes last.
    """
    count = int(np.floor(condition.fraction * len(ranks) + 0.5))
    ties = np.random.default_rng((condition.seed, position)).permutation(len(ranks))
    values = np.where(np.isfinite(ranks), ranks, -np.inf)
    order = np.lexsort((ties, -values if condition.first == "most" else values))
    chosen = np.zeros(len(ranks), bool)
    chosen[order[:count]] = True
    return chosen


def phrase_span(phrase: Phrase, text: str) -> tuple[int, int] | None:
    """Where a phrase stands in a text: by its span, or else the first place that reads the same."""
    if phrase.span is not None:
        return phrase.span
    at = text.lower().find(phrase.text.lower()) if phrase.text else -1
    return None if at < 0 else (at, at + len(phrase.text))


def token_boxes(image: ImageTokens, inputs: Inputs, row: int, sample: Sample, loaded: LoadedModel) -> np.ndarray | None:
    """The box of each image token in pixels of the original image, (image token, 4); None where nobody can tell."""
    size = image_size(sample)
    if size is None:
        return None
    if not image.on_grid:
        boxes = given_boxes(inputs, row, size)
        return None if boxes is None else boxes[: len(image.tokens)]
    pixels = inputs.get(_PIXELS)
    if pixels is None:
        return None
    height, width = _cell(image, pixels, loaded)
    low = np.stack([image.column * width, image.row * height], axis=1)
    cells = np.concatenate([low, low + np.array([width, height])], axis=1)
    return _in_original(cells, size, pixels, inputs, row, loaded)


def _cell(image: ImageTokens, pixels: torch.Tensor, loaded: LoadedModel) -> tuple[float, float]:
    """Height and width of a token's cell in pixels of the model's input."""
    if pixels.ndim != 4:
        return 1 / image.rows, 1 / image.columns
    config = getattr(loaded.config, "vision_config", loaded.config)
    rows, columns = patch_grid(pixels, config)
    # Padded images have fewer patches than the batch's grid.
    if rows >= image.rows and columns >= image.columns and rows < 2 * image.rows and columns < 2 * image.columns:
        return pixels.shape[-2] / rows, pixels.shape[-1] / columns
    return pixels.shape[-2] / image.rows, pixels.shape[-1] / image.columns


def _in_original(
    cells: np.ndarray, size: tuple[int, int], pixels: torch.Tensor, inputs: Inputs, row: int, loaded: LoadedModel
) -> np.ndarray:
    """Boxes in the model's input as boxes in the original image, whichever way the processor fitted it."""
    width, height = size
    if pixels.ndim != 4:
        return cells * np.array([width, height, width, height])
    seen_height, seen_width = pixels.shape[-2:]
    mask = inputs.get("pixel_mask")
    if mask is not None and mask.ndim == 3:
        seen_height, seen_width = int(mask[row, :, 0].sum()), int(mask[row, 0].sum())
    processor = loaded.image_processor
    asked = getattr(processor, "size", None)
    shortest = asked.get("shortest_edge") if isinstance(asked, Mapping) else getattr(asked, "shortest_edge", None)
    if getattr(processor, "do_center_crop", False) and shortest:
        scale = shortest / min(width, height)
        left, top = (width * scale - seen_width) / 2, (height * scale - seen_height) / 2
        return (cells + np.array([left, top, left, top])) / scale
    scales = np.array([width / seen_width, height / seen_height] * 2)
    return cells * scales


def _pixel_mask(grid: np.ndarray, pixels: torch.Tensor, inputs: Inputs, row: int, loaded: LoadedModel) -> np.ndarray:
    """Which pixels the chosen patches have, (row, column) bool."""
    height, width = pixels.shape[-2:]
    cells = ImageTokens(grid.shape[0], grid.shape[1], np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), True)
    cell_height, cell_width = _cell(cells, pixels, loaded)
    rows = np.minimum((np.arange(height) / cell_height).astype(int), grid.shape[0] - 1)
    columns = np.minimum((np.arange(width) / cell_width).astype(int), grid.shape[1] - 1)
    inside = (np.arange(height) < cell_height * grid.shape[0])[:, None] & (
        np.arange(width) < cell_width * grid.shape[1]
    )
    # Pixels beyond the last whole patch are seen by no patch; they go with the whole image alone.
    return grid[rows[:, None], columns] & (inside | grid.all())


def with_text(sample: Sample, condition: Condition) -> Sample | None:
    """The sample with a condition's text in the place of its own: a given one, or its negative (None: it has none).

    Its regions keep their boxes, which may be the model's image, and no longer say what its text names.
    """
    text = condition.given or sample.targets.get("negative")
    unnamed = tuple(replace(region, phrase=None, span=None) for region in sample.regions)
    return None if text is None else replace(sample, text=str(text), regions=unnamed)
