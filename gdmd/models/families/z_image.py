"""Z-Image (arXiv 2511.22699): a single-stream flow transformer on unpadded captions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.schedule import from_velocity
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.flow import FlowFamily
from gdmd.models.features import capture_features
from gdmd.models.tokens import TEMPLATES, chat_reader
from gdmd.models.vae import VaeCodec
from gdmd.types import Cond, Prediction

LONGEST = 512
"""Caption tokens, unless model.max_tokens says otherwise."""


class ZImage(FlowFamily):
    """The network reads 1 - t and predicts x0 - eps, the negative velocity."""

    name = "z_image"
    pipeline = "ZImagePipeline"
    needs = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    targets = (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
    patch = 2
    blocks = ("ZImageTransformerBlock",)

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.codec = VaeCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        self.encoder = ZImageText(pipe, cfg)
        longest, places = cfg.max_tokens or LONGEST, int(pipe.transformer.config.axes_lens[0])
        if -(-longest // 32) * 32 + 2 > places:
            raise ValueError(
                f"model.max_tokens = {longest}: the transformer has positions for {(places - 2) // 32 * 32} caption "
                "tokens; lower it"
            )

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        captions = [row[:count] for row, count in zip(cond["embeds"].to(dtype), cond["tokens"].tolist(), strict=True)]
        frames = list(x_t.to(dtype)[:, :, None].unbind(0))  # B x [C, 1, H, W]
        return net(frames, 1 - self.network_time(t), captions, return_dict=False)[0]

    def prediction(self, output: Any, x_t: Tensor, t: Tensor) -> Prediction:
        return from_velocity(-torch.stack(output)[:, :, 0], x_t, t, self.schedule)

    def feature_mode(self, net: Any) -> AbstractContextManager[None]:
        return capture_features(net, net.all_final_layer["2-1"])

    def image_tokens(self, hidden: Tensor, x_t: Tensor) -> Tensor:
        """The tokens are [image, padding to a multiple of 32, caption, padding of the batch]."""
        rows, columns = self.feature_grid(x_t)
        return hidden[:, : rows * columns]

    @property
    def feature_width(self) -> int:
        return int(self.pipe.transformer.config.dim)

    @classmethod
    def most_tokens(cls, net: Any) -> tuple[int, int]:
        _, rows, columns = net.config.axes_lens
        return int(rows), int(columns)

    def blank_text(self, count: int) -> Cond:
        longest = self.cfg.max_tokens or LONGEST
        embeds = self._blank(count, longest, self.pipe.transformer.config.cap_feat_dim)
        return {"embeds": embeds, "tokens": torch.full((count,), longest)}


class ZImageText(PipelineText):
    """embeds [B, T, D], zeros after the caption; tokens [B], the caption's length."""

    def embed(self, texts: Sequence[str]) -> Cond:
        longest = self.cfg.max_tokens or LONGEST
        rows, _ = self.pipe.encode_prompt(
            list(texts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=longest
        )
        embeds = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        return {"embeds": embeds, "tokens": torch.tensor([len(row) for row in rows], device=embeds.device)}


TEMPLATES[ZImage.pipeline] = partial(chat_reader, thinking=True)
