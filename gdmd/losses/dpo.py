"""Diffusion-DPO (arXiv 2311.12908, eq. 14): preferences as differences of denoising errors."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def dpo_loss(error_win: Tensor, error_lose: Tensor, ref_win: Tensor, ref_lose: Tensor, beta: float) -> Tensor:
    """-log s(-(beta / 2) [(error_win - ref_win) - (error_lose - ref_lose)]) per pair [B], s the sigmoid.

    Errors are denoising errors [B], mean over C, H, W, of the preferred and the other image of a pair at the same
    t and noise: error_* of the trained network (with gradient), ref_* of the reference (constants). The 1/2 is that
    of the authors' code, whose beta (2000 ... 5000) stands for the paper's beta T w(lambda).
    At the reference the loss is log 2. Gradient: (beta / 2) s(...) (d error_win - d error_lose).
    """
    margin = (error_win - ref_win.detach()) - (error_lose - ref_lose.detach())
    return softplus(0.5 * beta * margin)
