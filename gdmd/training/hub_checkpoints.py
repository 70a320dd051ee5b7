"""Upload the newest checkpoint during training, in the background."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread

from gdmd.training.callbacks import TrainerCallback, TrainerState


class HubCheckpoints(TrainerCallback):
    """A callback that gives each new checkpoint to ``push``, one at a time; while one is uploaded, the newest waits.

    Training never waits for an upload and never stops because of one: a failure is reported, and the next checkpoint is
    uploaded instead. Only the end of the training waits, for the upload of the last one, which is tried once more.
    """

    def __init__(self, push: Callable[[Path], object], note: Callable[[str], None]) -> None:
        self.push, self.note = push, note
        self._lock = Lock()
        self._waiting: Path | None = None
        self._failed: Path | None = None  # the newest checkpoint, if its upload failed
        self._thread: Thread | None = None  # None while nothing is uploaded

    def on_save(self, state: TrainerState, checkpoint: Path) -> None:
        """Start to upload a checkpoint, on rank 0."""
        if not state.is_main:
            return
        with self._lock:
            if self._thread is not None:
                self._waiting = checkpoint
                return
            self._thread = Thread(target=self._upload, args=(checkpoint,), name="hub checkpoints", daemon=True)
            self._thread.start()

    def on_train_end(self, state: TrainerState) -> None:
        """Wait for the upload of the last checkpoint."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()
        if self._failed is not None:
            self._pushed(self._failed, f"It is in {self._failed.parent} only.")

    def _upload(self, checkpoint: Path | None) -> None:
        while checkpoint:
            done = self._pushed(checkpoint, "The next checkpoint is uploaded instead, or this one at the end.")
            self._failed = None if done else checkpoint
            checkpoint = self._next()

    def _next(self) -> Path | None:
        """The checkpoint that waits; without one the thread ends."""
        with self._lock:
            checkpoint, self._waiting = self._waiting, None
            self._thread = self._thread if checkpoint else None
        return checkpoint

    def _pushed(self, checkpoint: Path, consequence: str) -> bool:
        """Upload a checkpoint and report a failure; whether it succeeded."""
        try:
            self.push(checkpoint)
        except Exception as error:  # whatever it is, training continues
            self.note(f"{checkpoint.name} was not uploaded: {error} {consequence}")
            return False
        return True
