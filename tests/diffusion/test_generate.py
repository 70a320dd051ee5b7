"""Image generation for evaluations: one image, one noise; speeds measured alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from gdmd.diffusion.generate import (
    Sampler,
    generate,
    images_of,
    student_sampler,
    teacher_sampler,
)
from gdmd.diffusion.sampling import times
from gdmd.reporting.grids import draw_grid, same_noise_cells, write_grid
from gdmd.shapes.networks import ShapesDit, ShapesVae
from gdmd.shapes.roles import LATENT_SHAPE, ShapesCodec, ShapesRoles, ShapesTextEncoder

STEPS = (1.0, 0.75, 0.5, 0.25)
TEXTS = ("a red circle", "two rings", "a blue square", "a cross", "three diamonds")


@dataclass(frozen=True)
class TinyLab:
    roles: ShapesRoles
    codec: ShapesCodec
    encoder: ShapesTextEncoder
    latent_shape: tuple[int, int, int] = LATENT_SHAPE
    teacher_times: Callable[[int], Tensor] = times


@pytest.fixture(scope="module")
def components() -> TinyLab:
    torch.manual_seed(3)
    net = ShapesDit(width=16, depth=1, heads=2)
    for weight in net.parameters():  # a fresh DiT returns 0 and ignores the caption
        nn.init.normal_(weight, std=0.2)
    return TinyLab(ShapesRoles(net), ShapesCodec(ShapesVae(16)), ShapesTextEncoder())


def student_images(
    components: TinyLab, texts: Sequence[str], seed: int, steps: Sequence[float], batch: int = 64
) -> Tensor:
    return images_of(student_sampler(components, components.roles.student, steps), components, texts, seed, batch)


def teacher_images(
    components: TinyLab, texts: Sequence[str], seed: int, ode_steps: int, guidance: float, batch: int = 64
) -> Tensor:
    return images_of(teacher_sampler(components, ode_steps, guidance), components, texts, seed, batch)


def test_an_image_is_the_same_whatever_the_batch_size(components: TinyLab) -> None:
    whole = student_images(components, TEXTS, 1, STEPS)
    assert torch.allclose(whole, student_images(components, TEXTS, 1, STEPS, batch=2), atol=1e-4)
    guided = teacher_images(components, TEXTS, 1, 3, 5.0)
    assert torch.allclose(
        guided, teacher_images(components, TEXTS, 1, 3, 5.0, batch=3), atol=1e-4
    )  # a fortieth of an 8-bit level


def test_an_image_keeps_its_noise_when_other_captions_change(components: TinyLab) -> None:
    one = student_images(components, TEXTS, 1, STEPS)
    other = student_images(components, ("a ring", *TEXTS[1:]), 1, STEPS)
    assert torch.allclose(one[1:], other[1:], atol=1e-5)
    assert not torch.allclose(one[0], other[0], atol=1e-5)


def test_images_of_one_caption_and_of_two_seeds_differ(components: TinyLab) -> None:
    twice = student_images(components, ("a ring", "a ring"), 1, STEPS)
    assert not torch.allclose(twice[0], twice[1], atol=1e-3)
    assert not torch.allclose(twice, student_images(components, ("a ring", "a ring"), 2, STEPS), atol=1e-3)


def test_teacher_and_student_start_from_the_same_noise(components: TinyLab) -> None:
    """With one step both predict x0 from the noise itself, and here they are the same network."""
    student = student_images(components, TEXTS, 4, (1.0,))
    assert torch.allclose(student, teacher_images(components, TEXTS, 4, 1, 1.0), atol=1e-5)


def test_the_two_passes_of_guidance_are_counted(components: TinyLab) -> None:
    assert teacher_sampler(components, 50, 5.0).nfe == 100
    assert teacher_sampler(components, 50, 1.0).nfe == 50
    assert student_sampler(components, components.roles.student, STEPS).nfe == 4


def test_images_are_in_range(components: TinyLab) -> None:
    images = student_images(components, TEXTS, 1, STEPS)
    assert images.shape == (5, 3, 32, 32)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    assert not images.requires_grad


def test_the_first_call_is_not_timed_and_every_image_is_made_once(
    components: TinyLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake clock: the sampler takes 100 s on its first call and 2 s later; batches of 2 decode in no time."""
    clock, calls = [0.0], []
    monkeypatch.setattr("gdmd.diffusion.generate.time.perf_counter", lambda: clock[0])

    def latents(texts: tuple[str, ...], rng: object) -> torch.Tensor:
        clock[0] += 2.0 if calls else 100.0
        calls.append(len(texts))
        return torch.zeros(len(texts), *LATENT_SHAPE)

    made = generate(Sampler("slow", 1, latents), components, TEXTS, 0, batch=2)
    assert calls[1:] == [2, 2, 1]
    assert made.images_per_s == pytest.approx(1.0)
    assert made.images_per_s_decoded == pytest.approx(1.0)
    assert len(made.images) == len(made.latents) == 5


