"""The cleaning that the original rewards apply to a text before their tokenizer."""

from __future__ import annotations

import html


def open_clip_clean(text: str) -> str:
    """As open_clip's SimpleTokenizer, which HPS was trained and is published with.

    Broken encodings are mended (ftfy), HTML entities resolved twice, white space joined, letters made lower case.
    ValueError where ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ValueError("the HPS rewards need ftfy: install it with pip install ftfy") from error

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
