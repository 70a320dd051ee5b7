"""Validation during training: the EMA student generates images of fixed prompts, and rewards score them.

The teacher generates the same prompts from the same noise once. Its images are stored in the run folder, so that every grid
shows them and a resumed run need not generate them again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gdmd.config.run import RunConfig
from gdmd.config.validation import DIVERSITY, PREFIX, TEACHER, at_size
from gdmd.data.prompt_files import NAME_IT, RENAME_IT
from gdmd.data.prompts import read_prompts
from gdmd.diffusion.generate import Sampler, images_of
from gdmd.evaluation.scorers import features_by
from gdmd.io import content_hash, write_atomic
from gdmd.recipes.build import Components
from gdmd.recipes.build_rewards import without_stats
from gdmd.recipes.open_run import image_batch, student_row, teacher_row
from gdmd.reporting.distances import pairwise_distance
from gdmd.reporting.grids import write_grid
from gdmd.rewards.preprocessing import to_pil
from gdmd.runs.run_folder import TEACHER_FILE
from gdmd.shapes.grammar import catalog, fixed_rows
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext
from gdmd.training.loop import NoProgress, Progress
from gdmd.types import PromptBatch, Reward

Meta = tuple[Mapping[str, Any], ...]


def grid_captions() -> tuple[str, ...]:
    """Two Shapes captions of every task of the evaluation set."""
    return catalog().texts(fixed_rows("eval", 2))


def validation_prompts(cfg: RunConfig) -> tuple[tuple[str, ...], Meta]:
    """The prompts and, if they come from a file that has it, their metadata; none without validation.

    If their file is that of the training prompts, prompts.column counts for both. ValueError for a malformed file, and
    in the Shapes world for a prompt outside its grammar.
    """
    given = cfg.validation.prompts
    if not cfg.validation.every:
        return (), ()
    if given is None and cfg.shapes_world:
        return grid_captions(), ()
    if isinstance(given, tuple):
        texts: tuple[str, ...] = given
        meta: Meta = ()
    else:
        column = cfg.prompts.column if given is not None and given == cfg.prompts.file else None
        try:
            found = read_prompts(given or "validation", column)
        except ValueError as error:
            raise ValueError(f"validation.prompts: {str(error).replace(NAME_IT, RENAME_IT)}") from error
        texts, meta = found.texts, found.meta or ()
    if cfg.shapes_world:
        for text in texts:
            try:
                catalog().row(text)
            except ValueError as error:
                raise ValueError(f"validation.prompts: {error}") from error
    return texts, meta


def _mean(scores: Tensor) -> float:
    """The mean over the images that were scored; NaN if none was. scores [N]"""
    return float(scores[~scores.isnan()].double().mean())


class Validation:
    """Draws and scores the validation images of a step: ``Hooks.validate``.

    It draws nothing from the training's random numbers, and its scores are not part of the training's statistics.
    """

    def __init__(
        self,
        cfg: RunConfig,
        components: Components,
        context: DistributedContext = SINGLE_PROCESS,
        progress: Progress | None = None,
    ) -> None:
        self.cfg, self.components, self.context, self.progress = cfg, components, context, progress or NoProgress()
        self.prompts, meta = validation_prompts(cfg)
        self.texts = tuple(text for text in self.prompts for _ in range(cfg.validation.images))
        self.meta = tuple(one for one in meta for _ in range(cfg.validation.images))
        self.columns = frozenset(name for row in meta for name in row)
        self.rewards = (*(components.rewards if cfg.method.rewarded else ()), *components.scorers)
        spec = cfg.feature_scorer
        named = [reward for reward in self.rewards if spec is not None and reward.name == spec.label]
        self.features = features_by(named[0]) if named else None
        self._failed: set[str] = set()

    def __call__(self, step: int, path: Path) -> Mapping[str, float]:
        """Write the grid to ``path``; the mean score of each reward (NaN if it scored no image), on all ranks.

        The teacher's scores are among them at step 0, and whenever its images had to be drawn again.
        """
        sharded = self.cfg.loop.sharding != "none"  # then every rank is needed to draw
        student = self._draw(self._student) if sharded or self.context.is_main else None
        scores: Mapping[str, float] = self.context.on_main(lambda: self._finish(step, path, student))
        return scores

    def _finish(self, step: int, path: Path, student: list[Tensor] | None) -> dict[str, float]:
        assert student is not None  # on rank 0
        teacher = self._stored_teacher(path.parent / TEACHER_FILE) if step else None
        scores = self._scores(student, PREFIX)
        if teacher is None:
            if step:
                self.progress.note(
                    f"step {step}: the teacher's validation images are generated again, because prompts, settings or base "
                    "model changed; earlier validation scores are not comparable"
                )
            teacher = self._draw_teacher(path.parent / TEACHER_FILE)
            scores |= self._scores(teacher, TEACHER)
        count = self.cfg.validation.images
        shape = (len(self.prompts), count)
        pairs = [
            torch.stack(both).reshape(2, *shape, *both[0].shape[1:]) for both in zip(student, teacher, strict=True)
        ]
        cells = [list(pair[:, k].flatten(0, 1)) for k in range(len(self.prompts)) for pair in pairs]
        captions = [text for text in self.prompts for _ in pairs]
        headers = (self._student(self.components).name, self._teacher(self.components).name)
        write_grid(path, cells, captions, headers, scale=3 if self.cfg.shapes_world else 1)
        return scores

    def _draw(self, sampler: Callable[[Components], Sampler]) -> list[Tensor]:
        """[N, 3, H, W] in [0, 1] for each image size, on the CPU.

        Image i of a size starts from the same noise at every step and in every sampler.
        """
        seed, batch = self.cfg.eval.seed, image_batch(self.cfg)
        return [images_of(sampler(own), own, self.texts, seed, batch) for own in self.components.at_sizes()]

    def _student(self, components: Components) -> Sampler:
        return student_row(self.cfg, components)

    def _teacher(self, components: Components) -> Sampler:
        return teacher_row(self.cfg, components, "teacher")

    def _key(self) -> str:
        """A hash of everything that the teacher's images depend on and that a resumed run may change."""
        return content_hash(json.dumps([self.texts, self.cfg.eval.model_dump(mode="json"), self.cfg.method.guidance]))

    def _stored_teacher(self, file: Path) -> list[Tensor] | None:
        """The stored images; None if there are none with these settings."""
        try:
            with safe_open(file, "pt") as stored:
                if (stored.metadata() or {}).get("key") == self._key():
                    return [stored.get_tensor(name).float() / 255 for name in self._names()]
        except (OSError, SafetensorError):
            pass
        return None

    def _names(self) -> list[str]:
        """Names of the tensors in the teacher's file: its images at each size."""
        return [f"images.{size.height}x{size.width}" for size in self.components.sizes] or ["images"]

    def _draw_teacher(self, file: Path) -> list[Tensor]:
        self.progress.status("generating the teacher's validation images, once")
        images = self._draw(self._teacher)
        pixels = [(own * 255).round().byte().contiguous() for own in images]
        named = dict(zip(self._names(), pixels, strict=True))
        write_atomic(file, save(named, {"key": self._key()}), "the teacher's images")
        return images

    def _scores(self, images: list[Tensor], prefix: str) -> dict[str, float]:
        """The mean over the scored images by key, for all sizes and for each of several; NaN if none is scored."""
        with without_stats(self.rewards):
            found = {r.name: [self._score(r, own) for own in images] for r in self.rewards}
        means = {label: _mean(torch.cat(scores)) for label, scores in found.items()}
        each = {label: [_mean(own) for own in scores] for label, scores in found.items()}
        if self.features:
            each[DIVERSITY] = [self._diversity(own) for own in images]
            means[DIVERSITY] = fmean(each[DIVERSITY])
        for number, size in enumerate(self.components.sizes):
            means |= {at_size(label, size.height, size.width): own[number] for label, own in each.items()}
        return {prefix + label: mean for label, mean in means.items()}

    @torch.no_grad()
    def _diversity(self, images: Tensor) -> float:
        """Mean 1 - cosine of the features of two images of one prompt and size, mean over prompts."""
        assert self.features is not None
        size = image_batch(self.cfg)
        parts = [self.features(to_pil(images[start : start + size])) for start in range(0, len(images), size)]
        features = torch.cat([part.float().cpu() for part in parts])
        return pairwise_distance(
            features, torch.arange(len(self.prompts)).repeat_interleave(self.cfg.validation.images)
        )

    def _score(self, reward: Reward, images: Tensor) -> Tensor:
        """[N]. A reward that fails, such as GenEval on prompts without its metadata, scores nothing: training continues."""
        try:
            return torch.cat([reward.score(own, prompts).float().cpu() for own, prompts in self._batches(images)])
        except ValueError as error:
            if reward.name not in self._failed:
                self.progress.note(f"warning: validation without {reward.name}: {error}")
            self._failed.add(reward.name)
            return torch.full((len(images),), torch.nan)

    def _batches(self, images: Tensor) -> Iterator[tuple[Tensor, PromptBatch]]:
        device = next(iter(self.components.roles.parameters("student").values())).device
        size = image_batch(self.cfg)
        for start in range(0, len(images), size):
            own = images[start : start + size].to(device)
            index = torch.arange(len(own), device=device)
            stop = start + len(own)
            meta = self.meta[start:stop]
            yield own, PromptBatch(index, self.texts[start:stop], index, {}, {}, meta=meta, columns=self.columns)
