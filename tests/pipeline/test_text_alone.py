"""Models of images and texts that are given a text alone."""

import numpy as np
import pytest

from attnscope.compatibility import EXAMPLES
from attnscope.compatibility.examples import text
from attnscope.compatibility.witness import matched_errors, own_softmaxes
from attnscope.extraction import extract
from attnscope.quantities import ExtractSpec
from attnscope.recording import recording
from attnscope.tokens import KIND_CODES

NAMES = ("llava", "llava_next", "qwen3_vl", "paligemma", "gemma3", "idefics3", "smolvlm", "git", "visual_bert")


@pytest.mark.parametrize("name", NAMES)
def test_a_text_without_an_image_is_a_text(name: str) -> None:
    model, inputs = EXAMPLES[name].build("eager"), text()
    with recording(model) as recorded:
        model(**inputs)
    assert max(matched_errors(recorded.calls, own_softmaxes(model, inputs))) <= 2e-6
    run = extract(model, [inputs], spec=ExtractSpec(encoding="exact"), batch_size=2)
    assert run.sites == ("joint.self",)
    kind = run.tokens("joint").kind.values
    np.testing.assert_array_equal(kind == KIND_CODES["padding"], inputs["attention_mask"].numpy() == 0)
    assert not (kind == KIND_CODES["image"]).any()
    stored = run.attention("joint.self").values
    for layer, call in enumerate(recorded):
        own = call.attention().detach().numpy()
        hidden = np.isnan(stored[:, layer])
        np.testing.assert_allclose(stored[:, layer][~hidden], own[~hidden], atol=1e-6)
