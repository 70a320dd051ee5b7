"""Checkpoints of a running training: copied to host memory in the loop, written aside by one background thread.

At most one is being written: the next save waits for it. An error of the writer (full disk, ...) is raised in the loop
by all ranks, at the same iteration. A checkpoint gets its name when all its files are whole, so that a kill in the
middle costs that checkpoint alone: the one before stands.
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
from gdmd.runs.sharded_checkpoint import offsets_header, shard_name
from gdmd.training.distributed import OtherRankError, World

LAST_WAIT = 60.0
"""Seconds that an exiting process waits for the checkpoint that it is writing."""
LONG = 1.0
"""Seconds of waiting for the previous checkpoint from which on the user is told."""
Parts = Mapping[str, Mapping[str, Tensor]]


class _Writer(threading.Thread):
    """One checkpoint on its way to the disk. ``digests``: the sums of the files of this rank, for a sharded one."""

    def __init__(self, place: checkpoint.Place, facts: Mapping[str, Any], work: Callable[[], Any]) -> None:
        super().__init__(name="gdmd-checkpoint", daemon=True)  # a second Ctrl-C need not wait
        self.place, self.facts, self._work = place, facts, work
        self.digests: dict[str, str] = {}
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            self.digests = self._work() or {}
        except BaseException as error:  # raised again by Saver.settle, in the loop
            self.error = error
        self._work = dict  # what was copied to host memory is free again
        self.done.set()

    def finish(self) -> None:
        """Wait for it; afterwards there is no thread."""
        self.done.wait()
        if self.ident is not None:
            self.join()


class Saver:
    """Saves checkpoints of one run. ``newest``: the last one that stands."""

    def __init__(
        self, folder: Path, cfg: LoopConfig, world: World, note: Callable[[str], None] = lambda said: None
    ) -> None:
        self.folder, self.cfg, self.world, self._note = folder, cfg, world, note
        self.newest: Path | None = None
        self._writer: _Writer | None = None
        cut = cfg.checkpoint_format == "sharded" or (cfg.checkpoint_format == "auto" and cfg.sharding != "none")
        self._sharded = cut and world.size > 1

    @property
    def writing(self) -> bool:
        """Whether this rank is writing just now."""
        return self._writer is not None and not self._writer.done.is_set()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write."""
        return self._writer is not None and self._writer.error is not None

    def save(self, step: int, parts: Parts, facts: Mapping[str, Any], candidate: Best | None = None) -> None:
        """Begin a checkpoint of ``parts``, which may change as soon as this returns. Called by all ranks."""
        began = time.perf_counter()
        self.settle()
        waited = time.perf_counter() - began
        if waited > LONG:
            self._note(f"step {step} waited {waited:.1f} s for the previous checkpoint; raise loop.checkpoint_every")
        place = checkpoint.Place(self.folder, step, self.cfg.keep_checkpoints, candidate)
        work = self._own_shard(place, parts) if self._sharded else self._all_of_it(place, parts, facts)
        self._writer = _Writer(place, facts, work)
        if self.cfg.checkpoint_async:
            self._writer.start()
        else:
            self._writer.run()
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint stands, or raise why it does not. Called by all ranks; nothing to do is quick."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        writer.finish()
        told = self.world.collect([writer.digests, str(writer.error) if writer.error else None])
        if writer.error is not None:
            raise writer.error
        for _, failure in told:
            if failure is not None:
                raise OtherRankError(failure)
        if self._sharded:
            digests = {name: digest for own, _ in told for name, digest in own.items()}
            facts, layout = writer.facts, checkpoint.SHARDED
            self.world.on_first(lambda: str(checkpoint.commit(writer.place, digests, facts, layout)))
        self.newest = writer.place.final

    def stands(self) -> str:
        """Which checkpoint a failure leaves."""
        writer, newest = self._writer, self.newest
        if writer is not None and writer.done.is_set() and writer.error is None and not self._sharded:
            newest = writer.place.final
        return f"The last good checkpoint is {newest}." if newest else "There is no checkpoint yet."

    def last_words(self) -> str:
        """``stands``, after waiting at most LAST_WAIT seconds for a checkpoint that this rank can finish alone."""
        writer = self._writer
        if writer is not None and not self._sharded:
            writer.done.wait(LAST_WAIT)
        return self.stands()

    def close(self) -> None:
        """However the run ended: this rank finishes its files, and says if it could not."""
        if self._writer is None:
            return
        self._writer.finish()
        if self._writer.error is not None:
            self._note(str(self._writer.error))

    def _all_of_it(self, place: checkpoint.Place, parts: Parts, facts: Mapping[str, Any]) -> Callable[[], Any]:
        """Rank 0 gets the tensors without their sharding, one after the other, and writes them."""
        whole: dict[str, dict[str, Tensor]] = {}
        for part, named in parts.items():
            for name, tensor in named.items():
                own = self.world.whole(tensor.detach())
                if self.world.first:
                    whole.setdefault(part, {})[name] = self._host(own)
        if not self.world.first:
            return dict
        folder, step, keep = place.folder, place.step, place.keep

        def work() -> None:
            checkpoint.save(folder, step, whole, facts, keep, place.candidate)

        return work

    def _own_shard(self, place: checkpoint.Place, parts: Parts) -> Callable[[], Any]:
        """Every rank writes the pieces that it holds; of what several hold, the first one writes it."""
        self.world.on_first(lambda: checkpoint.begin(place))
        own: dict[str, Tensor] = {}
        offsets: dict[str, tuple[int, ...]] = {}
        for part, named in parts.items():
            for name, tensor in named.items():
                piece = self.world.piece(tensor.detach())
                if piece is not None:
                    own[f"{part}/{name}"], offsets[f"{part}/{name}"] = self._host(piece[0]), piece[1]
        name, header = shard_name(self.world.rank_info.rank, self.world.size), offsets_header(offsets)
        return lambda: checkpoint.write(place, name, own, header) if own else {}

    def _host(self, tensor: Tensor) -> Tensor:
        """In host memory; a copy where the loop will go on changing it meanwhile."""
        return tensor.to("cpu", copy=self.cfg.checkpoint_async)
