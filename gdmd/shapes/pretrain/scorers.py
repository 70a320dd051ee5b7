"""Train the three Shapes scorers: contrastive loss for the dual encoders, Bradley-Terry for the preference model.

Each is a function of (kind, steps, seed): the batch of a step is drawn from a generator keyed by (seed, step), so a
resumed run equals an uninterrupted one bit for bit. Scorers learn from captions of the train split only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gdmd.runs.assets import asset_path, load_asset, save_asset
from gdmd.shapes.grammar import catalog, draw_rows
from gdmd.shapes.pretrain.scorer_accuracy import measure
from gdmd.shapes.pretrain.scorer_data import (
    CORRUPTIONS,
    Corruption,
    SceneBatch,
    choose,
    corrupt,
    draw_negatives,
    draw_scene_batch,
    joined,
    may_be_true,
)
from gdmd.shapes.render import draw_scenes, render
from gdmd.shapes.scorer_networks import KINDS, DualEncoder, Kind, Preference, build_net

Net = DualEncoder | Preference
LABEL_SHARPNESS = 3.0  # log odds of preferring an image with one wrong attribute fewer
POOL = 32  # steps whose scenes are drawn at once
MAX_SCALE = 50.0  # cap of the learned inverse temperature; above it the model memorizes
SHIPPED: dict[Kind, tuple[int, int]] = {  # (steps, seed) of the assets
    "shapes_clip": (1700, 0),
    "shapes_clip_heldout": (1500, 1),
    "shapes_pref": (1500, 2),
}
FOUNDATION: Kind = "shapes_clip"  # the preference model is tuned from this shipped dual encoder
CHECKPOINT_KEYS = ("kind", "steps", "seed", "batch", "lr")


@dataclass(frozen=True)
class ScorerConfig:
    """How one scorer is trained."""

    kind: Kind
    steps: int
    seed: int
    batch: int = 64
    """Captions per step; a dual encoder sees 2 images of each, the preference model 4."""
    lr: float = 1.5e-3
    weight_decay: float = 0.01
    warmup: int = 100
    checkpoint_every: int = 200

    @property
    def command(self) -> str:
        return f"gdmd pretrain scorers --kind {self.kind} --steps {self.steps} --seed {self.seed}"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown scorer {self.kind!r}; the Shapes scorers are {', '.join(KINDS)}")
        if self.steps < 1 or self.batch < 2 or self.checkpoint_every < 1:
            raise ValueError(
                f"steps, batch and checkpoint_every are {self.steps}, {self.batch}, {self.checkpoint_every}; "
                "they must be at least 1, 2 and 1"
            )


@lru_cache(maxsize=2)
def _pool(seed: int, batch: int, pool: int) -> SceneBatch:
    return draw_scene_batch(batch * POOL, step_generator(seed, (1 << 31) + pool))


def batch_at(cfg: ScorerConfig, step: int) -> SceneBatch:
    """The scenes of one step, [batch]: drawn for POOL steps at once, by (seed, step // (2 POOL)).

    The next POOL steps use the same captions with the roles of the two scenes swapped.
    """
    place = step % POOL
    batch = _pool(cfg.seed, cfg.batch, step // (2 * POOL))[slice(place * cfg.batch, (place + 1) * cfg.batch)]
    if step // POOL % 2 == 0:
        return batch
    return replace(batch, true=batch.again, again=batch.true, wrong=batch.wrong_again, wrong_again=batch.wrong)


def contrastive_loss(net: DualEncoder, batch: SceneBatch, generator: torch.Generator) -> Tensor:
    """Symmetric InfoNCE over images of captions and of their hard negatives, with additional hard captions. Scalar.

    An (image, caption) pair is masked in the softmax when the caption may be true of the image's scene although it is
    not the caption it was drawn for; so equal captions never compete.
    """
    rows, scenes = torch.cat([batch.rows, batch.near]), joined(batch.true, batch.wrong)
    further = torch.cat([draw_negatives(rows, generator) for _ in range(2)])
    every = torch.cat([rows, further])  # [N], N = 3 * 2 * batch
    images = net.image_features(render(scenes))  # [2 batch, D]
    texts = net.text_features(catalog().tokens[every])  # [N, D]
    own = torch.eye(len(rows), len(every), dtype=torch.bool)
    left_out = may_be_true(scenes, every) & ~own
    scale = net.log_scale.exp().clamp(max=MAX_SCALE)
    logits = (scale * images @ texts.mT).masked_fill(left_out, float("-inf"))
    target = torch.arange(len(rows))
    by_text = F.cross_entropy(logits[:, : len(rows)].mT, target)
    return 0.5 * (F.cross_entropy(logits, target) + by_text)


@dataclass(frozen=True)
class RankedImages:
    """Images, the captions they are judged by, and how bad they are for these."""

    images: Tensor  # [4, B, 3, 32, 32]
    rows: Tensor  # [4, B]
    severity: Tensor  # [4, B] in wrong attributes, 0 = true and clean


def draw_ranked(batch: SceneBatch, generator: torch.Generator) -> RankedImages:
    """Four images per caption: true | one thing wrong | true, corrupted | right or wrong, corrupted more or less.

    The second is a minimal pair of the first. For a third of the captions it is the first scene itself, judged by the
    wrong caption. One kind of corruption per caption; the first two images are mostly clean, else equally corrupted.
    """
    count = len(batch.rows)
    unit = torch.rand(6, count, generator=generator)
    swapped, failed, clean = unit[0] < 1 / 3, unit[1] < 0.4, unit[2] < 0.8
    second = choose(swapped, batch.true, batch.wrong)
    fourth = choose(failed, batch.wrong_again, batch.again)
    ghosts = joined(
        batch.again,
        choose(swapped, batch.again, batch.wrong_again),
        batch.true,
        choose(failed, batch.wrong, batch.true),
    )
    overlap = CORRUPTIONS.index("overlap")
    kind = 1 + torch.randint(len(CORRUPTIONS) - 1, (count,), generator=generator)
    kind = torch.where((kind == overlap) & ~batch.again.present[:, 1], 1, kind)
    first = torch.where(clean | (kind == overlap), 0, kind)
    level = torch.stack([unit[3] * ~clean, unit[3] * ~clean, unit[4], unit[5]])
    corruption = Corruption(torch.stack([first, first, kind, kind]).flatten(), level.flatten())
    images = corrupt(joined(batch.true, second, batch.again, fourth), ghosts, corruption, generator)
    right = torch.zeros(count)
    severity = corruption.severity.view(4, count) + torch.stack([right, right + 1, right, failed.float()])
    judged = torch.stack([batch.rows, torch.where(swapped, batch.near, batch.rows), batch.rows, batch.rows])
    return RankedImages(images.unflatten(0, (4, count)), judged, severity)  # type: ignore[no-untyped-call]


def preference_loss(net: Preference, batch: SceneBatch, generator: torch.Generator) -> Tensor:
    """Bradley-Terry with soft labels: P(a preferred to b) = sigmoid(LABEL_SHARPNESS (severity_b - severity_a)). Scalar.

    Labels that grow with the difference give scores that do not saturate. Pairs across captions (weight 1/4) put all
    captions on one scale.
    """
    ranked, count = draw_ranked(batch, generator), len(batch.rows)
    tokens = catalog().tokens[ranked.rows.flatten()]
    r = net.raw(ranked.images.flatten(0, 1), net.text_features(tokens)).view(4, count)
    a, b = torch.triu_indices(4, 4, offset=1)
    within = _bradley_terry(r[a] - r[b], ranked.severity[b] - ranked.severity[a])
    shift = torch.randint(1, count, (), generator=generator).item()
    other, worse = r.roll(int(shift), 1), ranked.severity.roll(int(shift), 1)
    across = _bradley_terry(r[a] - other[b], worse[b] - ranked.severity[a])
    return within + 0.25 * across + 1e-4 * r.square().mean()


def _bradley_terry(margin: Tensor, better_by: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(margin, torch.sigmoid(LABEL_SHARPNESS * better_by))


def learning_rate(cfg: ScorerConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The draws of one step; a function of (seed, step) alone."""
    return torch.Generator().manual_seed((seed << 32) + step)


def pretrain_scorer(
    kind: Kind,
    steps: int,
    seed: int,
    target: str | Path | None = None,
    *,
    resume: bool = False,
    batch: int = 64,
    checkpoint_every: int = 200,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    per_task: int = 500,
) -> Net:
    """Train one scorer, measure it, save it; return it in eval mode, frozen.

    target: the asset to write, None for none; the state of an unfinished run is next to it, with suffix .part.
    resume: continue from that state. ValueError when it belongs to another configuration.
    on_step: called after each step with (step, loss). per_task: captions per task of the measurement.
    """
    cfg = ScorerConfig(kind, steps, seed, batch, checkpoint_every=checkpoint_every)
    net = _untrained(cfg)
    optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, betas=(0.9, 0.98))
    path = None if target is None else Path(target)
    first = load_checkpoint(checkpoint_path(path), cfg, net, optimizer) if resume and path else 0
    for step in range(first, cfg.steps):
        loss = _train_step(cfg, net, optimizer, step)
        if path and (step + 1) % cfg.checkpoint_every == 0 and step + 1 < cfg.steps:
            save_checkpoint(checkpoint_path(path), cfg, net, optimizer, step + 1)
        on_step(step, loss)
    net.requires_grad_(False).eval()
    if isinstance(net, Preference):
        calibrate(net, cfg.seed)
    if path:
        _finish(path, cfg, net, per_task)
    return net


