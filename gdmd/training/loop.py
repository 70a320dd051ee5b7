"""The training loop: prompts by index, the method's updates, logs, grids and checkpoints. It knows no algorithm.

Everything random is keyed by (seed, step, sample), so a checkpoint needs no generator state, and a resumed run is the
uninterrupted one bit for bit (same machine, same number of threads). Several ranks run this same loop, each on its
slice of every batch; only rank 0 writes.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gdmd.config.training import LoopConfig
from gdmd.diffusion.device import deferred_checks
from gdmd.diffusion.rng import SampleRng
from gdmd.io import writing
from gdmd.runs import checkpoint
from gdmd.runs.best_checkpoint import Judge
from gdmd.runs.reward_signal import RewardSignal
from gdmd.runs.run_folder import Run, read_metrics
from gdmd.training.distributed import SINGLE, OtherRankError, World
from gdmd.training.metrics import Means
from gdmd.training.optimizer import lr_factor
from gdmd.training.role_state import NonFiniteError, RoleState, ema_weights, role_states
from gdmd.training.saver import Saver
from gdmd.training.warm_start import begin_from, newest
from gdmd.types import Method, PromptBatch, Role, Roles

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Stream(Protocol):
    """Prompts by step: a pure function of the step, so there is no iterator state to save."""

    def at(self, step: int, start: int = 0, stop: int | None = None) -> PromptBatch:
        """Samples start ... stop - 1 of the step's batch."""
        ...


class Progress(Protocol):
    """Who watches: ``training.progress`` shows a bar or plain lines, tests collect rows."""

    def advance(self, step: int) -> None:
        """``step`` outer iterations are finished."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """A line was logged."""

    def note(self, message: str) -> None:
        """Something the user should read once."""


class Silent:
    """Nobody watches."""

    def advance(self, step: int) -> None:
        return

    def row(self, step: int, values: Mapping[str, float]) -> None:
        return

    def note(self, message: str) -> None:
        return


@dataclass(frozen=True)
class Hooks:
    """grid(step, path): called with the EMA weights swapped in, by all ranks (a sharded network needs them all);
    writes an image to ``path``, or nothing where that is None.

    stats(): what others than the method have to say for the log after an iteration, such as the parts of a reward.
    reason(name): why the reward ``name`` left images without a score, for an error.
    """

    progress: Progress = field(default_factory=Silent)
    grid: Callable[[int, Path | None], None] | None = None
    stats: Callable[[], Mapping[str, Tensor]] = dict
    reason: Callable[[str], str] = lambda name: ""


WATCHED_BY_NOBODY = Hooks()


@dataclass(frozen=True)
class TrainEnd:
    """How a run ended: finished iterations, the newest checkpoint, the signal that stopped it (None = completed)."""

    step: int
    checkpoint: Path
    signal: int | None = None

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
    hooks: Hooks = WATCHED_BY_NOBODY,
    world: World = SINGLE,
) -> TrainEnd:
    """Train to ``cfg.steps`` outer iterations, going on from the newest good checkpoint of ``run`` if it has one.

    SIGINT and SIGTERM, to any rank, end it after the current iteration, with a checkpoint; alone, a second one ends it
    at once. Errors: RunError (disk), NonFiniteError (numbers), RanksError; the last good checkpoint stands.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    place = world.span(cfg.batch_size) if world.size > 1 else (0, None)
    if world.size > 1 and cfg.sharding != "none":
        roles.shard(lambda module: world.shard(module, cfg.sharding))
    trainer = _Trainer(method, roles, cfg, run, hooks, world)
    with world.watched(cfg.rank_timeout, trainer.saver.last_words), _stop_signals(world) as stopped:
        start = trainer.resume()
        with _tensorboard(run, start) if world.first else nullcontext() as board, closing(trainer.saver):
            return _steps(trainer, lambda step: stream.at(step, *place), start, stopped, board)


