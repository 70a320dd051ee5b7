"""Speed and memory of SDXL and SD3-Medium at their true size, with random weights: nothing is downloaded.

    python benchmarks/real_size.py                               # every setting, some minutes on an H100 or H200
    python benchmarks/real_size.py --only sdxl/1024 --seconds 500
    python benchmarks/real_size.py --only sd3/512 --tiny FOLDER    # the configs of a pipeline folder instead, also on a CPU

For each model, resolution and setting (micro-batch, activation checkpointing, model.compile, tiny decoder), a GDMD run with
adapters in bf16 trains a few iterations. Reported: peak memory, images/s, TFLOP/s by counted FLOP and as a share of the
GPU's measured bf16 matrix rate, the overhead of ``gdmd profile``, and the estimate of ``gdmd plan``. Prompts are random
embeddings of full length; the reward is the brightness of the image (a real one adds its own time). The JSON file is
written after every setting, so an interrupted run keeps its results, and settings in the file are not measured again. On a
CPU the FLOP omit fused attention, which PyTorch counts on a GPU only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.run import RunConfig
from gdmd.data.prompts import PromptStream
from gdmd.models.roles import DiffusersRoles
from gdmd.models.vae import VaeCodec
from gdmd.plan.cost_model import GPUS, Gpu
from gdmd.plan.estimate import plan
from gdmd.plan.meta_pipeline import meta_decoder, meta_family
from gdmd.profiling.profiler import Profiler, measure
from gdmd.recipes.build import Components, LatentSpec, method_of
from gdmd.recipes.read import read_recipe
from gdmd.rewards.callable import CallableReward
from gdmd.types import Cond

RECIPES = {"sdxl": "sdxl_gdmd", "sd3": "sd3_gdmd"}
WORDS = ["one", "two", "three", "four"]
TAESD = "madebyollin/taesd"
"""The tiny decoder is built with its published shape; nothing is downloaded."""


@dataclass(frozen=True)
class Setting:
    """One measurement."""

    model: str
    side: int
    micro: int = 1
    batch: int = 4
    checkpointing: bool = True
    compiled: bool = False
    tiny_decoder: bool = False

    @property
    def name(self) -> str:
        """MODEL/SIDE/micro-MICRO+options, unique."""
        options = [
            ("checkpointing", self.checkpointing),
            ("compiled", self.compiled),
            ("tiny-decoder", self.tiny_decoder),
        ]
        return f"{self.model}/{self.side}/" + "+".join([f"micro-{self.micro}", *(word for word, on in options if on)])


def settings() -> Iterator[Setting]:
    """All measurements, the 24 GB targets first."""
    for model in RECIPES:
        for side in (1024, 512):
            yield Setting(model, side)
            yield Setting(model, side, checkpointing=False)
            yield Setting(model, side, tiny_decoder=True)
            yield Setting(model, side, checkpointing=False, compiled=True, tiny_decoder=True)
            for micro in (2, 4, 8):
                yield Setting(model, side, micro=micro, batch=2 * micro, tiny_decoder=True, checkpointing=micro > 2)


class RandomText:
    """Random embeddings of the right shapes instead of text encoders."""

    def __init__(self, blank: Cond, device: str) -> None:
        self.blank, self.device = blank, device

    def encode(self, texts: Sequence[str]) -> Cond:
        """Random numbers; ones for integers (masks)."""
        ones = self.null(len(texts))
        return {name: torch.randn_like(v) if v.is_floating_point() else v for name, v in ones.items()}

    def null(self, count: int) -> Cond:
        """Ones of the same shapes."""
        sizes = {name: (count, *value.shape[1:]) for name, value in self.blank.items()}
        return {name: torch.ones(sizes[name], dtype=v.dtype, device=self.device) for name, v in self.blank.items()}


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward: the mean of the image."""
    return images.mean((1, 2, 3))


def recipe_of(setting: Setting, tiny: Path | None) -> RunConfig:
    """The shipped GDMD recipe of the model with this setting; ``tiny`` replaces the model by a pipeline folder."""
    own = [f"model.height={setting.side}", f"model.width={setting.side}", "model.embeddings=null"]
    own += [f"model.checkpointing={setting.checkpointing}", f"model.compile={setting.compiled}".lower()]
    own += [f"loop.batch_size={setting.batch}", f"loop.micro_batch={setting.micro}", "loop.precision=bf16"]
    own += ["rewards=[{kind: callable, target: 'benchmarks.real_size:brightness'}]"]
    own += [f"model.scoring_decoder={TAESD}"] if setting.tiny_decoder else []
    own += ["model.dtype=bf16"]
    if tiny is not None:
        own += [f"model.path={tiny}", "model.lora_rank=2", "model.dtype=fp32", "loop.precision=fp32"]
    return read_recipe(RECIPES[setting.model], own)


def randomized(net: nn.Module, device: str) -> nn.Module:
    """A network of the meta device, with random weights on ``device`` that are small enough to stay finite in bf16."""
    net.to_empty(device=device)
    with torch.no_grad():
        _fill(net)
    return net


