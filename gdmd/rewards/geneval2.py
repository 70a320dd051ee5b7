"""GenEval 2: does the image show every part of the prompt? Soft-TIFA with Qwen3-VL-8B (arXiv 2512.16853).

    score = (p_1 ... p_n)^(1/n)   geometric: a part that is missing makes it small (the paper's prompt-level score)
    score = (p_1 + ... + p_n)/n   arithmetic: the share of the parts (its atom-level score)

  p_i  probability of the right answer to question i: the softmax over the first token of the reply, summed over the first
       tokens of the answer's spellings: yes, Yes, with and without a space before it; for numbers up to ten also 7 for seven

Questions and answers come with the prompt, in the column ``vqa_list`` of the authors' geneval2_data.jsonl:

    {"prompt": "two stone raccoons", "vqa_list": [["How many raccoons are in the image?", "two"],
     ["Are the raccoons stone?", "Yes"], ["Are there any raccoons in the image?", "Yes"]], ...}

Their file is under CC BY-NC 4.0 and is not shipped here; any prompts with this column work. Differentiable, but each
question needs a pass of the model. A paper's "GenEval2 22.9" is 100 times the mean over its 800 prompts, an image each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gdmd.config.rewards import GenEval2Config
from gdmd.diffusion.device import to_device_async
from gdmd.rewards.base import Loaded
from gdmd.rewards.vlm import SEEN, ChatTokenizer, VisionLanguageReward
from gdmd.rewards.weights import QWEN3_VL, load_question_model, locate_weights, raw_tokenizer

QUESTIONS = "vqa_list"
"""The column with the questions."""
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
Questions = tuple[tuple[str, str], ...]
"""(question, right answer) of one prompt."""


class GenEval2(VisionLanguageReward):
    """Soft-TIFA in [0, 1]. Each prompt's ``meta`` has questions and answers in ``vqa_list``."""

    config_class = GenEval2Config
    smallest, largest = 256 * 256, 4096 * 4096
    mean = std = (0.5, 0.5, 0.5)

    def _loader(self) -> Callable[[], Loaded]:
        location = locate_weights(self.config.path, self.config.revision, QWEN3_VL)

        def load() -> Loaded:
            return Loaded(load_question_model(location), ChatTokenizer(raw_tokenizer(location)))

        return load

    def _asked(self, texts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> Sequence[Questions]:
        return [read_questions(text, row) for text, row in zip(texts, meta or [{}] * len(texts), strict=True)]

    def _formula(self, pixels: Tensor, texts: Sequence[Questions]) -> Tensor:
        net: Any = self.loaded.net
        pairs = [pair for own in texts for pair in own]
        image_of = torch.tensor([k for k, own in enumerate(texts) for _ in own])
        seen = pixels[to_device_async(image_of, pixels.device)]
        states, tokens = self._states(net.model, seen, [message(question) for question, _ in pairs])
        last = tokens["attention_mask"].sum(1) - 1
        replies = net.lm_head(states[torch.arange(len(last), device=last.device), last]).float().log_softmax(-1)
        right = [self._first_tokens(answer) for _, answer in pairs]
        answers = torch.stack([reply[ids].logsumexp(0) for reply, ids in zip(replies, right, strict=True)])
        logs = torch.split(answers, [len(own) for own in texts])
        if self.config.mean == "geometric":
            return torch.stack([own.mean() for own in logs]).exp()
        return torch.stack([own.exp().mean() for own in logs])

    def _first_tokens(self, answer: str) -> list[int]:
        tokenizer: Any = self.loaded.tokenize
        return sorted({tokenizer.first_token(one) for one in spellings(answer)})


def message(question: str) -> str:
    """What the model reads for one question."""
    return f"<|im_start|>user\n{SEEN}{question} Answer in one word.<|im_end|>\n<|im_start|>assistant\n"


def spellings(answer: str) -> tuple[str, ...]:
    """How a reply may begin that gives this answer."""
    word = answer.lower()
    digits = (str(NUMBERS.index(word) + 1),) if word in NUMBERS else ()
    return tuple(space + one for one in (word, word.capitalize(), *digits) for space in ("", " "))


def read_questions(prompt: str, row: Mapping[str, Any]) -> Questions:
    """The questions of a prompt. ValueError that names a prompt without any."""
    given = row.get(QUESTIONS)
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(
            f"geneval2 needs questions with every prompt, but {prompt[:60]!r} has no list {QUESTIONS!r}; give a jsonl file "
            "like geneval2_data.jsonl of GenEval 2"
        )
    for pair in given:
        if not (
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(p, str) and p.strip() for p in pair)
        ):
            raise ValueError(
                f"geneval2: {QUESTIONS} of {prompt[:60]!r} has {pair!r}; write [question, answer] with an answer of one word"
            )
    return tuple((question, answer.strip()) for question, answer in given)
