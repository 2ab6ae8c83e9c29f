"""BERT and its kin: one text stream read in both directions."""

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import text_tokens

FAMILY = ModelFamily(
    name="bert",
    model_types=(
        "bert",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "camembert",
        "data2vec-text",
        "distilbert",
        "electra",
        "ernie",
        "megatron-bert",
        "mpnet",
        "rembert",
        "roformer",
        "ibert",
        "xmod",
        "splinter",
        "modernbert",
        "deberta",
        "deberta-v2",
        "esm",
    ),
    sites=(SiteRule(r"(^|\.)layers?\.(?P<layer>\d+)\.(attention|attn)", "text.self"),),
    streams={"text": text_tokens()},
)

# ALBERT runs one layer again and again; which run it is, is the number of the layer.
ALBERT = ModelFamily(
    name="albert",
    model_types=("albert",),
    sites=tuple(SiteRule(r"albert_layers\.0\.attention", "text.self", first_layer=i, call=i) for i in range(64)),
    streams={"text": text_tokens()},
)
