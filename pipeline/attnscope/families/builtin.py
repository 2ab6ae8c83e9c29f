"""The families that attnscope brings, registered as an outsider's are."""

from collections.abc import Callable

from attnscope.families import (
    ModelFamily,
    bert,
    blip,
    blip_2,
    bridgetower,
    clip,
    decoder,
    detr,
    encoder_decoder,
    flava,
    florence2,
    gemma3,
    git,
    idefics3,
    internvl,
    kosmos_2,
    llava,
    llava_next,
    lxmert,
    mapper,
    mllama,
    qwen_vl,
    siglip,
    swin,
    vilt,
    visual_bert,
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
    siglip.SIGLIP,
    siglip.SIGLIP_VISION,
    siglip.SIGLIP_TEXT,
    florence2.FAMILY,
    vilt.FAMILY,
    visual_bert.FAMILY,
    lxmert.FAMILY,
    flava.FAMILY,
    bridgetower.FAMILY,
    blip.FAMILY,
    blip_2.FAMILY,
    git.FAMILY,
    kosmos_2.FAMILY,
    llava.FAMILY,
    llava_next.FAMILY,
    qwen_vl.FAMILY,
    gemma3.FAMILY,
    idefics3.FAMILY,
    internvl.FAMILY,
    mllama.FAMILY,
    mapper.FAMILY,
)


@hookimpl
def attnscope_register_families(register: Callable[[ModelFamily], None]) -> None:
    for family in FAMILIES:
        register(family)


def markdown_table() -> str:
    """The families with their model types, sites and streams, as docs/families.md shows them."""
    rows = ["| family | model types | sites | streams |", "|---|---|---|---|"]
    for family in FAMILIES:
        sites = dict.fromkeys(rule.site for rule in family.sites)
        cells = (family.name, *(", ".join(f"`{x}`" for x in c) for c in (family.model_types, sites, family.streams)))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"
