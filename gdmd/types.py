"""The common types, and the protocols between packages that do not import each other.

Shapes: B samples of the global batch, b of one rank or micro-batch, C H W latent (or image), N tokens or steps, R rewards,
K rollouts, eta targets of a group (Algorithm 1, arXiv 2604.19009).
Nothing here imports torch at run time: ``--help`` must stay fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from gdmd.diffusion.rng import SampleRng

Role = Literal["student", "fake"]
"""The trained networks. The teacher is frozen; the old policy follows the student."""

Native = Literal["eps", "velocity", "v", "x0"]
"""What a network predicts: velocity = eps - x0, v = alpha eps - sigma x0 (VP, arXiv 2202.00512)."""

StudentSampler = Literal["renoise", "ode"]
"""How a few-step student goes to its next step: x0 with fresh noise, or x0 with its own predicted noise (Euler, DDIM)."""

Cond = Mapping[str, "Tensor"]
"""What a denoiser is conditioned on: named tensors, each with the batch as first dimension."""


@dataclass(frozen=True)
class Prediction:
    """A network's prediction in every parameterization; build it with ``diffusion.schedule``.

    x0 and eps have the shape of x_t, fp32. ``velocity`` is eps - x0 in every family (never the VP "v").
    """

    x0: Tensor  # [B, C, H, W]
    eps: Tensor  # [B, C, H, W]

    @property
    def velocity(self) -> Tensor:
        """eps - x0, the flow direction from data to noise."""
        return self.eps - self.x0


class Schedule(Protocol):
    """x_t = alpha(t) x0 + sigma(t) eps with t in [0, 1], 0 = data, 1 = noise."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...


class Denoiser(Protocol):
    """A diffusion network seen as a solver S (arXiv 2604.19009): x_t [B,C,H,W], t [B] in [0,1] -> Prediction."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction: ...


class FeatureDenoiser(Denoiser, Protocol):
    """A denoiser with features for a GAN head (DMD2, arXiv 2405.14867)."""

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Hidden states of the image tokens, [B, N, D]: after a transformer's last block, or a UNet's middle block."""
        ...

    def feature_grid(self, x_t: Tensor) -> tuple[int, int]:
        """Rows and columns of these tokens, N = rows * columns."""
        ...


class Critic(Protocol):
    """A GAN head on the fake score's features: x_t [B,C,H,W], t [B] in [0,1] -> logits [B], high = real."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor: ...


class Codec(Protocol):
    """Latents <-> images. Images are [B, 3, H, W] in [0, 1]; decode does not clamp (the caller of a reward does)."""

    def decode(self, latents: Tensor) -> Tensor: ...

    def encode(self, images: Tensor) -> Tensor: ...


class TextEncoder(Protocol):
    """Captions -> conditioning; ``null`` is the unconditional input of classifier-free guidance."""

    def encode(self, texts: Sequence[str]) -> Cond: ...

    def null(self, count: int) -> Cond: ...


class Reward(Protocol):
    """A scorer of images: higher is better. NaN means "not scored" and is never replaced by a number."""

    name: str
    differentiable: bool

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32."""
        ...


class Future(Protocol):
    """Scores [B] that are computed in the background."""

    def result(self) -> Tensor:
        """Wait for the scores."""
        ...

    def cancel(self) -> None:
        """Cancel what has not started yet."""
        ...


@runtime_checkable
class AsyncReward(Reward, Protocol):
    """A reward that is computed elsewhere, in parallel with other work."""

    def submit(self, images: Tensor, prompts: PromptBatch) -> Future:
        """Start scoring and return at once."""
        ...


@runtime_checkable
class Explains(Protocol):
    """A reward that can explain why images have no score."""

    def unscored_because(self) -> str:
        """The reason, for an error or a warning; "" if there is none."""
        ...


def score_all(rewards: Sequence[Reward], images: Tensor, prompts: PromptBatch) -> list[Tensor]:
    """The scores [B] of each reward; async rewards run in parallel with each other and with the others.

    If one reward fails, pending requests to the others are cancelled.
    """
    pending: dict[int, Future] = {}
    try:
        for k, reward in enumerate(rewards):
            if isinstance(reward, AsyncReward):
                pending[k] = reward.submit(images, prompts)
        local = {k: reward.score(images, prompts) for k, reward in enumerate(rewards) if k not in pending}
        return [pending[k].result() if k in pending else local[k] for k in range(len(rewards))]
    except BaseException:
        for future in pending.values():
            future.cancel()
        raise


