"""Images for ``gdmd study plan`` from Shapes runs and the Shapes teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gdmd.config.image_source import SourceConfig
from gdmd.recipes.run_folders import TEACHERS, config_of
from gdmd.sources.folders import image_file, read_images, write_image, write_metadata

Prompts = Sequence[tuple[str, str]]
"""(text, task) of each prompt."""


PER_TASK = 10
"""Default of ``per_task``."""


def draw_models(
    named: Mapping[str, Path], per_task: int | None, count: int, seed: int, temporary: Path
) -> dict[str, Path]:
    """One image folder per model: existing folders as they are, runs and teachers sampled into ``temporary``.

    The prompts are those of the first existing folder, else ``per_task`` of each task of the fixed evaluation set.
    Image j of prompt i starts from the same noise for every model. ValueError for a run on other prompts than Shapes
    captions, and for ``per_task`` with an existing folder.
    """
    models = [name for name, path in named.items() if _draws(path)]
    for name in models:
        if str(named[name]) not in TEACHERS and not config_of(named[name]).shapes_world:
            raise ValueError(
                f"{name} was not trained on Shapes captions, and its images take long to generate: do that first with "
                f"gdmd eval preference {named[name]} --prompts FILE, and give {name}={named[name] / 'preference' / 'images'}"
            )
    given = [path for name, path in named.items() if name not in models]
    if given and per_task is not None:
        raise ValueError(f"--per-task {per_task} has no effect: the prompts are those of {given[0]}; leave it out")
    prompts = (
        [(row.text, row.task) for row in read_images(given[0]).values()] if given else _captions(per_task or PER_TASK)
    )
    folders = dict(named)
    for number, name in enumerate(models):
        folders[name] = temporary / str(number)
        _draw(SourceConfig(name=name, where=str(named[name])), prompts, count, seed, folders[name])
    return folders


def _draws(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (str(path) in TEACHERS and not path.exists())


def _captions(per_task: int) -> Prompts:
    from gdmd.shapes.grammar import TASKS, catalog, fixed_rows

    captions = catalog().texts(fixed_rows("eval", per_task))
    return [(text, TASKS[number // per_task]) for number, text in enumerate(captions)]


def _draw(cfg: SourceConfig, prompts: Prompts, count: int, seed: int, folder: Path) -> None:
    from gdmd.sources.draw import images_of_source
    from gdmd.sources.open import open_source

    source, texts = open_source(cfg), [text for text, _ in prompts]
    source.check(texts)
    images = images_of_source(source, texts, count, seed)
    for number, (text, task) in enumerate(prompts):
        write_metadata(folder, number, {"prompt": text, "tag": task})
        for k in range(count):
            write_image(image_file(folder, number, k), images[number * count + k])
