"""Pictures drawn from captions by sub-regions that attend to words: the attention of AttnGAN in small, supervised.

Xu et al., "AttnGAN: Fine-Grained Text to Image Generation with Attentional Generative Adversarial Networks", CVPR 2018,
into which Cao et al. (COLING 2022) put scores: features of the picture's sub-regions query the words, softmax over the
words, and what a sub-region attended to decides how it is drawn.

Here the finest sub-region is a pixel. It knows where it lies, in whose box, and how manyth in the caption that thing is
mentioned; colour and shape it can only have from the words. There is no adversary: the true picture's pixels are the
targets, so that the ground, which few captions name, is drawn as its mean.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attnscope.reference.alignments import OWN, Score
from attnscope.reference.corpus import PAD, SIDE, Corpus
from attnscope.reference.examining import Items
from attnscope.reference.learners import Learner, normalised
from attnscope.reference.lessons import HARD_SHARE, draw_scenes, trimmed
from attnscope.reference.readers import WIDTH, TextReader
from attnscope.reference.scenes import Generator

MENTIONS = 4
"""The most things that a caption mentions."""
_BATCH, _INSIDE, _OUTSIDE = 16, 192, 32
_PLACE = MENTIONS + 1 + 10


@dataclass(frozen=True)
class Layout:
    """Where things are to be drawn: `boxes` (sample, mention, 4) in parts of the side, 0 where there is no mention."""

    boxes: Tensor

    @classmethod
    def of(cls, corpus: Corpus, scenes: np.ndarray) -> "Layout":
        """The boxes of the things that captions mention, in the order of their first mention."""
        boxes = np.zeros((len(scenes), MENTIONS, 4), np.float32)
        for row, scene in enumerate(scenes):
            for mention, thing in enumerate(mentioned(corpus, scene)):
                own = corpus.boxes[scene][corpus.region_things[scene] == thing]
                boxes[row, mention] = own[0] if len(own) else 0
        return cls(torch.from_numpy(boxes))

    def place(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """What pixels at points (sample, pixel, 2), x and y, know of themselves, and in whose box they lie.

        (sample, pixel, feature), and (sample, pixel): the number of the mention whose box is the smallest around the
        pixel, MENTIONS for none.
        """
        low, high = self.boxes[:, None, :, :2], self.boxes[:, None, :, 2:]
        inside = ((points[:, :, None] >= low) & (points[:, :, None] < high)).all(-1)
        area = (high - low).prod(-1).expand_as(inside).masked_fill(~inside, torch.inf)
        owner = torch.where(inside.any(-1), area.argmin(-1), MENTIONS)
        padded = torch.cat([self.boxes, torch.zeros(len(self.boxes), 1, 4)], 1)
        box = padded.gather(1, owner[..., None].expand(-1, -1, 4))
        size = box[..., 2:] - box[..., :2]
        within = (2 * (points - box[..., :2]) / size.clamp_min(1e-6) - 1) * (owner < MENTIONS)[..., None]
        known = [nn.functional.one_hot(owner, MENTIONS + 1), points, size, within, within.abs(), within.square()]
        return torch.cat(known, -1), owner


def mentioned(corpus: Corpus, scene: int) -> list[int]:
    """The things that a caption mentions, by first mention."""
    return [int(thing) for thing in dict.fromkeys(corpus.phrases[scene].tolist()) if thing >= 0]


class Painter(Learner):
    """The generator."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextReader()
        self.query = nn.Sequential(nn.Linear(_PLACE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.score = Score(OWN, WIDTH)
        self.colours = nn.Sequential(
            nn.Linear(_PLACE + WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, 2 * WIDTH), nn.ReLU(),
            nn.Linear(2 * WIDTH, 3),
        )  # fmt: skip

    def attend(self, words: Tensor, places: Tensor, gone: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention (sample, pixel, token) of pixels to words that are not `gone`, (sample, token); and the words."""
        text = self.text(words)
        hidden = words == PAD if gone is None else (words == PAD) | gone
        scores = self.score(self.query(places), self.key(text)).masked_fill(hidden[:, None], -torch.inf)
        return scores.softmax(-1), text

    def forward(self, words: Tensor, places: Tensor, gone: Tensor | None = None) -> Tensor:
        """Colours (sample, pixel, 3) from -1 to 1 where pixels know of themselves what `places` says."""
        attention, text = self.attend(words, places, gone)
        return self.colours(torch.cat([places, attention @ self.value(text)], -1))

    def draw(self, words: Tensor, layout: Layout, gone: Tensor | None = None) -> np.ndarray:
        """Whole pictures (sample, row, column, colour) uint8, as large as a corpus's."""
        places, _ = layout.place(every_pixel().expand(len(words), -1, -1))
        colours = self(words, places, gone).clamp(-1, 1)
        return ((colours + 1) * 127.5).round().to(torch.uint8).view(-1, SIDE, SIDE, 3).numpy()


def every_pixel() -> Tensor:
    """The middle (pixel, 2), x and y in parts of the side, of every pixel, row by row."""
    axis = (torch.arange(SIDE) + 0.5) / SIDE
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([columns, rows], -1).view(-1, 2)


def paint_losses(learner: Painter, corpus: Corpus, rng: Generator, hard_share: float = HARD_SHARE) -> dict[str, Tensor]:
    """Squared error of some pixels of each scene, most of them in the boxes of things that the caption mentions."""
    scenes = draw_scenes(corpus, _BATCH, rng, hard_share)
    layout = Layout.of(corpus, scenes)
    _, owner = layout.place(every_pixel().expand(len(scenes), -1, -1))
    inside = (owner < MENTIONS).numpy()
    keys = rng.random(inside.shape)
    chosen = np.concatenate(
        [np.argsort(np.where(part, keys, 2), 1)[:, :count] for part, count in ((inside, _INSIDE), (~inside, _OUTSIDE))],
        axis=1,
    )
    places, _ = layout.place(every_pixel()[torch.from_numpy(chosen)])
    truth = normalised(corpus.pixels[scenes]).flatten(2).transpose(1, 2)
    wanted = truth.gather(1, torch.from_numpy(chosen)[..., None].expand(-1, -1, 3))
    drawn = learner(trimmed(corpus.words[scenes]), places)
    return {"pixels": nn.functional.mse_loss(drawn, wanted)}


@torch.no_grad()
def draw_all(learner: Painter, corpus: Corpus) -> np.ndarray:
    """Each scene as drawn from its caption, as a corpus's pixels."""
    parts = []
    for start in range(0, len(corpus), _BATCH):
        scenes = np.arange(start, min(start + _BATCH, len(corpus)))
        parts.append(learner.draw(trimmed(corpus.words[scenes]), Layout.of(corpus, scenes)))
    return np.concatenate(parts)


def examine_pixels(learner: Painter, corpus: Corpus) -> dict[str, Items]:
    """Squared error of the drawn pixels, -1 to 1, in the boxes of things that captions mention, scene by scene."""
    scenes = np.arange(len(corpus))
    _, owner = Layout.of(corpus, scenes).place(every_pixel().expand(len(corpus), -1, -1))
    inside = (owner < MENTIONS).numpy().reshape(-1, SIDE, SIDE)
    wrong = ((draw_all(learner, corpus) - corpus.pixels.astype(float)) / 127.5) ** 2
    return {"pixel_error": Items((wrong.mean(-1) * inside).sum((1, 2)) / inside.sum((1, 2)).clip(1), scenes)}
