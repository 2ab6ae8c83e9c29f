"""Samples: one image with its text, and the sources that they are read from.

A source is a folder of images (with or without `metadata.jsonl`), a JSONL, CSV or Parquet file, or a list made by the
caller. A record that can't be used is not dropped: it becomes a `Sample` with a `problem`, keeps its place, and the
run says what was wrong with it.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_DATASETS = "datasets:"
_IMAGE_COLUMNS = ("file_name", "image", "image_path")
_TEXT_COLUMNS = ("text", "caption")


class SampleError(ValueError):
    """One sample, or a whole source of samples, that can't be used; the message is one sentence."""


@dataclass(frozen=True)
class Mask:
    """Which pixels of an image belong to something, run-length encoded.

    `size` is (rows, columns) of the image; `counts` are the lengths of alternating runs of pixels outside and inside,
    down the columns from the left, beginning outside: COCO's uncompressed encoding.
    """

    size: tuple[int, int]
    counts: tuple[int, ...]

    def pixels(self) -> np.ndarray:
        """The mask itself, (row, column) bool."""
        inside = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(inside, self.counts).reshape(self.size[::-1]).T


def encode_mask(pixels: np.ndarray) -> Mask:
    """A mask (row, column) bool in its run-length encoding."""
    flat = np.asarray(pixels, bool).T.ravel()
    # A run begins where a pixel differs from the one before it, and the first run lies outside.
    ends = (np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist()
    if flat.size and flat[0]:
        ends.insert(0, 0)
    starts = [0, *ends]
    return Mask(
        (pixels.shape[0], pixels.shape[1]), tuple(b - a for a, b in zip(starts, [*ends, flat.size], strict=True))
    )


@dataclass(frozen=True)
class Region:
    """A part of a sample: a box in image pixels, the phrase that names it, or both.

    `label` says what it shows, whether a phrase does or not.
    `box` is (left, top, right, bottom) in pixels of the original image; `span` is (first, past-the-last) character of
    the phrase in the sample's text; `mask` says which pixels of the original image belong to it, where that is known.
    """

    phrase: str | None = None
    box: tuple[float, float, float, float] | None = None
    span: tuple[int, int] | None = None
    mask: Mask | None = None
    label: str | None = None


@dataclass(frozen=True)
class Sample:
    """One image with its text; either may be absent. `image` is a path, encoded bytes or a PIL image."""

    id: str
    image: "Path | bytes | Image | None" = None
    text: str | None = None
    regions: tuple[Region, ...] = ()
    targets: Mapping[str, str | int | float] = field(default_factory=dict)
    problem: str | None = None

    def load_image(self) -> "Image | None":
        """The decoded RGB image, upright as its EXIF tag says.

        Raises
        ------
        SampleError
            When the file is missing or can't be decoded.
        """
        from PIL import Image, ImageOps

        if self.image is None:
            return None
        if isinstance(self.image, Image.Image):
            return self.image.convert("RGB")
        opened = io.BytesIO(self.image) if isinstance(self.image, bytes) else self.image
        try:
            with Image.open(opened) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
        except FileNotFoundError:
            raise SampleError(f"image file {Path(str(self.image)).name!r} is missing") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SampleError(f"image can't be decoded ({_one_line(error)})") from None

    def image_digest(self) -> str:
        """SHA-256 of the image's encoded bytes (of its pixels for a PIL image), or '' without an image."""
        if self.image is None:
            return ""
        if isinstance(self.image, bytes):
            content = self.image
        elif isinstance(self.image, Path):
            content = self.image.read_bytes()
        else:
            content = self.image.tobytes()
        return hashlib.sha256(content).hexdigest()


def image_size(sample: Sample) -> tuple[int, int] | None:
    """Width and height of a sample's image in pixels; None where it has none."""
    image = sample.load_image()
    return None if image is None else image.size


def read_samples(source: str | Path, limit: int | None = None) -> list[Sample]:
    """The samples of a folder, of a JSONL, CSV or Parquet file, or of `datasets:NAME[@SPLIT]`.

    A `datasets` name is a hub name or a folder that `save_to_disk` wrote; the split is 'train' unless named.

    Raises
    ------
    SampleError
        When the source doesn't exist, isn't of a known kind, or holds no sample.
    """
    return list(iterate_samples(source, limit))


def iterate_samples(source: str | Path, limit: int | None = None) -> Iterator[Sample]:
    """The same one after the other, so that images that come as bytes need not all be in memory."""
    found = False
    for sample in _unique(islice(_samples_of(source, limit), limit)):
        found = True
        yield sample
    if not found:
        raise SampleError(f"samples {str(source)!r} hold no sample: no image, and no record in a metadata file")


def _samples_of(source: str | Path, limit: int | None) -> Iterator[Sample]:
    path = Path(source)
    if str(source).startswith(_DATASETS):
        return _from_datasets(str(source).removeprefix(_DATASETS), limit)
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise SampleError(f"samples {str(source)!r} are neither a folder nor a file")
    reader = _FILE_READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_FILE_READERS)
        raise SampleError(f"samples file {str(path)!r} has an unknown kind {path.suffix!r}; known are {known}")
    return _from_records(reader(path), path.parent)