def _steps(
    trainer: _Trainer,
    batch_at: Callable[[int], PromptBatch],
    start: int,
    stopped: list[int],
    board: SummaryWriter | None,
) -> TrainEnd:
    """The iterations from ``start`` on; ``stopped`` receives the first signal of this rank."""
    cfg, signal_number = trainer.cfg, 0
    if start == 0:
        trainer.grid(0)
    step = start
    for step in range(start + 1, cfg.steps + 1):  # step counts finished iterations from here on
        trainer.iterate(step - 1, batch_at(step - 1))
        signal_number = trainer.agree(stopped[0] if stopped else 0)
        last = step == cfg.steps or signal_number > 0
        trainer.report(step, last, board)
        if cfg.grid_every and (step % cfg.grid_every == 0 or step == cfg.steps):
            trainer.grid(step)
        if last or step % cfg.checkpoint_every == 0:
            trainer.save(step)
        if last:
            break
    newest = trainer.saved(step)
    trainer.require_signal(step, ended=True)
    return TrainEnd(step, newest, signal_number or None)


class _Trainer:
    """The objects of one run, and what the loop does with them."""

    def __init__(
        self, method: Method, roles: Roles, cfg: LoopConfig, run: Run, hooks: Hooks, world: World = SINGLE
    ) -> None:
        self.method, self.roles, self.cfg, self.run, self.hooks = method, roles, cfg, run, hooks
        self.world = world
        self.states: dict[Role, RoleState] = role_states(roles, cfg, world)
        self.means = Means()
        self.saver = Saver(run.checkpoints, cfg, world, hooks.progress.note)
        self.judge = Judge(cfg.best_metric, cfg.best_direction, max(cfg.checkpoint_every, cfg.log_every))
        self.signal, self._warned = RewardSignal(cfg.batch_size), set[str]()
        self._images, self._clock = 0, time.perf_counter()

    def resume(self) -> int:
        """Load the newest good checkpoint, or what cfg.start_from names; returns the number of finished iterations."""
        saved = newest(self.run.checkpoints, self.world)
        step = saved.step if saved else 0
        if saved:
            for state in self.states.values():
                state.load(saved.part, saved.state["roles"][state.role])
            weights = self.states["student"].parameters  # an old policy is laid out as the student
            old = {name: self.world.placed(own, weights[name]) for name, own in saved.part("old").items()}
            self.roles.load_old_state(old)
            self.method.load(saved.part("method"))
            self.saver.newest = saved.path
        elif self.cfg.start_from:
            self.hooks.progress.note(begin_from(self.cfg.start_from, self.states, self.world, self.run.config))
        for state in self.states.values():
            self.world.check_same(state.parameters, f"the {state.role}")
        self.signal = RewardSignal.load(self.world.on_first(lambda: self._take_up(saved)))
        self._clock = time.perf_counter()
        return step

    def _take_up(self, saved: checkpoint.Checkpoint | None) -> Any:
        """Record a start or resume in the run folder; return the reward signal of its rows."""
        if saved:
            checkpoint.set_aside_after(self.run.checkpoints, saved.step)
            self.run.note_resume(saved.step)
            for message in (*saved.messages, f"resumed from step {saved.step} ({saved.path})"):
                self.hooks.progress.note(message)
        elif logged := len(read_metrics(self.run.path)):
            self.hooks.progress.note(
                f"{self.run.checkpoints} holds no checkpoint: the run starts over, without its {logged} logged steps"
            )
        self.run.rewind(saved.step if saved else 0)
        rows = read_metrics(self.run.path)
        self.judge.take_up(rows if self.judge.metric else ())
        for row in rows:
            self.signal.add(int(row["step"]), row)
        return asdict(self.signal)

    def iterate(self, step: int, prompts: PromptBatch) -> None:
        """One outer iteration: apply every update the method asks for, in its order."""
        prompts = replace(prompts, ranks=self.world) if self.world.size > 1 else prompts
        rng = SampleRng(self.cfg.seed, step, prompts.index, prompts.host)
        try:
            with deferred_checks():
                for update in self.method.iteration(step, prompts, rng):
                    self.means.add(self.states[update.role].apply(update, self._factor(step)))
        except NonFiniteError as error:
            raise self._explained(error, step, prompts) from error
        except ValueError as error:
            if type(error) is not ValueError:  # those of the disk and of the ranks say what to do
                raise
            where = f"{self.saver.last_words()} Continue with: gdmd train --resume {self.run.path}"
            raise ValueError(f"step {step + 1}: {error}. {where}") from error
        self._check_skipped(step)
        self.means.add({**self.hooks.stats(), **self.method.stats()})
        self._images += len(prompts) * self.world.size

    def report(self, step: int, last: bool, board: SummaryWriter | None) -> None:
        """Advance the progress; every ``log_every`` steps write a row of means to metrics.jsonl and TensorBoard."""
        self.hooks.progress.advance(step)
        if step % self.cfg.log_every and not last:
            return
        values = self.means.read(self.world)
        seconds = time.perf_counter() - self._clock
        values["speed/images_per_s"] = self._images / seconds
        for role, state in self.states.items():
            values[f"lr/{role}"] = state.optimizer.lr * self._factor(step - 1)
            values[f"updates/{role}"] = state.updates
            values[f"skipped/{role}"] = state.skipped
        self._images, self._clock = 0, time.perf_counter()
        self.world.on_first(lambda: self._write_row(step, values, board))
        self.hooks.progress.row(step, values)
        self._check_rewards(step, values)

    def _check_rewards(self, step: int, values: Mapping[str, float]) -> None:
        """Stop where a reward scores nothing, warn once where it scores little or gives no signal; all ranks alike."""
        finished = step == self.cfg.steps
        self.signal.add(step, values)
        if self.signal.silent(finished):
            self.save(step)
            self.saver.settle()
        self.require_signal(step)
        for name, share in self.signal.sparse(finished).items():
            self._warn(
                f"sparse {name}", f"reward {name} left {share:.0%} of the images without a score{self._reason(name)}"
            )
        constant = self.signal.constant(finished)
        for name in constant:
            count = self.signal.counts[name].constant
            self._warn(
                f"constant {name}",
                f"reward {name} gave every image of {count} iterations the same score: it gives no signal",
            )
        if self.signal.no_signal(finished) and len(constant) < len(self.signal.counts):
            count = self.signal.flat
            self._warn(
                "flat", f"no reward told the images of a prompt apart in {count} iterations: they give no signal"
            )

    def require_signal(self, step: int, *, ended: bool = False) -> None:
        """ValueError where a reward scored nothing, and at the ``end`` of the run where none gave a signal at all."""
        finished = step == self.cfg.steps
        if silent := self.signal.silent(finished):
            text = " ".join(self._scores_nothing(name) for name in silent)
        elif ended and self.signal.failed(finished):
            text = (
                f"no reward told two images of a prompt apart in {self.signal.flat} iterations: distillation alone has "
                "trained this run."
            )
        else:
            return
        fix = (
            "Fix the reward and train again, or train without rewards (a dmd recipe)."
            if finished
            else "Fix the reward and resume (a changed one needs --accept-changes), or train without it."
        )
        message = f"step {step}: {text} {self.saver.stands()} {fix}"
        raise (ValueError if self.world.first else OtherRankError)(message)

    def _scores_nothing(self, name: str) -> str:
        iterations = self.signal.counts[name].silent
        return f"reward {name} scored no image in {iterations} iterations (all NaN){self._reason(name)}."

    def _reason(self, name: str) -> str:
        said = self.hooks.reason(name)
        return f": {said}" if said else ""

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self.hooks.progress.note(f"warning: {text}")

    def _write_row(self, step: int, values: Mapping[str, float], board: SummaryWriter | None) -> None:
        assert board is not None
        self.run.log(step, values)
        self.judge.add(step, values)
        with writing("the TensorBoard log", self.run.tensorboard):
            for key, value in values.items():
                board.add_scalar(key, value, step)
            board.flush()

    def grid(self, step: int) -> None:
        """Ask for the sample grid of this step, drawn with the EMA weights."""
        if self.hooks.grid is None or not self.cfg.grid_every:
            return
        path = self.run.grid(step)
        with writing("the sample grid", path), torch.no_grad(), ema_weights(self.states["student"]):
            path.parent.mkdir(exist_ok=True)
            self.hooks.grid(step, path if self.world.first else None)

    def agree(self, signal_number: int) -> int:
        """The signal that any rank has got, 0 = none; a checkpoint that all have written, or one has not, is settled."""
        found, failed, writing_still = self.world.maxima([signal_number, self.saver.failed, self.saver.writing])
        if failed or not writing_still:
            self.saver.settle()
        return found

    def save(self, step: int) -> None:
        """Begin a checkpoint of everything that is not a pure function of the configuration and the step."""
        parts: dict[str, Mapping[str, Tensor]] = {"old": self.roles.old_state(), "method": self.method.state()}
        for state in self.states.values():
            parts |= state.tensors()
        facts: dict[str, Any] = {"roles": {role: state.counters() for role, state in self.states.items()}}
        candidate = self.judge.at(step) if self.judge.metric and self.world.first else None
        if self.judge.metric and self.world.first and candidate is None:
            self.hooks.progress.note(self.judge.complaint(step))
        self.saver.save(step, parts, facts, candidate)

    def saved(self, step: int) -> Path:
        """The newest checkpoint, once it stands; one of ``step`` where there is none."""
        self.saver.settle()
        if self.saver.newest is None:
            self.save(step)
            self.saver.settle()
        assert self.saver.newest is not None
        return self.saver.newest

    def _factor(self, step: int) -> float:
        done = self.states["student"].updates
        return lr_factor(self.cfg.lr_schedule, step / self.cfg.steps, done, self.cfg.warmup)

    def _check_skipped(self, step: int) -> None:
        skipped = sum(state.skipped for state in self.states.values())
        if skipped > self.cfg.skip_limit:
            self.saver.settle()
            raise ValueError(
                f"step {step}: {skipped} updates of this run were skipped because they were not finite, more "
                f"than loop.skip_limit = {self.cfg.skip_limit}. {self.saver.stands()} Resume with a larger one, or begin "
                "another run with lower learning rates (loop.start_from)."
            )

    def _explained(self, error: NonFiniteError, step: int, prompts: PromptBatch) -> NonFiniteError:
        self.saver.settle()
        index = self.world.gather(prompts.index).tolist()
        within = all(place < len(index) for place in error.positions)
        where = f", sample(s) {[index[place] if within else place for place in error.positions[:8]]}"
        message = (
            f"step {step}{where if error.positions else ''}: {error}. The update was not applied. {self.saver.stands()} "
            "Resume with loop.on_nonfinite=skip, or begin another run (loop.start_from) with a lower loop.lr_student and "
            "loop.lr_fake, or in fp32."
        )
        return NonFiniteError(message, error.role, error.positions)


@contextmanager
def _tensorboard(run: Run, start: int) -> Iterator[SummaryWriter]:
    """A TensorBoard writer; what the log holds beyond the resumed step is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    with writing("the TensorBoard log", run.tensorboard):
        board = SummaryWriter(str(run.tensorboard), purge_step=start + 1 if start else None)
    try:
        yield board
    finally:
        with writing("the TensorBoard log", run.tensorboard):
            board.close()


@contextmanager
def _stop_signals(world: World) -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; the second one has its usual effect.

    Among several ranks it has none: a scheduler and torchrun may both pass on the one signal.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if world.size == 1:
            restore()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stopped
    finally:
        restore()