class Guide(Protocol):
    """Classifier-free guidance: combines the predictions with and without the caption at the same x_t and t [B]."""

    def __call__(self, cond: Prediction, uncond: Prediction, guidance: float, t: Tensor) -> Prediction: ...


class Roles(Protocol):
    """The networks of one distillation, whatever their storage (full copies, or adapters on one backbone)."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def guide(self) -> Guide: ...

    @property
    def student(self) -> Denoiser: ...

    @property
    def fake(self) -> Denoiser: ...

    @property
    def teacher(self) -> Denoiser: ...

    @property
    def old(self) -> Denoiser: ...

    def parameters(self, role: Role) -> Mapping[str, Parameter]:
        """The trainable parameters of a role by their stable name."""
        ...

    def follow(self, decay: float) -> None:
        """Move the old policy: old <- decay old + (1 - decay) student. Only for methods with an EMA old policy."""
        ...

    def old_state(self) -> Mapping[str, Tensor]:
        """Weights of the old policy by the student's parameter names; empty until ``follow`` is called."""
        ...

    def load_old_state(self, tensors: Mapping[str, Tensor]) -> None: ...

    def shard(self, shard: Callable[[Any], None]) -> None:
        """Before training on several ranks: call ``shard`` with every module whose weights are all trained or follow the
        student, also those created later. Adapters and frozen networks stay whole. Parameters become new objects."""
        ...


class Ranks(Protocol):
    """The processes that share a global batch. Global statistics are computed on the result of ``all_gather``."""

    def all_gather(self, local: Tensor, dim: int = 0) -> Tensor:
        """The samples of all ranks along ``dim``, in the order of the global batch: b -> B. No gradient."""
        ...

    def local_shard(self, full: Tensor, dim: int = 0) -> Tensor:
        """The inverse: this rank's samples along ``dim`` of a tensor of the global batch, B -> b."""
        ...


class SingleProcess:
    """One process: its batch is the global batch."""

    def all_gather(self, local: Tensor, dim: int = 0) -> Tensor:
        return local

    def local_shard(self, full: Tensor, dim: int = 0) -> Tensor:
        return full


SINGLE_PROCESS = SingleProcess()


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one outer iteration; entry i belongs to sample i of every tensor of the step.

    index: global position of each sample in the step's batch, the key of its random draws.
    host: ``index`` on the CPU, if known, so that Python reads draws without a synchronization.
    group: integer id, equal for samples of one prompt group (never derived from text).
    ranks: the processes that share the global batch, of which this is the part of one rank.
    columns: names of the metadata of all prompts of the run, of which the rows of a batch may lack some.
    teacher_cond: what the real score reads in place of ``cond``; None without teacher prompts.
    others: i >= 1 -> other prompts for the same samples, drawn in the same way; None for prompts that no stream drew.
    """

    index: Tensor  # [B] int64
    text: tuple[str, ...]
    group: Tensor  # [B] int64
    cond: Cond
    uncond: Cond
    meta: tuple[Mapping[str, Any], ...] = ()
    ranks: Ranks = SINGLE_PROCESS
    host: Tensor | None = None
    teacher_cond: Cond | None = None
    others: Callable[[int], PromptBatch] | None = None
    columns: frozenset[str] = frozenset()

    def another(self, i: int) -> PromptBatch:
        """Other prompts of the same step, number i >= 1; these again if no stream drew them."""
        return self if self.others is None else replace(self.others(i), ranks=self.ranks)

    @property
    def real_cond(self) -> Cond:
        """The conditioning of the real score: of the teacher prompts, else of the prompts."""
        return self.cond if self.teacher_cond is None else self.teacher_cond

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Loss:
    """What a loss function returns: one value per sample, and statistics that are logged as means over samples."""

    per_sample: Tensor  # [b], fp32, with gradient
    stats: Mapping[str, Tensor] = field(default_factory=dict)  # each [b], no gradient


@dataclass(frozen=True)
class Update:
    """One optimizer step for the loop to make.

    ``batch`` is a dataclass (or mapping) of tensors with the sample as first dimension, which the loop may split
    into micro-batches; ``loss`` is deterministic and differentiable: all random draws are in the batch.
    """

    role: Role
    loss: Callable[[Any], Loss]
    batch: Any


class Method(Protocol):
    """A distillation algorithm: a generator of updates. When it is resumed, the update it yielded has been applied."""

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]: ...

    def stats(self) -> Mapping[str, Tensor]:
        """Statistics of the last iteration, 0-d or [B] tensors; the loop logs their means. Keys are group/name."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Everything that must survive a restart, as tensors."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...