def unique_ids(samples: Iterable[Sample]) -> list[Sample]:
    """The same samples; one whose id was used before is marked as a problem and gets a distinct id."""
    return list(_unique(samples))


def _unique(samples: Iterable[Sample]) -> Iterator[Sample]:
    seen: set[str] = set()
    for number, sample in enumerate(samples):
        if sample.id in seen:
            sample = replace(sample, id=f"{sample.id}#{number}", problem=f"id {sample.id!r} was used before")
        seen.add(sample.id)
        yield sample


def regions_from(text: str) -> tuple[Region, ...]:
    """The regions of a sample as a run holds them, in JSON.

    Raises
    ------
    SampleError
        When they aren't a list of regions.
    """
    return tuple(_region_of(region) for region in _list_of(text))


def _from_folder(folder: Path) -> Iterator[Sample]:
    for name, reader in (("metadata.jsonl", _read_jsonl), ("metadata.csv", _read_csv)):
        if (folder / name).is_file():
            yield from _from_records(reader(folder / name), folder)
            return
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.resolve().is_relative_to(folder.resolve()):
            yield Sample(id=path.relative_to(folder).as_posix(), image=path)


def _from_datasets(name: str, limit: int | None) -> Iterator[Sample]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise SampleError("reading a dataset needs datasets; run: pip install 'attnscope[datasets]'") from None
    name, _, split = name.partition("@")
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                if (split or "train") not in found:
                    raise SampleError(f"dataset {name!r} has no split {split or 'train'!r}; it has {', '.join(found)}")
                found = found[split or "train"]
        else:
            found = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise SampleError(f"dataset {name!r} can't be read ({_one_line(error)})") from None
    for column, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            # Encoded bytes: an image that can't be decoded must cost its sample alone.
            found = found.cast_column(column, datasets.Image(decode=False))
    chosen = found if limit is None else found.take(limit)
    yield from _from_records(chosen, Path(name) if Path(name).is_dir() else Path())


def _from_records(records: Iterable[Mapping[str, object] | str], folder: Path) -> Iterator[Sample]:
    for number, record in enumerate(records):
        if isinstance(record, str):
            yield Sample(id=f"record-{number}", problem=record)
            continue
        try:
            yield _sample_of(record, number, folder)
        except SampleError as error:
            yield Sample(id=str(record.get("id") or f"record-{number}"), problem=str(error))