def _fill(net: nn.Module) -> None:
    for weights in (*net.parameters(), *net.buffers()):
        if weights.is_floating_point():
            nn.init.normal_(weights, std=0.02)
        else:
            weights.zero_()


def components_of(cfg: RunConfig, device: str) -> Components:
    """The components of a recipe with random weights of the published sizes."""
    model: Any = cfg.model
    family = meta_family(model).family
    pipe: Any = family.pipe
    for part in (family.net, pipe.vae):
        randomized(part, device)
    roles = DiffusersRoles(family, half=cfg.loop.precision == "bf16")
    codec: Any = family.codec
    if model.scoring_decoder is not None:
        codec = VaeCodec(randomized(meta_decoder(model, family.latent_channels), device), model.decode_chunk)
    own = cfg.method.model_copy(update={"student_steps": family.student_times(cfg.method.student_steps)})
    encoder = RandomText(family.blank_text(1), device)
    reward = CallableReward(brightness, "brightness")
    place = LatentSpec(family.latent_shape, family.native)
    method = method_of(own, roles, codec, (reward,), place, None)
    stream = PromptStream([WORDS], encoder, cfg.loop.batch_size, cfg.loop.seed)
    return Components(roles, family.codec, encoder, (reward,), method, stream, family.latent_shape, own.student_steps)


def matrix_rate(device: str, seconds: float = 1.0) -> float:
    """TFLOP/s of a large bf16 matrix product on this device: the upper limit for a network."""
    side = 8192 if device == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    _wait(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            a @ b
        _wait(device)
        done += 10
    return 2 * side**3 * done / (time.perf_counter() - began) / 1e12


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(setting: Setting, tiny: Path | None, device: str, rate: float, iterations: int) -> dict[str, Any]:
    """One entry of the JSON: the measurement, and the plan of the same recipe."""
    cfg = recipe_of(setting, tiny)
    profiler = Profiler(cfg, components_of(cfg, device))
    result = measure(profiler, iterations)
    estimate = plan(cfg, gpu_here(device), 0.4)
    kept = ("images_per_s", "iteration_s", "section_s", "overhead", "passes_per_update", "expected_passes_per_update")
    tflops = result["flop_per_s"] / 1e12
    return {name: result[name] for name in (*kept, "scoring_share", "host_syncs_per_iteration", "host_syncs_at")} | {
        "peak_gib": result["peak_memory_mib"] / 1024,
        "tflop_per_s": tflops,
        "share_of_matrix_rate": tflops / rate,
        "planned_gib": estimate.cost.total(setting.batch) / 2**30,
        "planned_tflop": sum(estimate.cost.flop.values()) * setting.batch / 1e12,
        "measured_tflop": tflops * result["iteration_s"],
        "source": estimate.source,
    }


def gpu_here(device: str) -> Gpu:
    """The data sheet of this GPU; the H100's for an unknown one."""
    name = torch.cuda.get_device_name().lower() if device == "cuda" else ""
    return next((gpu for key, gpu in GPUS.items() if key in name), GPUS["h100"])


def line_of(name: str, line: dict[str, Any]) -> str:
    """One line of text for a setting."""
    if "error" in line:
        return f"{name:60s} {line['error']}"
    return (
        f"{name:60s} {line['peak_gib']:6.1f} GiB (plan {line['planned_gib']:.1f})  {line['images_per_s']:.3g} images/s  "
        f"{line['tflop_per_s']:.3g} TFLOP/s = {line['share_of_matrix_rate']:.0%}  overhead {line['overhead']:.3f}"
    )


def attempt(setting: Setting, tiny: Path | None, device: str, rate: float, iterations: int) -> dict[str, Any]:
    """``measured``, or the error: a setting that does not fit must not stop the others."""
    try:
        return measured(setting, tiny, device, rate, iterations)
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).splitlines()[0][:120]}"}
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen settings; returns 0, or 2 if none matched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PREFIX", help="settings with this prefix, such as sdxl/1024")
    parser.add_argument(
        "--tiny", type=Path, metavar="FOLDER", help="configs of this pipeline instead of the published ones"
    )
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new setting after this time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real_size.json"))
    options = parser.parse_args(arguments)
    chosen = [setting for setting in settings() if setting.name.startswith(options.only)]
    if not chosen:
        print(f"--only {options.only}: no setting starts with this; known are {', '.join(s.name for s in settings())}")
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate, began = matrix_rate(device, 1.0 if device == "cuda" else 0.05), time.perf_counter()
    found = json.loads(options.out.read_text()) if options.out.is_file() else {"settings": {}}
    found |= {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "torch": torch.__version__}
    found["matrix_tflop_per_s"] = rate
    for setting in chosen:
        if setting.name in found["settings"] or time.perf_counter() - began > options.seconds:
            continue
        found["settings"][setting.name] = attempt(setting, options.tiny, device, rate, options.iterations)
        print(line_of(setting.name, found["settings"][setting.name]), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
