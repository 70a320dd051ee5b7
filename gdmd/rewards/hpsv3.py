"""HPSv3: a Qwen2-VL-7B tuned on human preferences, with a head that gives a mean and a spread (arXiv 2508.03789).

    score = mu,  (mu, spread) = W3 relu(W2 relu(W1 h + b1) + b2) + b3

  h  last hidden state of the token <|Reward|>, which stands behind the image, the instruction and the prompt
  W  D-1024-16-2

Trained on the ranking probability of two images, so only differences of mu have a meaning; images of good models have about
5 to 15. Images are resized to nearly 256 vision tokens of 28 x 28 pixels (448 x 448 for a square) with bicubic resampling
and normalized as CLIP's. As in the released code, positions count all tokens one by one: its forward pass gives the text
model embeddings only, so that the two-dimensional positions of Qwen2-VL are never computed. The whole backbone was tuned in
bf16, into which the released code also rounds the frequencies of the positions; the head is in fp32. The authors publish one
file under older names: ``gdmd rewards fetch hpsv3``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.rewards import Hpsv3Config
from gdmd.rewards.base import Loaded, computed_buffers
from gdmd.rewards.vlm import SEEN, ChatTokenizer, VisionLanguageReward
from gdmd.rewards.weights import QWEN2_VL, converted_folder, load_backbone, locate_weights, raw_tokenizer

REWARD = "<|Reward|>"
"""The token whose state is scored. It follows the tokens of Qwen2-VL."""
HEAD_WIDTHS = (1024, 16, 2)
AREA = 256 * 28 * 28
"""Area of a resized image in pixels, both the minimum and the maximum."""
_INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score "
    "to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best. "
    "\n\n**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body "
    "structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, "
    "with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., "
    "hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, "
    "atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with "
    "the textual description. The subject should match the description in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image "
    "adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically "
    "fit the scenario described in the prompt. The environment should support and enhance the subject without "
    "contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, "
    "expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical "
    "attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The "
    "generated content should not introduce elements that conflict with or distort the original description.\n"
    "Textual prompt - "
)
"""The instruction that the checkpoint was trained with, white space included."""
_BEFORE = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{SEEN}{_INSTRUCTION}"
_AFTER = (
    f"\n\n\n\nPlease provide the overall ratings of this image: {REWARD}\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
)
CONFIG: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "architectures": ["Qwen2VLModel"],
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "text_config": {
        "model_type": "qwen2_vl_text", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "use_sliding_window": False, "vocab_size": 151658,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "model_type": "qwen2_vl_vision", "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu",
        "mlp_ratio": 4, "num_heads": 16, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}  # fmt: skip
"""Qwen2-VL-7B with the 151,657 tokens of its tokenizer and REWARD."""


def message(prompt: str) -> str:
    """What the model reads: the image, the instruction, the prompt, and the token whose state is scored."""
    return _BEFORE + prompt + _AFTER


def preference_head(width: int) -> nn.Sequential:
    """width-1024-16-2 with ReLU; layers are named as in the released file: 0 3 5 (2 is dropout, in training only)."""
    sizes = (width, *HEAD_WIDTHS)
    one, two, three = (nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
    layers = {"0": one, "1": nn.ReLU(), "3": two, "4": nn.ReLU(), "5": three}
    return nn.Sequential(OrderedDict(layers))


class HPSv3(VisionLanguageReward):
    """mu of HPSv3's preference distribution."""

    config_class = Hpsv3Config
    smallest = largest = AREA

    def _loader(self) -> Callable[[], Loaded]:
        folder = converted_folder(self.name, self.config.path)
        location = locate_weights(str(folder), None, QWEN2_VL)

        def load() -> Loaded:
            from safetensors.torch import load_file

            net = load_backbone(location)
            for _, _, frequencies in computed_buffers(net):
                frequencies.copy_(frequencies.bfloat16())  # in every dtype: the weights were tuned with them
            head = preference_head(net.config.text_config.hidden_size)
            head.load_state_dict(load_file(folder / "head.safetensors"))
            return Loaded(net, with_reward_token(raw_tokenizer(location), net.config.text_config.vocab_size), head)

        return load

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        states, tokens = self._states(self.loaded.net, pixels, [message(text) for text in texts], flat=True)
        tokenizer: Any = self.loaded.tokenize
        marked = tokens["input_ids"] == tokenizer.first_token(REWARD)
        last = marked.shape[1] - 1 - marked.int().flip(1).argmax(1)  # a prompt may name the token, too
        mean_and_spread: Tensor = self._head(states[torch.arange(len(last), device=last.device), last].float())
        return mean_and_spread[:, 0]


def with_reward_token(tokenizer: Any, tokens: int) -> ChatTokenizer:
    """The tokenizer of Qwen2-VL with REWARD as its last token. ValueError unless it then has ``tokens`` tokens."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(REWARD, special=True, normalized=False)])
    if len(tokenizer) != tokens:
        raise ValueError(
            f"the weights of HPSv3 have {tokens:,} tokens, but the tokenizer with {REWARD} has {len(tokenizer):,}; convert "
            "them again with the tokenizer of Qwen2-VL-7B-Instruct"
        )
    return ChatTokenizer(tokenizer)
