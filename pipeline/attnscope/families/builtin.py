"""The families that attnscope brings, registered as an outsider's are."""

from collections.abc import Callable

from attnscope.families import (
    ModelFamily,
    bert,
    clip,
    decoder,
    detr,
    encoder_decoder,
    florence2,
    siglip,
    swin,
    vit,
    whisper,
    yolos,
)
from attnscope.plugins import hookimpl

FAMILIES = (
    vit.FAMILY,
    yolos.FAMILY,
    swin.FAMILY,
    detr.FAMILY,
    bert.FAMILY,
    bert.ALBERT,
    decoder.FAMILY,
    encoder_decoder.BART,
    encoder_decoder.T5,
    whisper.FAMILY,
    clip.CLIP,
    clip.CLIP_VISION,
    clip.CLIP_TEXT,
    siglip.FAMILY,
    florence2.FAMILY,
)


@hookimpl
def attnscope_register_families(register: Callable[[ModelFamily], None]) -> None:
    for family in FAMILIES:
        register(family)