def _untrained(cfg: ScorerConfig) -> Net:
    """Weights initialized from the seed; the preference model starts from the shipped FOUNDATION's towers."""
    net = build_net(cfg.kind, cfg.seed)
    if isinstance(net, Preference):
        net.match.load_state_dict({k: v.float() for k, v in load_asset(asset_path(FOUNDATION)).tensors.items()})
    return net


def _train_step(cfg: ScorerConfig, net: Net, optimizer: torch.optim.Optimizer, step: int) -> float:
    generator, batch = step_generator(cfg.seed, step), batch_at(cfg, step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    if isinstance(net, Preference):
        loss = preference_loss(net, batch, generator)
    else:
        loss = contrastive_loss(net, batch, generator)
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"{cfg.kind}: the loss of step {step} is {loss.item()}; lower lr (now {cfg.lr}) and start again"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def calibrate(net: Preference, seed: int) -> None:
    """Set ``origin`` to the mean of r on true renders of train captions and ``unit`` to LABEL_SHARPNESS."""
    generator = step_generator(seed, (1 << 32) - 1)
    rows = draw_rows(1024, generator)
    r = net.raw(render(draw_scenes(rows, generator)), net.text_features(catalog().tokens[rows]))
    net.get_buffer("origin").copy_(r.mean())
    net.get_buffer("unit").fill_(LABEL_SHARPNESS)


def checkpoint_path(asset: Path) -> Path:
    """Where an unfinished run of ``asset`` keeps its state."""
    return asset.with_suffix(".part")


def save_checkpoint(path: Path, cfg: ScorerConfig, net: Net, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights, optimizer state and the number of finished steps, written atomically."""
    tensors = {f"net/{name}": value for name, value in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for part, value in optimizer.state[parameter].items():
            tensors[f"{part}/{name}"] = value
    facts = {"step": step, "config": asdict(cfg)}
    save_asset(path, tensors, command=cfg.command, seed=cfg.seed, metadata=facts)


def load_checkpoint(path: Path, cfg: ScorerConfig, net: Net, optimizer: torch.optim.Optimizer) -> int:
    """Restore a checkpoint in place; the number of finished steps (0 where there is none).

    ValueError when it belongs to another configuration, RunError when it is corrupt.
    """
    if not path.exists():
        return 0
    saved = load_asset(path)
    for key in CHECKPOINT_KEYS:
        old = saved.metadata["config"][key]
        if old != getattr(cfg, key):
            raise ValueError(
                f"checkpoint {path} was made with {key} = {old}, this run has {getattr(cfg, key)}; "
                "use the same value, or delete the file to start from step 0"
            )
    net.load_state_dict({name[4:]: value for name, value in saved.tensors.items() if name.startswith("net/")})
    for name, parameter in net.named_parameters():
        parts = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {part: saved.tensors[f"{part}/{name}"] for part in parts}
    return int(saved.metadata["step"])


def _finish(path: Path, cfg: ScorerConfig, net: Net, per_task: int) -> None:
    """Round to fp16, measure the rounded network, write the asset, delete the checkpoint."""
    for value in net.state_dict().values():
        value.copy_(value.half().float())
    facts = {"kind": cfg.kind, "config": asdict(cfg), "accuracy": measure(net, per_task), "torch": torch.__version__}
    tensors = {name: value.half() for name, value in net.state_dict().items()}
    save_asset(path, tensors, command=cfg.command, seed=cfg.seed, metadata=facts)
    checkpoint_path(path).unlink(missing_ok=True)
