"""Draw the images of an exported LoRA as a user of diffusers would: ``python plain_diffusers.py EXPORT CALL.json IMAGES``.

It imports nothing from gdmd, so its images show what the exported files are worth without this library.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler

SCHEDULERS = {"FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler, "LCMScheduler": LCMScheduler}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEEDS = 1_000_000
"""More seeds than an evaluation uses, so that evaluations with other seeds have other noise."""


def main(export: Path, call_file: Path, images: Path) -> None:
    """Write IMAGES/00000.png, ...: the images of each caption of the call, one seed each.

    FlowMatchEulerDiscreteScheduler re-noises from the global generator, so it is seeded for each caption, too.
    """
    info = json.loads((export / "gdmd_export.json").read_text())
    call = json.loads(call_file.read_text())
    left_out = dict.fromkeys(info["without"])
    pipe = DiffusionPipeline.from_pretrained(call["base"], dtype=DTYPES[info["dtype"]], **left_out)  # type: ignore[no-untyped-call]
    pipe.load_lora_weights(export, weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = SCHEDULERS[info["scheduler"]].from_pretrained(export / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    images.mkdir(parents=True, exist_ok=True)
    count, first = call["images"], call["seed"] * SEEDS
    for number, caption in enumerate(call["captions"]):
        places = range(number * count, (number + 1) * count)
        noise = [torch.Generator().manual_seed(first + place) for place in places]
        torch.manual_seed(first + len(call["captions"]) * count + number)
        drawn = pipe(prompt=caption, num_images_per_prompt=count, generator=noise, **info["arguments"]).images
        for place, image in zip(places, drawn, strict=True):
            image.save(images / f"{place:05d}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