def _sample_of(record: Mapping[str, object], number: int, folder: Path) -> Sample:
    image_name = next((record[c] for c in _IMAGE_COLUMNS if record.get(c)), None)
    text = next((record[c] for c in _TEXT_COLUMNS if record.get(c) is not None), None)
    if image_name is None and text is None:
        raise SampleError("record names neither an image (file_name) nor a text")
    if text is not None and not str(text).strip():
        raise SampleError("text is empty")
    image = None if image_name is None else _image_of(image_name, folder)
    sample_id = record.get("id")
    if sample_id is None or sample_id == "":
        sample_id = image_name if isinstance(image_name, str) else f"record-{number}"
    targets = record.get("targets") or {}
    if not isinstance(targets, Mapping):
        raise SampleError(f"targets are a {type(targets).__name__}, not a mapping")
    regions = tuple(_region_of(r) for r in _list_of(record.get("regions")))
    length = len(str(text or ""))
    for span in (r.span for r in regions if r.span is not None):
        if not 0 <= span[0] < span[1] <= length:
            raise SampleError(f"span {list(span)} lies outside the text of {length} characters")
    return Sample(
        id=str(sample_id),
        image=image,
        text=None if text is None else str(text),
        regions=regions,
        targets=dict(targets),
    )


def _image_of(value: object, folder: Path) -> "Path | bytes":
    """A path inside `folder`, or the encoded bytes that a Parquet or `datasets` image column carries."""
    if isinstance(value, Mapping):
        content = value.get("bytes")
        if isinstance(content, bytes):
            return content
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise SampleError(f"image is a {type(value).__name__}, not a file name")
    path = folder / value
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SampleError(f"image path {value!r} leads outside the folder of the samples")
    return path


def _list_of(value: object) -> Sequence[object]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise SampleError("regions are not valid JSON") from None
    if isinstance(value, Iterable):
        return list(value)
    raise SampleError(f"regions are a {type(value).__name__}, not a list")


def _region_of(value: object) -> Region:
    if not isinstance(value, Mapping):
        raise SampleError(f"region is a {type(value).__name__}, not a mapping of phrase, box, span, mask, label")
    box, span, phrase, mask, label = (value.get(name) for name in ("box", "span", "phrase", "mask", "label"))
    return Region(
        phrase=None if phrase is None else str(phrase),
        box=None if box is None else _box_of(box),
        span=None if span is None else _span_of(span),
        mask=None if mask is None else _mask_of(mask),
        label=None if label is None else str(label),
    )


def _box_of(value: object) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(v) for v in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise SampleError(f"box {value!r} is not four numbers (left, top, right, bottom)") from None
    if not (left < right and top < bottom):
        raise SampleError(f"box {value!r} is empty: left must be below right and top below bottom")
    return left, top, right, bottom


def _span_of(value: object) -> tuple[int, int]:
    try:
        start, stop = (int(v) for v in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise SampleError(f"span {value!r} is not two numbers (first, past-the-last character)") from None
    return start, stop


def _mask_of(value: object) -> Mask:
    try:
        rows, columns = (int(v) for v in value["size"])  # type: ignore[index]
        counts = tuple(int(v) for v in value["counts"])  # type: ignore[index]
    except (TypeError, ValueError, KeyError, IndexError):
        raise SampleError("mask is not a mapping of size (rows, columns) and counts (lengths of runs)") from None
    if min(rows, columns, *counts) < 0 or sum(counts) != rows * columns:
        raise SampleError(f"mask of {sum(counts)} pixels in runs does not fill its {rows} x {columns} pixels")
    return Mask((rows, columns), counts)


def _read_jsonl(path: Path) -> Iterator[Mapping[str, object] | str]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                yield f"line {number} of {path.name} is not valid JSON"
                continue
            yield record if isinstance(record, dict) else f"line {number} of {path.name} is not a JSON object"


def _read_csv(path: Path) -> Iterator[Mapping[str, object] | str]:
    with _open_text(path) as lines:
        yield from csv.DictReader(lines)


def _read_parquet(path: Path) -> Iterator[Mapping[str, object] | str]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise SampleError("reading Parquet samples needs pyarrow; run: pip install 'attnscope[parquet]'") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise SampleError(f"samples file {str(path)!r} can't be read ({_one_line(error)})") from None


def _open_text(path: Path) -> io.TextIOWrapper:
    try:
        return path.open(encoding="utf-8-sig", errors="replace", newline="")
    except OSError as error:
        raise SampleError(f"samples file {str(path)!r} can't be read ({error.strerror})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_FILE_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