def test_timed_images_are_the_untimed_ones(components: TinyLab) -> None:
    sampler = student_sampler(components, components.roles.student, STEPS)
    assert torch.equal(generate(sampler, components, TEXTS, 1).images, images_of(sampler, components, TEXTS, 1))


def test_every_batch_leaves_the_device_before_the_next_one_is_sampled(
    components: TinyLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of a long list of prompts do not fit into the memory of a GPU."""
    events: list[str] = []

    class OnDevice(Tensor):
        def cpu(self) -> Tensor:  # type: ignore[override]
            events.append("copied")
            return self.as_subclass(Tensor)

    def latents(texts: tuple[str, ...], rng: object) -> Tensor:
        events.append("sampled")
        return torch.zeros(len(texts), *LATENT_SHAPE)

    monkeypatch.setattr(
        ShapesCodec, "decode", lambda codec, given: torch.zeros(len(given), 3, 32, 32).as_subclass(OnDevice)
    )
    generate(Sampler("plain", 1, latents), components, TEXTS, 0, batch=2)
    assert events[1:] == ["sampled", "copied"] * 3


def test_no_captions_is_an_error(components: TinyLab) -> None:
    with pytest.raises(ValueError, match="no captions"):
        images_of(student_sampler(components, components.roles.student, STEPS), components, (), 1)


@pytest.mark.parametrize("sizes", [((8, 8), (8, 8)), ((6, 10), (6, 10)), ((12, 5), (4, 9))])
def test_a_grid_shows_every_cell_enlarged_and_unchanged(tmp_path, sizes) -> None:
    from PIL import Image

    cells = [[torch.rand(3, *size) for _ in range(4)] for size in sizes]
    path = write_grid(tmp_path / "new" / "grid.png", cells, ["a ring", "two crosses"], ["teacher", "student"])
    drawn = torch.tensor(list(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
    width, height = Image.open(path).size
    drawn = drawn.view(height, width, 3)
    for image in (image for row in cells for image in row):
        wanted = (image * 255).round().byte().repeat_interleave(3, -1).repeat_interleave(3, -2)
        windows = drawn.unfold(0, wanted.shape[1], 1).unfold(1, wanted.shape[2], 1)  # [H', W', 3, h, w]
        assert (windows == wanted).flatten(2).all(-1).sum() == 1


def test_a_grid_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="one caption per row"):
        draw_grid(torch.rand(2, 4, 3, 8, 8), ["a ring"])
    with pytest.raises(ValueError, match="equal spans"):
        draw_grid(torch.rand(1, 4, 3, 8, 8), ["a ring"], ["a", "b", "c"])


def test_long_captions_are_wrapped() -> None:
    """A caption is never wider than its column."""
    cells = torch.rand(1, 1, 3, 64, 64)
    short, long, blocks, none = (
        draw_grid(cells, [text], scale=1) for text in ("a ring", "a word or\ntwo " * 100, "\u7ea2" * 500, "")
    )
    assert short.width < long.width < 500 and blocks.width < 1000 and none.width < short.width
    assert short.height == long.height == blocks.height == none.height


def test_long_headers_are_wrapped_above_their_images() -> None:
    cells = torch.rand(1, 4, 3, 64, 64)
    short, long = (
        draw_grid(cells, ["a ring"], [text] * 2, scale=1) for text in ("teacher", "teacher, 28 guided steps")
    )
    assert short.width == long.width and short.height < long.height


def test_the_teacher_is_sampled_at_the_times_of_its_own_shift(components: TinyLab) -> None:
    asked: list[int] = []

    def shifted(steps: int) -> Tensor:
        asked.append(steps)
        return times(steps) ** 0.5

    plain, own = (
        teacher_images(one, TEXTS, 1, 3, 1.0) for one in (components, replace(components, teacher_times=shifted))
    )
    assert asked == [3] and not torch.allclose(plain, own, atol=1e-3)


def test_comparison_grid(components: TinyLab) -> None:
    """Samplers side by side, from the same noise."""
    samplers = [teacher_sampler(components, 1, 1.0), student_sampler(components, components.roles.student, (1.0,))]
    cells = same_noise_cells(samplers, components, TEXTS[:3], 4, per_caption=2)
    assert cells.shape == (3, 4, 3, 32, 32)
    assert torch.allclose(cells[:, :2], cells[:, 2:], atol=1e-5)
    assert torch.allclose(cells[1, 1], teacher_images(components, [TEXTS[1]] * 4, 4, 1, 1.0)[3], atol=1e-5)
