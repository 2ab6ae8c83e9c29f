"""Text-to-image matching by words that attend to regions: SCAN in small, its score one of several.

Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018, text to image with the mean over words, as
Cao et al. (COLING 2022) put scores into it:

1. scores of words and regions, LeakyReLU of slope 0.1, then unit length over the words of each region;
2. softmax over the regions of 9 times that, which gives each word its mixture of regions;
3. the likeness of text and image is the mean over words of the cosine of word and mixture.

Regions and words have unit length before they are scored, so that dot, scaled dot and cosine give the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attnscope.reference.alignments import OWN, Score
from attnscope.reference.corpus import PAD, Corpus
from attnscope.reference.examining import GALLERY, Items, recalls
from attnscope.reference.learners import Learner, UnitClassifier
from attnscope.reference.lessons import HARD_SHARE, UNIT_WEIGHT, draw_scenes, trimmed, unit_loss
from attnscope.reference.readers import WIDTH, RegionReader, TextReader, see_regions
from attnscope.reference.scenes import Generator

SLOPE, SHARPNESS, MARGIN = 0.1, 9.0, 0.2
_BATCH = 32
_SMALL = 1e-8


@dataclass(frozen=True)
class Meeting:
    """Texts that met images: `attention` (text, image, token, region), `cosines` (text, image, token), 0 at padding."""

    attention: Tensor
    cosines: Tensor
    lengths: Tensor

    @property
    def likeness(self) -> Tensor:
        """(text, image), in [-1, 1]."""
        return self.cosines.sum(-1) / self.lengths[:, None]


class Scan(Learner):
    """SCAN with a class for each region beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.regions = TextReader(), RegionReader()
        self.score = Score(OWN, WIDTH)
        self.region_classifier = UnitClassifier()

    def embed_images(self, corpus: Corpus, scenes: np.ndarray) -> tuple[Tensor, Tensor]:
        """Unit vectors (sample, region, channel), and class logits of the regions."""
        hidden = self.regions(see_regions(corpus, scenes))
        return nn.functional.normalize(hidden, dim=-1), self.region_classifier(hidden)

    def embed_texts(self, words: Tensor) -> Tensor:
        """Unit vectors (text, token, channel)."""
        return nn.functional.normalize(self.text(words), dim=-1)

    def meet(self, words: Tensor, texts: Tensor, images: Tensor) -> Meeting:
        """Every text (text, token, channel), whose ids are `words`, with every image (image, region, channel)."""
        sizes = (*texts.shape[:2], *images.shape[:2])

        # One product of all tokens with all regions.
        def by_pair(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            return product(texts.flatten(0, 1), images.flatten(0, 1)).view(sizes).transpose(1, 2)

        return _meet(words, by_pair(self.score), by_pair(_dot), images)

    def meet_own(self, words: Tensor, texts: Tensor, images: Tensor, gone: Tensor | None = None) -> Meeting:
        """Each text with its own image alone, as (text, 1): nothing attends to `gone`, (image, region) bool."""
        scores = self.score(texts, images)[:, None]
        gone = None if gone is None else gone[:, None, None]
        return _meet(words, scores, _dot(texts, images)[:, None], images[:, None], gone)


def _dot(texts: Tensor, images: Tensor) -> Tensor:
    return texts @ images.transpose(-1, -2)


def _meet(words: Tensor, scores: Tensor, products: Tensor, images: Tensor, gone: Tensor | None = None) -> Meeting:
    """From scores and plain products (text, image, token, region) on.

    Cosines of words and mixtures are had without the mixtures: |sum_r a_r v_r|^2 = sum_rs a_r a_s v_r . v_s.
    """
    real = (words != PAD)[:, None, :, None]
    scores = nn.functional.leaky_relu(scores, SLOPE) * real
    scores = SHARPNESS * scores / (scores.square().sum(2, keepdim=True) + _SMALL**2).sqrt()
    if gone is not None:
        scores = scores.masked_fill(gone, -torch.inf)
    attention = scores.softmax(-1)
    lengths = ((attention @ _dot(images, images)) * attention).sum(-1).clamp_min(_SMALL).sqrt()
    cosines = (attention * products).sum(-1) / lengths * real[..., 0]
    return Meeting(attention, cosines, (words != PAD).sum(1))


def scan_losses(learner: Scan, corpus: Corpus, rng: Generator, hard_share: float = HARD_SHARE) -> dict[str, Tensor]:
    """The hinge of each text and image with the likest wrong one of the batch, and the class of every region."""
    scenes = draw_scenes(corpus, _BATCH, rng, hard_share)
    words = trimmed(corpus.words[scenes])
    images, logits = learner.embed_images(corpus, scenes)
    likeness = learner.meet(words, learner.embed_texts(words), images).likeness
    classes = torch.from_numpy(corpus.regions[scenes].astype(np.int64))
    return {
        "match": hinge(likeness),
        "units": UNIT_WEIGHT * unit_loss(logits.flatten(0, 1), classes.flatten()),
    }


def hinge(likeness: Tensor) -> Tensor:
    """Mean over texts and over images of max(0, margin + likest wrong one - right one), summed over both ways."""
    right = likeness.diagonal()
    wrong = likeness.masked_fill(torch.eye(len(likeness), dtype=torch.bool), -torch.inf)
    return sum(((MARGIN + wrong.amax(way) - right).clamp_min(0).mean() for way in (0, 1)), torch.zeros(()))


@torch.no_grad()
def examine_scan(learner: Scan, corpus: Corpus) -> dict[str, Items]:
    """R@1, R@5 and R@10 both ways among 256 scenes, or all if there are fewer, and the classes of regions."""
    size = min(GALLERY, len(corpus))
    hits: dict[str, list[np.ndarray]] = {}
    logits = []
    for start in range(0, len(corpus) - size + 1, size):
        scenes = np.arange(start, start + size)
        images, classes = learner.embed_images(corpus, scenes)
        logits.append(classes)
        words = trimmed(corpus.words[scenes])
        texts = learner.embed_texts(words)
        parts = [learner.meet(w, t, images).likeness for w, t in zip(words.split(32), texts.split(32), strict=True)]
        for name, found in recalls(torch.cat(parts).T.numpy()).items():
            hits.setdefault(name.replace("_r", "_at_"), []).append(found)
    result = {name: Items(np.concatenate(found), np.arange(sum(map(len, found)))) for name, found in hits.items()}
    scene, region = np.nonzero(corpus.region_things[: len(logits) * size] >= 0)
    right_class = torch.cat(logits).argmax(-1).numpy()[scene, region] == corpus.regions[scene, region]
    return result | {"regions": Items(right_class.astype(float), scene)}
