"""The training loop: prompts by index, the method's updates, logs, validation and checkpoints. It knows no algorithm.

Everything random is keyed by (seed, step, sample), so a checkpoint needs no generator state, and a resumed run equals
the uninterrupted one bit for bit (same machine, same number of threads). All ranks run this loop, each on its slice of
every batch; only rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from gdmd.config.training import LoopConfig
from gdmd.diffusion.device import deferred_checks
from gdmd.diffusion.rng import SampleRng
from gdmd.io import typed, writing
from gdmd.runs import checkpoint
from gdmd.runs.best_checkpoint import BestCheckpointTracker
from gdmd.runs.inputs import last_change
from gdmd.runs.process import stop_signals
from gdmd.runs.run_folder import Run, read_metrics
from gdmd.training.callbacks import CallbackError, TrainerCallback, TrainerState, call
from gdmd.training.displacement import hardly_moves
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext, OtherRankError
from gdmd.training.metrics import Means
from gdmd.training.optimizer import lr_factor
from gdmd.training.progress import validation_line
from gdmd.training.reward_monitor import RewardMonitor
from gdmd.training.role_state import NonFiniteError, RoleState, ema_weights, role_states
from gdmd.training.saver import Saver
from gdmd.training.trackers import trackers
from gdmd.training.warm_start import newest, warm_start
from gdmd.types import Method, PromptBatch, Role, Roles


class Stream(Protocol):
    """Prompts by step: a pure function of the step, so there is no iterator state to save."""

    def at(self, step: int, start: int = 0, stop: int | None = None) -> PromptBatch:
        """Samples start ... stop - 1 of the step's batch."""
        ...


class Progress(Protocol):
    """What the user sees: ``training.progress`` shows a bar or plain lines, tests collect rows."""

    def begin(self, step: int) -> None:
        """The iterations begin after ``step`` finished ones: 0, or those of the checkpoint."""

    def advance(self, step: int) -> None:
        """``step`` outer iterations are finished."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """A row was logged."""

    def note(self, message: str) -> None:
        """A message for the user."""

    def status(self, doing: str) -> None:
        """What the program is doing instead of training, such as "saving a checkpoint"; "" = training again."""


class NoProgress:
    """Shows nothing."""

    def begin(self, step: int) -> None:
        return

    def advance(self, step: int) -> None:
        return

    def row(self, step: int, values: Mapping[str, float]) -> None:
        return

    def note(self, message: str) -> None:
        return

    def status(self, doing: str) -> None:
        return


@dataclass(frozen=True)
class Hooks:
    """What the loop calls besides the method, and where it reports.

    validate(step, path): called by all ranks (a sharded network needs them all) with the EMA weights swapped in, every
    ``validate_every`` steps (0 = never), at step 0 and at the last; rank 0 writes an image to ``path``, and all ranks
    get the scores, by key of metrics.jsonl.

    stats(): statistics from outside the method that are logged after an iteration, such as the parts of a reward.
    at_log(): values that are measured only when a row is logged, by all ranks.
    reason(name): why the reward ``name`` left images without a score, for an error.
    resume_advice: how to continue the run after an error; "": by the command line.
    callbacks: the user's, the same on all ranks.
    """

    progress: Progress = field(default_factory=NoProgress)
    validate: Callable[[int, Path], Mapping[str, float]] | None = None
    validate_every: int = 0
    stats: Callable[[], Mapping[str, Tensor]] = dict
    at_log: Callable[[], Mapping[str, float]] = dict
    reason: Callable[[str], str] = lambda name: ""
    resume_advice: str = ""
    callbacks: Sequence[TrainerCallback] = ()


NO_HOOKS = Hooks()


@dataclass(frozen=True)
class TrainEnd:
    """How a run ended: finished iterations, the newest checkpoint, and what stopped it before its last step.

    signal: the signal that did; stopped: a callback did (``TrainerState.should_stop``).
    """

    step: int
    checkpoint: Path
    signal: int | None = None
    stopped: bool = False

    @property
    def exit_code(self) -> int:
        """0, or 128 + signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal


