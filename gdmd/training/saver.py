"""Checkpoints of a running training: copied to host memory in the loop, optionally written by a background thread.

Rank 0 gathers sharded tensors one by one and writes complete ones, so that any number of ranks resumes from them. At
most one checkpoint is being written: the next save waits for it. An error of the writer (full disk, ...) is raised in
the loop by all ranks, in the same iteration. A checkpoint gets its name when all its files are complete, so that a kill
while writing loses only that checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gdmd.config.training import LoopConfig
from gdmd.runs import checkpoint
from gdmd.runs.best_checkpoint import Best
from gdmd.training.distributed import DistributedContext

EXIT_WAIT = 60.0
"""Seconds that an exiting process waits for the checkpoint that it is writing."""
SLOW_SAVE_SECONDS = 1.0
"""Waiting longer than this for the previous checkpoint is reported."""
Parts = Mapping[str, Mapping[str, Tensor]]


class _Writer(threading.Thread):
    """The thread that writes one checkpoint."""

    def __init__(self, write: Callable[[], Path]) -> None:
        super().__init__(name="gdmd-checkpoint", daemon=True)  # a second Ctrl-C need not wait
        self._write: Callable[[], Path] | None = write
        self.path: Path | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        assert self._write is not None
        try:
            self.path = self._write()
        except BaseException as error:  # raised again by Saver.wait, in the loop
            self.error = error
        self._write = None  # frees the copy in host memory
        self.done.set()

    def finish(self) -> str:
        """Wait for it and end the thread; the checkpoint's folder, or the error of the write."""
        self.done.wait()
        if self.ident is not None:
            self.join()
        if self.error is not None:
            raise self.error
        return str(self.path)


class Saver:
    """Saves the checkpoints of one run. ``newest``: the last complete one; all ranks call ``completed`` with each."""

    def __init__(
        self,
        folder: Path,
        cfg: LoopConfig,
        context: DistributedContext,
        note: Callable[[str], None] = lambda message: None,
        completed: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder, self.cfg, self.context, self._note, self._completed = folder, cfg, context, note, completed
        self.newest: Path | None = None
        self._pending = False  # on all ranks; rank 0 has the writer
        self._writer: _Writer | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank is writing now."""
        return self._writer is not None and not self._writer.done.is_set()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write."""
        return self._writer is not None and self._writer.done.is_set() and self._writer.error is not None

    def save(self, step: int, parts: Parts, facts: Mapping[str, Any], candidate: Best | None = None) -> None:
        """Start saving ``parts``, which may change as soon as this returns. Called by all ranks."""
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        if waited > SLOW_SAVE_SECONDS:
            self._note(f"step {step} waited {waited:.1f} s for the previous checkpoint; raise loop.checkpoint_every")
        tensors = self._on_host(parts)
        self._pending = True
        if self.context.is_main:
            folder, keep = self.folder, self.cfg.keep_checkpoints
            self._writer = _Writer(lambda: checkpoint.save(folder, step, tensors, facts, keep, candidate))
            if self.cfg.checkpoint_async:
                self._writer.start()
            else:
                self._writer.run()
        if not self.cfg.checkpoint_async:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is complete, or raise the error of its writer. Called by all ranks."""
        if not self._pending:
            return
        writer, self._writer, self._pending = self._writer, None, False
        self.newest = Path(self.context.on_main(lambda: writer.finish() if writer else ""))
        self._completed(self.newest)

    def last_checkpoint(self) -> str:
        """Which checkpoint is intact, for an error."""
        newest = self._writer.path if self._writer and self._writer.path else self.newest
        return f"The last good checkpoint is {newest}." if newest else "There is no checkpoint yet."

    def last_checkpoint_at_exit(self) -> str:
        """``last_checkpoint``, after at most EXIT_WAIT seconds for the one that this rank is writing."""
        if self._writer is not None:
            self._writer.done.wait(EXIT_WAIT)
        return self.last_checkpoint()

    def close(self) -> None:
        """Finish what this rank is writing, however the run ended; an error is reported, not raised."""
        if self._writer is None:
            return
        try:
            self._writer.finish()
        except Exception as error:
            self._note(str(error))

    def _on_host(self, parts: Parts) -> dict[str, dict[str, Tensor]]:
        """Complete tensors in rank 0's memory; copies if the loop continues while they are written."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for part, named in parts.items():
            for name, tensor in named.items():
                full = self.context.full_tensor(tensor.detach())
                if self.context.is_main:
                    tensors.setdefault(part, {})[name] = full.to("cpu", copy=self.cfg.checkpoint_async)
        return tensors
