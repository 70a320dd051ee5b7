"""The trainable side of one role, and how an update is applied to it: micro-batches, finite check, clip, AdamW, EMA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.config.training import LoopConfig
from gdmd.diffusion.batches import batch_size, split
from gdmd.diffusion.device import confirmed
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext
from gdmd.training.ema import Ema, load_named
from gdmd.training.optimizer import RoleOptimizer
from gdmd.types import Loss, Role, Roles, Update


class NonFiniteError(ValueError):
    """A loss or gradient that is not finite. ``positions``: of the bad samples in the update's global batch."""

    def __init__(self, message: str, role: Role, positions: Sequence[int]) -> None:
        super().__init__(message)
        self.role, self.positions = role, tuple(positions)


@dataclass
class RoleState:
    """The trainable side of a role. ``updates`` counts optimizer steps, ``skipped`` the non-finite ones it left out."""

    role: Role
    parameters: Mapping[str, Parameter]
    optimizer: RoleOptimizer
    ema: Ema | None = None
    micro_batch: int = 0
    skip_nonfinite: bool = False
    context: DistributedContext = SINGLE_PROCESS
    updates: int = 0
    skipped: int = 0

    def apply(self, update: Update, factor: float = 1.0) -> dict[str, Tensor]:
        """One optimizer step on mean_B loss.per_sample, whatever the micro-batch; returns statistics [b] or 0-d.

        factor: of the learning rate. The gradient of every micro-batch is that of sum(per_sample) / b, so 8
        micro-batches add up to one batch, and the mean over ranks of equal b is the gradient of the global batch. All
        ranks check that losses and gradient are finite *before* the optimizer step, so that bad numbers never reach
        weights or optimizer state: one host synchronization per update.
        """
        self.optimizer.zero_grad()
        count = batch_size(update.batch)
        parts = list(split(update.batch, self.micro_batch or count))
        losses = []
        for number, part in enumerate(parts, 1):
            self.context.set_gradient_sync(sync=number == len(parts))
            losses.append(self._backward(update, part, count))
        self.optimizer.average_gradients()
        local = torch.cat([loss.per_sample.detach() for loss in losses])  # [b]
        per_sample = self.context.all_gather(local)  # [B]
        norm = self.optimizer.grad_norm()
        stats = {f"loss/{self.role}": local, f"grad_norm/{self.role}": norm}
        stats |= {key: torch.cat([_flat(loss.stats[key]) for loss in losses]) for key in losses[0].stats}
        if not confirmed(per_sample.isfinite().all() & norm.isfinite()):
            self._reject(per_sample, norm)
            return {}
        self.optimizer.step(norm, factor)
        self.optimizer.zero_grad()
        self.updates += 1
        if self.ema is not None:
            self.ema.update()
        return stats

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The parts of a checkpoint that belong to this role, sharded as they are."""
        weights: dict[str, Tensor] = dict(self.parameters)
        parts = {self.role: weights, f"optim_{self.role}": self.optimizer.tensors()}
        return parts | ({"ema": self.ema.shadow} if self.ema is not None else {})

    def counters(self) -> dict[str, int]:
        """The counters that must survive a restart."""
        return {"updates": self.updates, "skipped": self.skipped, "ema_updates": self.ema.updates if self.ema else 0}

    def load(self, part: Callable[[str], Mapping[str, Tensor]], counters: Mapping[str, int]) -> None:
        """Restore ``tensors()`` and ``counters()``; ``part(name)`` gives the tensors of a part of the checkpoint."""
        load_named(self.parameters, part(self.role), f"the {self.role}", self.context)
        self.optimizer.load(part(f"optim_{self.role}"))
        self.updates, self.skipped = counters["updates"], counters["skipped"]
        if self.ema is not None:
            self.ema.load(part("ema"), counters["ema_updates"])

    def _backward(self, update: Update, part: Any, count: int) -> Loss:
        loss = update.loss(part)
        assert loss.per_sample.ndim == 1, f"{self.role} loss: per_sample must be [b], is {tuple(loss.per_sample.shape)}"
        assert loss.per_sample.requires_grad, f"the {self.role} loss has no gradient: it is detached from the network"
        torch.autograd.backward(loss.per_sample.sum() / count)
        return loss

    def _reject(self, per_sample: Tensor, norm: Tensor) -> None:
        self.optimizer.zero_grad()
        self.skipped += 1
        if self.skip_nonfinite:
            return
        positions = (~per_sample.isfinite()).nonzero().flatten().tolist()
        what = f"the loss of {len(positions)} sample(s)" if positions else f"the gradient norm ({norm.item()})"
        raise NonFiniteError(f"{what} of the {self.role} is not finite", self.role, positions)


def role_states(roles: Roles, cfg: LoopConfig, context: DistributedContext = SINGLE_PROCESS) -> dict[Role, RoleState]:
    """Optimizers of student and fake score, and the student's EMA, from the configuration."""
    states: dict[Role, RoleState] = {}
    rates: dict[Role, float] = {"student": cfg.lr_student, "fake": cfg.lr_fake}
    for role, lr in rates.items():
        parameters = roles.parameters(role)
        states[role] = RoleState(
            role,
            parameters,
            RoleOptimizer(parameters, lr, cfg.betas, cfg.weight_decay, cfg.clip, context, cfg.optimizer),
            Ema(parameters, cfg.ema, cfg.ema_warmup, context) if role == "student" and cfg.ema else None,
            cfg.micro_batch,
            cfg.on_nonfinite == "skip",
            context,
        )
    return states


@contextmanager
def ema_weights(state: RoleState) -> Iterator[None]:
    """Inside, the role's network holds the EMA weights (to validate and evaluate); without EMA nothing changes."""
    if state.ema is None:
        yield
        return
    with state.ema.swapped_in():
        yield


def _flat(value: Tensor) -> Tensor:
    return value.detach().reshape(-1)
