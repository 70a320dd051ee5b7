"""Upload the newest checkpoint during training, in the background."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread

from gdmd.training.callbacks import TrainerCallback, TrainerState


class HubCheckpoints(TrainerCallback):
    """A callback that gives each new checkpoint to ``push``, one at a time; while one is uploaded, the newest waits.

    Training never waits for an upload and never stops because of one: a failure is a note, and the upload is
    tried again with the next checkpoint. Only the end of the training waits for the upload of the last one.
    """

    def __init__(self, push: Callable[[Path], object], note: Callable[[str], None]) -> None:
        self.push, self.note = push, note
        self._lock = Lock()
        self._waiting: Path | None = None
        self._thread: Thread | None = None

    def on_save(self, state: TrainerState, checkpoint: Path) -> None:
        """Start to upload a checkpoint, on rank 0."""
        if not state.is_main:
            return
        with self._lock:
            self._waiting = checkpoint
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._upload, name="hub checkpoints", daemon=True)
            self._thread.start()

    def on_train_end(self, state: TrainerState) -> None:
        """Wait for the upload of the last checkpoint."""
        if self._thread is not None:
            self._thread.join()
            self._upload()

    def _upload(self) -> None:
        while checkpoint := self._next():
            try:
                self.push(checkpoint)
            except Exception as error:  # whatever it is, training continues
                self.note(f"{checkpoint.name} was not uploaded: {error} It is tried again with the next checkpoint.")

    def _next(self) -> Path | None:
        with self._lock:
            checkpoint, self._waiting = self._waiting, None
        return checkpoint
