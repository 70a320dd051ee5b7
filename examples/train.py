"""Distill a small diffusers pipeline to four steps with a reward of your own: minutes on a laptop, no download.

    python examples/train.py
    python examples/train.py --steps 20 --output runs/quick

For a full-size model put its hub id in place of shapes:sdxl, its prompts in place of CAPTIONS, and rewards such as
``gdmd.rewards.PickScore()`` in place of "shapes_clip".
"""

import argparse
from pathlib import Path

from torch import Tensor

from gdmd import DistillationTrainer, TiltedGDMDConfig, TrainingConfig

CAPTIONS = [
    "a red circle and a blue ring",
    "a blue square",
    "a yellow triangle",
    "a square below a triangle",
]


def colorful(images: Tensor, prompts: list[str]) -> Tensor:
    """How far apart the channels of a pixel are: 0 for gray images. images [B, 3, H, W] in [0, 1] -> [B]"""
    return images.std(1).mean((1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/example"))
    options = parser.parse_args()

    trainer = DistillationTrainer(
        model="shapes:sdxl",
        method=TiltedGDMDConfig(student_steps=4, continuations=4),
        reward_funcs=["shapes_clip", colorful],
        train_dataset=CAPTIONS,
        args=TrainingConfig(output_dir=options.output, max_steps=options.steps, validation_steps=20),
    )
    trainer.train(resume_from_checkpoint=True)  # the same command continues an interrupted run
    trainer.save_lora(options.output / "lora")
    trainer.pipeline(CAPTIONS[0]).images[0].save(options.output / "image.png")


if __name__ == "__main__":
    main()