def train(
    method: Method,
    roles: Roles,
    stream: Stream,
    cfg: LoopConfig,
    run: Run,
    hooks: Hooks = NO_HOOKS,
    context: DistributedContext = SINGLE_PROCESS,
) -> TrainEnd:
    """Train to ``cfg.steps`` outer iterations, from the newest good checkpoint of ``run`` if it has one.

    SIGINT and SIGTERM, to any rank, end it after the current iteration, with a checkpoint; a second one to a single
    process ends it at once. Errors: RunError (disk), NonFiniteError (numbers), RanksError; the last checkpoint is kept.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if context.size > 1:
        context.local_slice(cfg.batch_size)  # checks that the ranks divide the batch
        if cfg.sharding != "none":
            roles.shard(lambda module: context.shard(module, cfg.sharding))
    trainer = _Trainer(method, roles, stream, cfg, run, hooks, context)
    saver = trainer.saver
    with context.training(cfg.rank_timeout, saver.last_checkpoint_at_exit), stop_signals(context.size) as signals:
        with closing(trainer), closing(saver):
            return trainer.train(trainer.resume(), signals)


class _Trainer:
    """The objects of one run, and what the loop does with them."""

    def __init__(
        self,
        method: Method,
        roles: Roles,
        stream: Stream,
        cfg: LoopConfig,
        run: Run,
        hooks: Hooks,
        context: DistributedContext,
    ) -> None:
        self.method, self.roles, self.stream, self.cfg, self.run, self.hooks = method, roles, stream, cfg, run, hooks
        self.context, self.progress = context, hooks.progress
        self.states: dict[Role, RoleState] = role_states(roles, cfg, context)
        self.factors = dict.fromkeys(self.states, 0.0)  # of the learning rates in the last update
        self.means = Means()
        self.state = TrainerState(0, cfg.steps, run.path, context.is_main)
        self.trackers = trackers(cfg.report_to, run, self.progress.note) if context.is_main else []
        self.saver = Saver(run.checkpoints, cfg, context, self.progress.note, lambda path: self.call("on_save", path))
        window = max(cfg.checkpoint_every, cfg.log_every)
        self.best = BestCheckpointTracker(cfg.best_metric, cfg.best_direction, window)
        self.rewards = RewardMonitor(cfg.batch_size, cfg.steps, hooks.reason)
        self._images, self._clock = 0, time.perf_counter()
        self._warned_of_student = False
        self.failure: CallbackError | None = None

    def train(self, start: int, signals: list[int]) -> TrainEnd:
        """The iterations after ``start``; ``signals`` receives those of this rank."""
        cfg, signal, step = self.cfg, 0, start
        self.state.step = self.start = start
        self.context.on_main(self.start_trackers)
        self.call("on_train_begin")
        if start == 0:
            self.write_row(0, self.validate(0))
        self.progress.begin(start)
        for step in range(start + 1, cfg.steps + 1):  # step counts finished iterations from here on
            self.train_step(step - 1)
            self.state.step = step
            self.call("on_step_end")
            signal = self.synchronize(signals[0] if signals else 0)
            last = step == cfg.steps or signal > 0 or self.state.should_stop
            self.progress.advance(step)
            scores = self.validate(step)
            if last or step % cfg.log_every == 0:
                self.log(step, scores)
            else:
                self.write_row(step, scores)
            last = last or self.should_stop()
            if last or step % cfg.checkpoint_every == 0:
                self.save(step)
            if last or self.failure:  # also in ``on_save``
                break
        newest = self.finish_saving(step)
        self.raise_failure()
        self.require_rewards(step, ended=True)
        self.call("on_train_end")
        return TrainEnd(step, newest, signal or None, stopped=not signal and step < cfg.steps)

    def train_step(self, step: int) -> None:
        """One outer iteration: apply every update the method asks for, in its order."""
        prompts = self._prompts(step)
        rng = SampleRng(self.cfg.seed, step, prompts.index, prompts.host)
        try:
            with self.naming_step(step + 1), deferred_checks():
                for update in self.method.iteration(step, prompts, rng):
                    self.factors[update.role] = self._lr_factor(step)
                    self.means.add(self.states[update.role].apply(update, self.factors[update.role]))
        except NonFiniteError as error:
            raise self._explained(error, step + 1, prompts) from error
        self._check_skipped(step + 1)
        self.means.add({**self.hooks.stats(), **self.method.stats()})
        self._images += len(prompts) * self.context.size

    @contextmanager
    def naming_step(self, step: int) -> Iterator[None]:
        """A ValueError of the method or of a reward says in which step it happened and how to continue."""
        try:
            yield
        except ValueError as error:
            if type(error) is not ValueError:  # disk, non-finite and rank errors already say what to do
                raise
            raise ValueError(f"step {step}: {error}. {self._cure()}") from error

    def synchronize(self, signal: int) -> int:
        """The signal that any rank received, 0 = none. Ends a save that is complete, or that failed on some rank."""
        mine = [signal, self.saver.failed, self.saver.writing, self.state.should_stop]
        signal, failed, writing_still, stop = self.context.all_reduce_max(mine)
        self.state.should_stop = bool(stop)
        if failed or not writing_still:
            self.saver.wait()
        return signal

    def should_stop(self) -> bool:
        """Whether a callback of any rank asked to stop, also in ``on_log`` and ``on_images``."""
        if self.hooks.callbacks:
            self.state.should_stop = bool(self.context.all_reduce_max([self.state.should_stop])[0])
        return self.state.should_stop

    def log(self, step: int, scores: Mapping[str, float]) -> None:
        """Write a row of means since the last one, and validation scores; check the rewards and the student."""
        values = self.means.read(self.context)
        values["speed/images_per_s"] = self._images / (time.perf_counter() - self._clock)
        for role, state in self.states.items():
            values[f"lr/{role}"] = state.optimizer.lr * self.factors[role]
            values[f"updates/{role}"] = state.updates
            values[f"skipped/{role}"] = state.skipped
        with self.naming_step(step):
            values |= self.hooks.at_log()
        self._images, self._clock = 0, time.perf_counter()
        self.write_row(step, {**values, **scores})
        self.progress.row(step, values)
        self.rewards.add(step, values)
        if self.rewards.failure(step):
            self.save(step)
            self.saver.wait()
        self.require_rewards(step)
        for message in self.rewards.warnings(step):
            self.progress.note(message)
        if not self._warned_of_student and (message := hardly_moves(step, values, self.cfg)):
            self.progress.note(message)
            self._warned_of_student = True

    def validate(self, step: int) -> Mapping[str, float]:
        """Draw and score the validation images with the EMA weights, if it is their turn; {} if not."""
        every = self.hooks.validate_every
        if self.hooks.validate is None or not every or (step % every and step != self.cfg.steps):
            return {}
        path, began = self.run.grid(step), time.perf_counter()
        self.progress.status("validating")
        with writing("the validation images", path), torch.no_grad(), ema_weights(self.states["student"]):
            path.parent.mkdir(exist_ok=True)
            scores = self.hooks.validate(step, path)
        self.call("on_images", {"validation/images": path})
        self.progress.status("")
        if scores:
            self.progress.note(validation_line(step, scores))
        self._clock += time.perf_counter() - began  # the logged speed is that of training
        return scores

    def save(self, step: int) -> None:
        """Start a checkpoint of everything that is not a pure function of the configuration and the step."""
        self.progress.status("saving a checkpoint")
        parts: dict[str, Mapping[str, Tensor]] = {"old": self.roles.old_state(), "method": self.method.state()}
        for state in self.states.values():
            parts |= state.tensors()
        facts: dict[str, Any] = {"roles": {role: state.counters() for role, state in self.states.items()}}
        score = None
        if self.best.metric and self.context.is_main:
            score = self.best.score(step)
            if score is None and (reason := self.best.why_unscored(step)):
                self.progress.note(reason)
        self.saver.save(step, parts, facts, score)
        self.progress.status("")

    def finish_saving(self, step: int) -> Path:
        """The newest checkpoint, once it is complete; one of ``step`` if there is none."""
        self.saver.wait()
        if self.saver.newest is None:
            self.save(step)
            self.saver.wait()
        assert self.saver.newest is not None
        return self.saver.newest

    def require_rewards(self, step: int, *, ended: bool = False) -> None:
        """ValueError if a reward scored nothing, or if no reward gave a signal in a run that ``ended``."""
        if failure := self.rewards.failure(step, ended=ended):
            message = f"step {step}: {failure} {self.saver.last_checkpoint()} {self.rewards.cure(step)}"
            raise (ValueError if self.context.is_main else OtherRankError)(message)

    # ---------------------------------------------------------------- callbacks

    def start_trackers(self) -> None:
        """ValueError if one does not start. On rank 0."""
        for tracker in self.trackers:
            tracker.start(self.state)

    def call(self, event: str, *arguments: Any) -> None:
        """An event of ``TrainerCallback``: to the trackers and the user's callbacks.

        An error in a callback loses no iteration: a single process first ends the current one, with a checkpoint. Other
        ranks may wait for the callback, so several ranks end at once.
        """
        for tracker in self.trackers:
            getattr(tracker, event)(self.state, *arguments)
        if self.failure:
            return
        try:
            for callback in self.hooks.callbacks:
                call(callback, event, self.state, *arguments)
        except CallbackError as error:
            self.failure = error
            self.state.should_stop = True
            if self.context.size > 1 or self.state.step == self.start or event == "on_train_end":
                self.raise_failure()

    def raise_failure(self) -> None:
        """ValueError if a callback failed."""
        if self.failure:
            raise ValueError(f"step {self.state.step}: {self.failure}. {self._cure()}") from self.failure

    def close(self) -> None:
        """End the trackers' runs if the training failed."""
        for tracker in self.trackers:
            tracker.close()

    # ---------------------------------------------------------------- resuming

    def resume(self) -> int:
        """Load the newest good checkpoint, or what cfg.start_from names; returns the number of finished iterations."""
        saved = newest(self.run.checkpoints, self.context)
        if saved:
            self._load(saved)
        elif self.cfg.start_from:
            self.progress.note(warm_start(self.cfg.start_from, self.states, self.context, self.run.config))
        for state in self.states.values():
            self.context.check_equal_weights(state.parameters, f"the {state.role}")
        self.rewards.load(self.context.on_main(lambda: self._resume_folder(saved)))
        self._clock = time.perf_counter()
        return saved.step if saved else 0

    def _load(self, saved: checkpoint.Checkpoint) -> None:
        for state in self.states.values():
            state.load(saved.part, saved.state["roles"][state.role])
        weights = self.states["student"].parameters  # the old policy is sharded as the student is
        old = {name: self.context.distribute_like(full, weights[name]) for name, full in saved.part("old").items()}
        self.roles.load_old_state(old)
        self.method.load(saved.part("method"))
        self.saver.newest = saved.path

    def _resume_folder(self, saved: checkpoint.Checkpoint | None) -> dict[str, Any]:
        """Record a start or resume in the run folder; returns the state of the reward monitor after its rows."""
        if saved:
            checkpoint.set_aside_after(self.run.checkpoints, saved.step)
            self.run.note_resume(saved.step)
            for message in (*saved.messages, f"resumed from step {saved.step} ({saved.path})"):
                self.progress.note(message)
        elif logged := len(read_metrics(self.run.path)):
            self.progress.note(
                f"{self.run.checkpoints} holds no checkpoint: the run starts over, without its {logged} logged rows"
            )
        self.run.rewind(saved.step if saved else -1)
        rows = read_metrics(self.run.path)
        self.best.resume(rows if self.best.metric else (), last_change(self.run.path))
        return self.rewards.state_of(rows)

    # ---------------------------------------------------------------- details

    def _prompts(self, step: int) -> PromptBatch:
        """This rank's prompts of a step."""
        if self.context.size == 1:
            return self.stream.at(step)
        return replace(self.stream.at(step, *self.context.local_slice(self.cfg.batch_size)), ranks=self.context)

    def _lr_factor(self, step: int) -> float:
        updates = self.states["student"].updates
        return lr_factor(self.cfg.lr_schedule, step / self.cfg.steps, updates, self.cfg.warmup)

    def write_row(self, step: int, values: Mapping[str, float]) -> None:
        """Rank 0 writes a row to metrics.jsonl, if there are values; the callbacks get it."""
        if values:
            self.context.on_main(lambda: self._write_row(step, values))
            self.call("on_log", MappingProxyType(dict(values)))

    def _write_row(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(step, values)
        self.best.add(step, values)

    def _cure(self) -> str:
        command = f"gdmd train --resume {typed(self.run.path)} (add --accept-changes if you change a reward function)"
        advice = self.hooks.resume_advice or command
        return f"{self.saver.last_checkpoint_at_exit()} Fix the cause, then continue with: {advice}"

    def _check_skipped(self, step: int) -> None:
        skipped = sum(state.skipped for state in self.states.values())
        if skipped > self.cfg.skip_limit:
            self.saver.wait()
            raise ValueError(
                f"step {step}: {skipped} updates of this run were skipped because they were not finite, more "
                f"than loop.skip_limit = {self.cfg.skip_limit}. {self.saver.last_checkpoint()} Resume with a larger "
                "limit, or start another run with lower learning rates (loop.start_from)."
            )

    def _explained(self, error: NonFiniteError, step: int, prompts: PromptBatch) -> NonFiniteError:
        self.saver.wait()
        index = self.context.all_gather(prompts.index).tolist()
        known = all(position < len(index) for position in error.positions)
        samples = [index[position] if known else position for position in error.positions[:8]]
        where = f", sample(s) {samples}" if error.positions else ""
        message = (
            f"step {step}{where}: {error}. The update was not applied. {self.saver.last_checkpoint()} Resume with "
            "loop.on_nonfinite=skip, or start another run (loop.start_from) with a lower loop.lr_student and "
            "loop.lr_fake, or in fp32."
        )
        return NonFiniteError(message, error.role, error.positions)
