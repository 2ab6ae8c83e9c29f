"""Images with texts of a user's own, as models learn them: read once, kept in a folder, and read from there by rows.

Preparing decodes every image once, scales it to the side that the model sees, and appends it to one file; texts become
ids of a vocabulary that is made from the texts that are learned from. What can't be used is left out by name and
reason.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import transformers
from PIL import Image

from attnscope.reference.corpus import CLS, PAD, SEP, SPECIAL
from attnscope.samples import Sample, SampleError, iterate_samples

SPLITS = ("test", "validation", "train")
FEWEST = 10
"""The fewest usable samples of a training."""
RECORD = "prepared.json"
"""The file that says what is prepared in a folder."""
_PIXELS, _WORDS, _LEFT_OUT = "pixels.bin", "words.npy", "left-out.jsonl"
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
    images (row, row of pixels, column, colour) uint8; `hard` says which are to be asked about later than others. A
    lesson that asks for more (classes of patches, questions) asks a `Corpus` of generated scenes.
    """

    @property
    def hard(self) -> np.ndarray: ...
    @property
    def words(self) -> np.ndarray: ...
    @property
    def pixels(self) -> "np.ndarray | Rows": ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Shape:
    """How samples are prepared: the side of images (0 for texts alone), and the most tokens of a text.

    `tokenizer` is 'words' (whole words, the most frequent ones) or 'wordpiece'; `vocabulary` is the most entries.
    `held_out` samples each (a tenth of all at most) are for goals and for the card, and the vocabulary doesn't know
    them.
    """

    side: int
    length: int
    tokenizer: str
    vocabulary: int
    held_out: int

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise SampleError(f"unknown tokenizer {self.tokenizer!r}; known: {', '.join(TOKENIZERS)}")


@dataclass(frozen=True)
class Pairs:
    """One split of prepared samples (see `Learnable`)."""

    hard: np.ndarray
    words: np.ndarray
    pixels: Rows

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared samples: `count` are usable, `left_out` are not, `cut` of the usable have longer texts."""

    folder: Path
    source: str
    shape: Shape
    count: int
    left_out: int
    cut: int
    digest: str
    vocabulary: tuple[str, ...]

    @property
    def left_out_at(self) -> Path:
        """The file that names what was left out, and why."""
        return self.folder / _LEFT_OUT

    def split(self, name: str) -> Pairs:
        """The pairs of a split: those held out for 'test' and for 'validation', the rest for 'train'."""
        numbers = _split(self.count, self.shape.held_out)[name]
        words = np.load(self.folder / _WORDS)[numbers]
        pixels = np.zeros((self.count, 0), np.uint8)
        if self.shape.side:
            shape = (self.count, self.shape.side, self.shape.side, 3)
            pixels = np.memmap(self.folder / _PIXELS, np.uint8, "r", shape=shape)
        return Pairs(np.zeros(len(numbers), bool), words, Rows(pixels, numbers))


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
        When the source can't be read, holds too few usable samples, or the folder has something else prepared.
    """
    if (folder / RECORD).is_file():
        found = open_prepared(folder)
        # Who needs no images doesn't mind any.
        asked = shape if shape.side else replace(shape, side=found.shape.side)
        if (found.source, found.shape) != (source, asked):
            raise SampleError(
                f"{str(folder)!r} holds samples prepared otherwise ({found.source!r}, {_words_of(found.shape)});"
                " train with these values, or name another folder"
            )
        return found
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    texts = _read(source, folder, shape.side, digest, tell or (lambda seen: None))
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
    """Texts of the usable samples, how many were seen, and one that wasn't usable."""

    used: list[str]
    seen: int = 0
    example: str = ""


class _Digest(Protocol):
    def update(self, content: bytes, /) -> None: ...


def _read(source: str, folder: Path, side: int, digest: _Digest, tell: Callable[[int], None]) -> _Texts:
    """Append the images of usable samples to one file, and name the others in another."""
    texts = _Texts([])
    with (folder / _PIXELS).open("wb") as pixels, (folder / _LEFT_OUT).open("w", encoding="utf-8") as left_out:
        for sample in iterate_samples(source):
            texts.seen += 1
            if texts.seen % _TELL_EVERY == 0:
                tell(texts.seen)
            try:
                image = _usable(sample, side)
            except SampleError as error:
                texts.example = texts.example or f"{sample.id!r}: {error}"
                left_out.write(json.dumps({"id": sample.id, "problem": str(error)}) + "\n")
                continue
            pixels.write(image)
            digest.update(image)
            texts.used.append(str(sample.text))
    return texts


def _usable(sample: Sample, side: int) -> bytes:
    """The scaled image of a sample that has what is needed; empty where texts alone are needed."""
    if sample.problem:
        raise SampleError(sample.problem)
    if not (sample.text or "").strip():
        raise SampleError("it has no text")
    if not side:
        return b""
    image = sample.load_image()
    if image is None:
        raise SampleError("it has no image")
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).tobytes()


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
