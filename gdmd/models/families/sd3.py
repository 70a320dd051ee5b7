"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): rectified flow, shifted times, two CLIPs and an optional T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.schedule import from_velocity
from gdmd.models.families.base import PipelineText, network_dtype
from gdmd.models.families.flow import FlowFamily
from gdmd.models.vae import VaeCodec
from gdmd.types import Cond, Prediction

LONGEST = 256
"""Tokens of T5, unless model.max_tokens says otherwise."""


class Sd3(FlowFamily):
    """The network reads t_1000 = 1000 t and predicts eps - x0."""

    name = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    needs = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    optional = ("text_encoder_3", "tokenizer_3")
    targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),  # of SD3.5-Medium
        *("norm1.linear", "norm1_context.linear"),  # modulation (docs/LOG.md, entry 34)
    )
    patch = 2
    caption_limit = 512
    max_shift = 1.16
    blocks = ("JointTransformerBlock",)

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        self.codec = VaeCodec(pipe.vae, cfg.decode_chunk, tiled=cfg.decode_tiled)
        self.encoder = Sd3Text(pipe, cfg)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        dtype = network_dtype(net)
        return net(
            hidden_states=x_t.to(dtype),
            timestep=1000 * self.network_time(t),
            encoder_hidden_states=cond["embeds"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]

    def prediction(self, output: Any, x_t: Tensor, t: Tensor) -> Prediction:
        return from_velocity(output, x_t, t, self.schedule)

    def blank_text(self, count: int) -> Cond:
        config = self.pipe.transformer.config
        tokens = 77 + (self.cfg.max_tokens or LONGEST)
        pooled = self._blank(count, config.pooled_projection_dim)
        return {"embeds": self._blank(count, tokens, config.joint_attention_dim), "pooled": pooled}

    def teacher_times(self, steps: int) -> Tensor:
        return self.evenly_to_the_last(steps)

    @classmethod
    def most_tokens(cls, net: Any) -> tuple[int, int]:
        return (int(net.config.pos_embed_max_size),) * 2


class Sd3Text(PipelineText):
    """embeds [B, 77 + T, D]: both CLIPs concatenated, then T5 (zeros without one); pooled [B, P]."""

    def embed(self, texts: Sequence[str]) -> Cond:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.cfg.max_tokens or LONGEST,
        )
        return {"embeds": embeds, "pooled": pooled}
