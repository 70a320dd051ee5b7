"""ImageReward v1: a BLIP-large image tower, and a BERT that cross-attends to it (arXiv 2304.05977).

    score = (MLP(h_[CLS]) - 0.16717362830052426) / 1.0333394966054072

The constants are mean and std of the raw score on the authors' validation set. The MLP 768-1024-128-64-16-1 has dropout
in training and no activations. Prompts are padded and truncated to 35 word pieces; the text tower attends in both
directions. The authors publish a .pt file: ``gdmd rewards fetch imagereward``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.rewards import ImageRewardConfig
from gdmd.rewards.aesthetic import linear_head
from gdmd.rewards.base import Loaded, PretrainedReward
from gdmd.rewards.weights import BERT, converted_folder, load_tokenizer, locate_weights

MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
"""ViT-L/16; the epsilon is timm's, not the 1e-5 of transformers."""
TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "pad_token_id": 0, "is_decoder": True,
}  # fmt: skip
"""BERT-base; ``is_decoder`` creates the cross-attention weights, and the forward pass is called without it."""


class ImageRewardTowers(nn.Module):
    """The vision tower and the text tower that attends to it."""

    def __init__(self, vision: Mapping[str, Any] = VISION, text: Mapping[str, Any] = TEXT) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """pixels [b, 3, 224, 224], tokens [b, 35] -> hidden state of [CLS], [b, D]."""
        patches = self.vision(pixel_values=pixels).last_hidden_state  # [b, N, D]
        states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            is_decoder=False,
        ).last_hidden_state
        cls: Tensor = states[:, 0]
        return cls


class ImageReward(PretrainedReward):
    """The standardized score."""

    config_class = ImageRewardConfig

    def _loader(self) -> Callable[[], Loaded]:
        folder = converted_folder(self.name, self.config.path)
        location = locate_weights(str(folder), None, BERT)

        def load() -> Loaded:
            from safetensors.torch import load_file

            config = json.loads((folder / "towers.json").read_text(encoding="utf-8"))
            towers = ImageRewardTowers(config["vision"], config["text"])
            head = linear_head(config["text"]["hidden_size"])
            tensors = load_file(folder / "model.safetensors")
            head.load_state_dict({key[4:]: tensors.pop(key) for key in list(tensors) if key.startswith("mlp.")})
            towers.load_state_dict(tensors)
            return Loaded(towers, load_tokenizer(location, TOKENS), head)

        return load

    @staticmethod
    def _image_size(net: Any) -> int:
        return int(net.vision.config.image_size)

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        cls: Tensor = self.loaded.net(pixels.to(self.placement.dtype), **self._tokens(texts))
        raw: Tensor = self._head(cls.float())[:, 0]
        return (raw - MEAN) / STD
