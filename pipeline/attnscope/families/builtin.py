"""The families that attnscope brings, registered as an outsider's are."""

from collections.abc import Callable

from attnscope.families import ModelFamily
from attnscope.families.bert import FAMILY as BERT
from attnscope.families.clip import FAMILY as CLIP
from attnscope.families.vit import FAMILY as VIT
from attnscope.plugins import hookimpl


@hookimpl
def attnscope_register_families(register: Callable[[ModelFamily], None]) -> None:
    for family in (VIT, BERT, CLIP):
        register(family)
