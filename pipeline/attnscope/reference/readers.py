"""What the small settings read with: words by a recurrent network both ways, regions by what their boxes show."""

import numpy as np
import torch
from torch import Tensor, nn

from attnscope.reference.corpus import PAD, REGION_SIDE, VOCABULARY, Corpus
from attnscope.reference.learners import Seen, normalised

WIDTH = 64


class TextReader(nn.Module):
    """A vector for each word: the mean of two gated recurrent networks, one from either end, as in SCAN."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), WIDTH, padding_idx=PAD)
        self.sequence = nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor) -> Tensor:
        """(text, token) to (text, token, channel); what stands at padding has no meaning."""
        lengths = (words != PAD).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.sequence(packed)[0], True, total_length=words.shape[1])
        return (states[..., :WIDTH] + states[..., WIDTH:]) / 2


class RegionReader(nn.Module):
    """A vector for each region, from its pixels and its box."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * REGION_SIDE**2 + 4, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, seen: Seen) -> Tensor:
        """(sample, region, channel)."""
        assert seen.boxes is not None
        return self.layers(torch.cat([seen.pixels, seen.boxes], -1))


def see_regions(corpus: Corpus, scenes: np.ndarray) -> Seen:
    """What the boxes of scenes show, (sample, region, pixel), and the boxes."""
    return Seen(normalised(corpus.crops[scenes]).flatten(2), torch.from_numpy(corpus.boxes[scenes]))
