"""The non-saturating GAN of DMD2 (arXiv 2405.14867, section 4.3; arXiv 1406.2661), on logits of one head."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(logit_real: Tensor, logit_student: Tensor) -> Tensor:
    """softplus(-D(real)) + softplus(D(student)) per sample [B]; logits [B], of re-noised latents.

    Equal to -log s(D(real)) - log(1 - s(D(student))), s the sigmoid. Gradient: -s(-D) on real, s(D) on student.
    """
    return softplus(-logit_real) + softplus(logit_student)


def generator_loss(logit_student: Tensor) -> Tensor:
    """softplus(-D(student)) = -log s(D(student)) per sample [B].

    Gradient: -s(-D), which does not vanish where the head is certain that an image is the student's.
    """
    return softplus(-logit_student)
