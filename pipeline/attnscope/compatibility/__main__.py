"""`python -m attnscope.compatibility [FILE]`: measure every example, and write the page or print it."""

import sys
import warnings
from pathlib import Path

import transformers

from attnscope.compatibility.matrix import measured, page

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    text = page(list(measured()))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
