"""A generated world of coloured shapes whose truth is known, and tiny models trained on it that attnscope carries."""

from attnscope.reference.captions import ANSWERS, Caption, Question, ask, contradict, describe, vocabulary
from attnscope.reference.carrying import card, path
from attnscope.reference.pictures import draw_picture
from attnscope.reference.sampling import caption_sample, masked_samples, question_samples, read_reference
from attnscope.reference.scenes import COLOURS, SHAPES, SPLITS, Scene, Thing, draw_scene

__all__ = [
    "ANSWERS",
    "COLOURS",
    "SHAPES",
    "SPLITS",
    "Caption",
    "Question",
    "Scene",
    "Thing",
    "ask",
    "caption_sample",
    "card",
    "contradict",
    "describe",
    "draw_picture",
    "draw_scene",
    "masked_samples",
    "path",
    "question_samples",
    "read_reference",
    "vocabulary",
]
