"""Small settings in which alignment scores are compared, beside the models that attnscope carries.

Each is one module: matching by regions (`scan`), answers (`answering`), pictures from captions (`painter`). They have
no class in transformers; their folders hold safetensors and a config.json that names them.
"""

from transformers import PreTrainedConfig

from attnscope.reference.alignments import CONFIG_KEY
from attnscope.reference.answering import Answering
from attnscope.reference.learners import Learner
from attnscope.reference.painter import Painter
from attnscope.reference.scan import Scan

SETTINGS: dict[str, type[Learner]] = {"scan": Scan, "answering": Answering, "painter": Painter}
SCORED = ("vilt", "lxmert", *SETTINGS)
"""Models whose attention can have another score."""


def setting_config(name: str) -> PreTrainedConfig:
    """The config of a setting: no more than what it is."""
    kind = type(f"{name.capitalize()}Config", (PreTrainedConfig,), {"model_type": name})
    return kind(architectures=[SETTINGS[name].__name__])


def scored_config(config: PreTrainedConfig, alignment: str) -> PreTrainedConfig:
    """The config with the score of its attention, where that is another than its own."""
    if alignment:
        setattr(config, CONFIG_KEY, alignment)
    return config
