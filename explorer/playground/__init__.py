"""The demo model and its router as one HTML file that runs in a browser, without a server.

``engine.js`` is the model and its tokenizer, ``rows.c`` its inner loop (built into ``rows.wasm``),
``page.js`` what is seen. The weights are the shipped file as it is, compressed without loss.
"""

import base64
import gzip
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from capture.demo import WEIGHTS
from explorer.errors import ExplorerError

ADDRESS = "/playground.html"  # where the app serves it
_HERE = Path(__file__).parent
# what engine.js does with a text before it merges bytes, and the numbers that its model knows
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXPECTED = {
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
}
_CLASSES = {"letter": r"\p{L}+", "number": r"\p{N}+", "space": r"\s+"}
_SURROGATES = range(0xD800, 0xE000)


@cache
def document() -> bytes:
    """Return the page, about 13 MB of HTML in UTF-8.

    Its own policy lets the browser run the script that is named by its digest and nothing else,
    load nothing, and send nothing.

    Raises
    ------
    ExplorerError
        If the shipped model is not of the kind that ``engine.js`` computes.
    """
    config = json.loads((WEIGHTS / "config.json").read_text(encoding="utf-8"))
    wrong = [name for name, value in _EXPECTED.items() if config.get(name) != value]
    if wrong or config["num_attention_heads"] != config["num_key_value_heads"]:
        raise ExplorerError(
            f"The playground computes OLMoE as the demo model is set up, and {WEIGHTS} differs in "
            f"{', '.join(wrong) or 'num_key_value_heads'}. Restore it from version control."
        )
    script = "\n".join(_text(name) for name in ("engine.js", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        # a script element of data is not run, but would end at the first "</script"
        "SETTINGS": json.dumps(
            {"config": config, "tokenizer": _tokenizer()}, separators=(",", ":")
        ).replace("<", "\\u003c"),
        "WASM": base64.b64encode((_HERE / "rows.wasm").read_bytes()).decode(),
        "WEIGHTS": base64.b64encode(
            gzip.compress((WEIGHTS / "model.safetensors").read_bytes(), 6, mtime=0)
        ).decode(),
        "STYLE": _text("page.css"),
        "SCRIPT": script,
        "DIGEST": digest,
    }
    page = _text("page.html")
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page.encode()


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _tokenizer() -> dict[str, Any]:
    """Return what the page's tokenizer needs of the shipped one."""
    given = json.loads((WEIGHTS / "tokenizer.json").read_text(encoding="utf-8"))
    words = given["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    if words != _WORDS or given["normalizer"] is not None or given["model"]["type"] != "BPE":
        raise ExplorerError(
            "The playground's tokenizer is byte-level BPE with one way to cut words, and the "
            f"shipped one differs. Restore {WEIGHTS / 'tokenizer.json'} from version control."
        )
    ids = given["model"]["vocab"]
    return {
        "vocabulary": sorted(ids, key=ids.__getitem__),
        "merges": given["model"]["merges"],
        "special": [(token["content"], token["id"]) for token in given["added_tokens"]],
        "classes": _classes(),
    }


def _classes() -> dict[str, str]:
    """Return letters, numbers and spaces as ranges of a regular expression, as they are known here.

    The tokenizer's own library is asked: it follows a version of Unicode, a browser another one.
    """
    every = "".join(chr(code) for code in range(0x110000) if code not in _SURROGATES)
    found = {}
    for name, pattern in _CLASSES.items():
        runs = Split(Regex(pattern), "removed", invert=True).pre_tokenize_str(every)
        found[name] = "".join(f"\\u{{{ord(run[0]):x}}}-\\u{{{ord(run[-1]):x}}}" for run, _ in runs)
    return found
