"""Images with texts of a user's own, as models learn them: read once, kept in a folder, and read from there by rows.

Preparing decodes every image once, scales it to the side that the model sees, and appends it to one file; for models
that see regions, what each box shows and where it lies go to two more. Texts become ids of a vocabulary that is made
from the texts that are learned from. What can't be used is left out by name and reason.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import transformers
from PIL import Image

from attnscope.families.regions import boxes_of, crop_regions
from attnscope.reference.corpus import CLS, PAD, REGION_SIDE, REGIONS, SEP, SPECIAL
from attnscope.samples import Sample, SampleError, iterate_samples

SPLITS = ("test", "validation", "train")
FEWEST = 10
"""The fewest usable samples of a training."""
RECORD = "prepared.json"
"""The file that says what is prepared in a folder."""
_PIXELS, _WORDS, _LEFT_OUT = "pixels.bin", "words.npy", "left-out.jsonl"
_CROPS, _BOXES = "crops.bin", "boxes.bin"
_SPLIT_SEED = 0
_TELL_EVERY = 1000


class Rows:
    """Rows of an array that may lie in a file: what is indexed is read, and nothing else."""

    def __init__(self, array: np.ndarray, numbers: np.ndarray) -> None:
        self._array, self._numbers = array, numbers

    def __getitem__(self, at: "np.ndarray | slice") -> np.ndarray:
        return np.asarray(self._array[self._numbers[at]])

    def __len__(self) -> int:
        return len(self._numbers)


class Learnable(Protocol):
    """What every lesson may ask of a corpus, by scene or pair.

    `words[numbers]` are ids (row, token), CLS first, SEP behind the last word, then padding; `pixels[numbers]` are
    images (row, row of pixels, column, colour) uint8; `crops[numbers]` are what regions show (row, region, row of
    pixels, column, colour) uint8, and `boxes[numbers]` (row, region, 4) float32 where they lie in parts of the image's
    sides; `hard` says which are to be asked about later than others. A lesson that asks for more (classes of patches,
    questions) asks a `Corpus` of generated scenes.
    """

    @property
    def hard(self) -> np.ndarray: ...
    @property
    def words(self) -> np.ndarray: ...
    @property
    def pixels(self) -> "np.ndarray | Rows": ...
    @property
    def crops(self) -> "np.ndarray | Rows": ...
    @property
    def boxes(self) -> "np.ndarray | Rows": ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Shape:
    """How samples are prepared: the side of images (0 for none), and the most tokens of a text.

    `tokenizer` is 'words' (whole words, the most frequent ones) or 'wordpiece'; `vocabulary` is the most entries.
    `held_out` samples each (a tenth of all at most) are for goals and for the card, and the vocabulary doesn't know
    them. With `regions`, what boxes show is kept, REGIONS of each image.
    """

    side: int
    length: int
    tokenizer: str
    vocabulary: int
    held_out: int
    regions: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise SampleError(f"unknown tokenizer {self.tokenizer!r}; known: {', '.join(TOKENIZERS)}")


@dataclass(frozen=True)
class Pairs:
    """One split of prepared samples (see `Learnable`)."""

    hard: np.ndarray
    words: np.ndarray
    pixels: Rows
    crops: Rows
    boxes: Rows

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared samples: `count` are usable, `left_out` are not, `cut` of the usable have longer texts.

    `boxless` of the usable name no box, where regions are kept.
    """

    folder: Path
    source: str
    shape: Shape
    count: int
    left_out: int
    cut: int
    digest: str
    vocabulary: tuple[str, ...]
    boxless: int = 0

    @property
    def left_out_at(self) -> Path:
        """The file that names what was left out, and why."""
        return self.folder / _LEFT_OUT

    def split(self, name: str) -> Pairs:
        """The pairs of a split: those held out for 'test' and for 'validation', the rest for 'train'."""
        numbers = _split(self.count, self.shape.held_out)[name]
        words = np.load(self.folder / _WORDS)[numbers]
        side, regions = self.shape.side, REGIONS if self.shape.regions else 0
        kept = (
            self._kept(_PIXELS, np.uint8, (side, side, 3)),
            self._kept(_CROPS, np.uint8, (regions, REGION_SIDE, REGION_SIDE, 3)),
            self._kept(_BOXES, np.float32, (regions, 4)),
        )
        return Pairs(np.zeros(len(numbers), bool), words, *(Rows(array, numbers) for array in kept))

    def _kept(self, name: str, kind: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        """A file of the folder as an array (sample, ...); nothing is read where nothing is kept of a sample."""
        whole = (self.count, *shape)
        return np.memmap(self.folder / name, kind, "r", shape=whole) if np.prod(shape) else np.zeros(whole, kind)


def _split(count: int, held_out: int) -> dict[str, np.ndarray]:
    """Numbers of the samples of each split, each in rising order, so that a file is read from front to back."""
    order = np.random.Generator(np.random.PCG64(_SPLIT_SEED)).permutation(count)
    size = min(held_out, count // FEWEST)
    parts = np.split(order, [size, 2 * size])
    return {name: np.sort(part) for name, part in zip(SPLITS, parts, strict=True)}


def prepare(source: str, folder: Path, shape: Shape, tell: Callable[[int], None] | None = None) -> Prepared:
    """Prepare samples into a folder, or open what was prepared there before; the source is then not read again.

    `tell` hears now and then how many were read.

    Raises
    ------
    SampleError
        When the source can't be read, holds too few usable samples, or the folder has something else prepared, or no
        regions where they are needed.
    """
    if (folder / RECORD).is_file():
        found = open_prepared(folder)
        if shape.regions and not found.shape.regions:
            raise SampleError(
                f"{str(folder)!r} holds samples prepared without the regions that the model sees; prepare them into"
                " another folder with --regions"
            )
        # Who needs no images or no regions doesn't mind any.
        asked = replace(shape, side=shape.side or found.shape.side, regions=found.shape.regions)
        if (found.source, found.shape) != (source, asked):
            raise SampleError(
                f"{str(folder)!r} holds samples prepared otherwise ({found.source!r}, {_words_of(found.shape)});"
                " train with these values, or name another folder"
            )
        return found
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    texts = _read(source, folder, shape, digest, tell or (lambda seen: None))
    if len(texts.used) < FEWEST:
        example = f", for example {texts.example}" if texts.example else ""
        raise SampleError(
            f"samples {source!r} hold {len(texts.used)} usable of {texts.seen}, and a training needs {FEWEST}"
            f" or more{example}"
        )
    taught = [texts.used[number] for number in _split(len(texts.used), shape.held_out)["train"]]
    vocabulary = _VOCABULARIES[shape.tokenizer](taught, shape.vocabulary)
    words, cut = _ids(texts.used, vocabulary, shape.length)
    np.save(folder / _WORDS, words)
    digest.update(words.tobytes())
    record = {
        "source": source,
        "shape": asdict(shape),
        "count": len(texts.used),
        "left_out": texts.seen - len(texts.used),
        "cut": cut,
        "digest": digest.hexdigest(),
        "vocabulary": vocabulary,
        "boxless": texts.boxless,
    }
    # Written last: the folder is prepared when this stands.
    unfinished = folder / f"{RECORD}.unfinished"
    unfinished.write_text(json.dumps(record), encoding="utf-8")
    unfinished.replace(folder / RECORD)
    return open_prepared(folder)


def open_prepared(folder: Path) -> Prepared:
    """What was prepared in a folder."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    shape, vocabulary = Shape(**record.pop("shape")), tuple(record.pop("vocabulary"))
    return Prepared(folder=folder, shape=shape, vocabulary=vocabulary, **record)


def _words_of(shape: Shape) -> str:
    return ", ".join(f"{name}={value}" for name, value in asdict(shape).items())


@dataclass
class _Texts:
    """Texts of the usable samples, how many were seen, one that wasn't usable, and how many lack a box they need."""

    used: list[str]
    seen: int = 0
    example: str = ""
    boxless: int = 0


class _Digest(Protocol):
    def update(self, content: bytes, /) -> None: ...


def _read(source: str, folder: Path, shape: Shape, digest: _Digest, tell: Callable[[int], None]) -> _Texts:
    """Append what is kept of usable samples to a file each, and name the others in another."""
    texts = _Texts([])
    names = (_PIXELS, _CROPS, _BOXES) if shape.regions else (_PIXELS,)
    with ExitStack() as opened:
        files = [opened.enter_context((folder / name).open("wb")) for name in names]
        left_out = opened.enter_context((folder / _LEFT_OUT).open("w", encoding="utf-8"))
        for sample in iterate_samples(source):
            texts.seen += 1
            if texts.seen % _TELL_EVERY == 0:
                tell(texts.seen)
            try:
                contents = _usable(sample, shape)
            except SampleError as error:
                texts.example = texts.example or f"{sample.id!r}: {error}"
                left_out.write(json.dumps({"id": sample.id, "problem": str(error)}) + "\n")
                continue
            for file, content in zip(files, contents, strict=True):
                file.write(content)
                digest.update(content)
            texts.used.append(str(sample.text))
            texts.boxless += shape.regions and all(region.box is None for region in sample.regions)
    return texts


def _usable(sample: Sample, shape: Shape) -> list[bytes]:
    """What is kept of a sample that has what is needed: its scaled image (empty where none is needed), its regions."""
    if sample.problem:
        raise SampleError(sample.problem)
    if not (sample.text or "").strip():
        raise SampleError("it has no text")
    if not shape.side and not shape.regions:
        return [b""]
    image = sample.load_image()
    if image is None:
        raise SampleError("it has no image")
    side = (shape.side, shape.side)
    pixels = np.asarray(image.resize(side, Image.Resampling.BILINEAR)).tobytes() if shape.side else b""
    return [pixels, *(_regions(sample, image) if shape.regions else ())]


def _regions(sample: Sample, image: Image.Image) -> tuple[bytes, bytes]:
    """What REGIONS boxes of a sample show, and where they lie (see `Learnable`)."""
    boxes = boxes_of(sample.regions, image.size, REGIONS)
    places = (boxes / [*image.size, *image.size]).astype(np.float32)
    return crop_regions(image, boxes, REGION_SIDE).tobytes(), places.tobytes()


def tokenizer_of(vocabulary: Sequence[str], length: int) -> transformers.BertTokenizer:
    """What turns texts into ids of a vocabulary: lower case, words and punctuation apart."""
    numbers = {word: number for number, word in enumerate(vocabulary)}
    return transformers.BertTokenizer(vocab=numbers, do_lower_case=True, model_max_length=length)


def _ids(texts: Sequence[str], vocabulary: Sequence[str], length: int) -> tuple[np.ndarray, int]:
    """Ids (text, token) of texts, and how many texts were cut."""
    tokenizer = tokenizer_of(vocabulary, 1 << 30)
    words = np.full((len(texts), length), PAD, np.int32)
    cut = 0
    for start in range(0, len(texts), 1000):
        found = tokenizer(list(texts[start : start + 1000]), add_special_tokens=False)["input_ids"]
        for row, ids in enumerate(found, start):
            cut += len(ids) > length - 2
            kept = [CLS, *ids[: length - 2], SEP]
            words[row, : len(kept)] = kept
    return words, cut


def _most_frequent(texts: Sequence[str], size: int) -> list[str]:
    """Special tokens and the most frequent words; of equally frequent ones the first in the alphabet."""
    counts = _word_counts(texts)
    ordered = sorted(counts.keys() - set(SPECIAL), key=lambda word: (-counts[word], word))
    return [*SPECIAL, *ordered[: size - len(SPECIAL)]]


def _pieces(texts: Sequence[str], size: int) -> list[str]:
    """The vocabulary that WordPiece learns of texts (Schuster and Nakajima, ICASSP 2012), by `tokenizers`."""
    from tokenizers import BertWordPieceTokenizer

    # It numbers continuing letters in the order of a hash table, and breaks ties by number: named first, they have an
    # order, and the same texts give the same vocabulary.
    inner = sorted({f"##{letter}" for word in _word_counts(texts) for letter in word[1:]})
    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(iter(texts), size, 2, special_tokens=[*SPECIAL, *inner], show_progress=False)
    numbers: Mapping[str, int] = learner.get_vocab()
    return sorted(numbers, key=numbers.__getitem__)


def _word_counts(texts: Sequence[str]) -> Counter[str]:
    split = tokenizer_of(SPECIAL, 1 << 30).backend_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        plain = split.normalizer.normalize_str(text)
        counts.update(word for word, _ in split.pre_tokenizer.pre_tokenize_str(plain))
    return counts


_VOCABULARIES = {"words": _most_frequent, "wordpiece": _pieces}
TOKENIZERS = tuple(_VOCABULARIES)


def left_out(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """Id and problem of each sample that was left out."""
    with prepared.left_out_at.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield record["id"], record["problem"]
