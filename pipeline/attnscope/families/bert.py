"""BERT and its kin: one text stream read in both directions."""

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import text_tokens

FAMILY = ModelFamily(
    name="bert",
    model_types=(
        "bert",
        "roberta",
        "xlm-roberta",
        "electra",
        "camembert",
        "distilbert",
        "mpnet",
        "ernie",
        "modernbert",
    ),
    sites=(SiteRule(r"layers?\.(?P<layer>\d+)\.(attention|attn)", "text.self"),),
    streams={"text": text_tokens()},
)
