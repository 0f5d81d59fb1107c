"""A GGUF by llama.cpp's own converter, which is not changed but for what it cannot know.

Run under a Python with torch and transformers: `gguf_convert.py CONVERTER BUNDLE FILE`, where
CONVERTER is the folder that holds `convert_hf_to_gguf.py`, `conversion` and `gguf-py`.

It tells pre-tokenizers apart by a hash of what a whole vocabulary makes of a text, so that it knows
none that was trained anew. `smollm` names the one that splits as Ingot's does: digits one by one,
then bytes by words. And it asks transformers whether text begins with a token, which in the bundle
is the post-processor's to say.
"""

import importlib
import sys
from pathlib import Path

PRE_TOKENIZER = "smollm"


def main(converter: Path, bundle: str, file: str) -> None:
    """Convert to float32, which holds all values of BF16 and of widened FP8 exactly."""
    sys.path[:0] = [str(converter / "gguf-py"), str(converter)]
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZER
    transformers = importlib.import_module("transformers")
    transformers.TokenizersBackend.add_bos_token = True
    sys.argv = ["convert_hf_to_gguf.py", bundle, "--outfile", file, "--outtype", "f32"]
    importlib.import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
