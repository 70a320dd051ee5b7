"""Text cleaning that the original code of a reward applies before its tokenizer."""

from __future__ import annotations

import html


def open_clip_clean(text: str) -> str:
    """Clean a text as open_clip's SimpleTokenizer does, with which HPS was trained and published.

    Fix broken encodings (ftfy), unescape HTML twice, collapse white space, lowercase. ValueError without ftfy.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ValueError("the HPS rewards need ftfy: install it with pip install ftfy") from error

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
