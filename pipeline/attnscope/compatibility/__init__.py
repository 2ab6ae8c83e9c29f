"""Tiny models of many families, and what recording and extraction give of each.

`python -m attnscope.compatibility` measures all of them in the environment that it runs in.
"""

from attnscope.compatibility import (
    further_models,
    joint_models,
    prompted_models,
    text_models,
    unusual_models,
    vision_models,
)
from attnscope.compatibility.examples import Example

EXAMPLES: dict[str, Example] = {
    **text_models.EXAMPLES,
    **vision_models.EXAMPLES,
    **joint_models.EXAMPLES,
    **prompted_models.EXAMPLES,
    **unusual_models.EXAMPLES,
    **further_models.EXAMPLES,
}
