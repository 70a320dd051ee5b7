"""Export round trips: the stock pipelines generate the trainer's images from the same noise."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import tiny_pipelines as tiny
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file
from stock_pipelines import UNIFORM, noises_of, stock_images, student_of, trainers_images

from gdmd.cli.app import FILTERED_LOGGERS, _should_log
from gdmd.config.image_source import read_source
from gdmd.config.model import LoraFile
from gdmd.config.run import RunConfig
from gdmd.export.card import model_card
from gdmd.export.front_matter import base_id, base_license
from gdmd.export.lora import KOHYA_FILE, check_fits, merge, save_lora
from gdmd.export.pipeline import call_arguments, save_merged, student_scheduler
from gdmd.export.student import student_pipeline
from gdmd.models.loading import open_family
from gdmd.models.lora_location import DIFFUSERS_FILE
from gdmd.models.roles import DiffusersRoles
from gdmd.programs.export import _check_kind, validation_at
from gdmd.runs.run_folder import TRAINED_BEFORE, create
from gdmd.sources.base import image_slots
from gdmd.sources.open import open_source
from gdmd.types import StudentSampler


@pytest.mark.parametrize("sampler", ["renoise", "ode"])
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "flux2", "z_image", "sana", "krea2", "qwen_image21"])
def test_stock_pipeline_with_the_lora(
    folders: Path, tmp_path: Path, name: str, sampler: StudentSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = student_of(folders, name)
    noises = noises_of(roles)
    wanted = trainers_images(roles, noises, sampler=sampler)
    files = save_lora(roles.family, roles.parameters("student"), tmp_path)
    assert [file.name for file in files] == [DIFFUSERS_FILE, *([KOHYA_FILE] if name in ("sd15", "sdxl") else [])]
    student_scheduler(roles.family, UNIFORM, sampler).save_pretrained(tmp_path / "scheduler")
    pipe = type(roles.family.pipe).from_pretrained(folders / name)
    plain = stock_images(pipe, roles, noises, monkeypatch) if name == "sd3" else None
    kind = getattr(diffusers, roles.family.student_scheduler(sampler))
    pipe.scheduler = kind.from_pretrained(tmp_path, subfolder="scheduler")
    pipe.load_lora_weights(tmp_path, weight_name=DIFFUSERS_FILE)
    assert torch.allclose(stock_images(pipe, roles, noises, monkeypatch), wanted, atol=1e-4)
    assert plain is None or not torch.allclose(plain, wanted, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("sdxl", "none"),
        ("qwen_image", "none"),
        ("qwen_image21", "student"),
        ("sana", "none"),
        ("flux2_klein", "student"),
    ],
)
def test_merged_pipeline(folders: Path, tmp_path: Path, name: str, full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = student_of(folders, name, full)
    noises = noises_of(roles)
    wanted = trainers_images(roles, noises)
    fresh = open_family(roles.family.cfg)
    save_merged(fresh, roles.parameters("student"), UNIFORM, tmp_path / "merged")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert torch.allclose(stock_images(pipe, roles, noises, monkeypatch), wanted, atol=1e-4)


def test_norms_of_krea2_stay_in_fp32(folders: Path, tmp_path: Path) -> None:
    """As diffusers keeps them in any pipeline: it adds 1 to these weights, which bf16 would round."""
    folder, roles = tiny.saved(folders, "krea2"), student_of(folders, "krea2", "student")
    weights = {name: value.detach() for name, value in roles.parameters("student").items()}
    family = open_family(tiny.config(folder, dtype="bf16", full="student"))
    pipe = student_pipeline(family, weights, UNIFORM)
    save_merged(open_family(family.cfg), weights, UNIFORM, tmp_path / "merged", torch.bfloat16)
    merged = type(pipe).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    for net in (pipe.transformer, merged.transformer):
        found = dict(net.named_parameters())
        assert torch.equal(found["transformer_blocks.0.norm1.weight"], weights["transformer_blocks.0.norm1.weight"])
        assert found["transformer_blocks.0.attn.to_q.weight"].dtype == torch.bfloat16


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    """It is refused before the pipeline is loaded."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cube\n")
    with pytest.raises(ValueError, match=r"prompts.txt is a file, not a folder; choose another folder with --out"):
        _check_kind(file, whole=False)


def test_share_undone_by_rounding(folders: Path) -> None:
    roles = student_of(folders, "sd3")
    family = open_family(tiny.config(folders / "sd3", dtype="bf16"))
    layer = "transformer_blocks.0.attn.to_q"
    target = family.net.get_parameter(f"{layer}.weight")
    with torch.no_grad():
        target.fill_(1.0)  # its neighbors in bf16 are 1 - 2^-8 and 1 + 2^-7
    down, up = torch.zeros(2, target.shape[1]), torch.zeros(len(target), 2)
    down[0, 0] = 0.5  # alpha / rank = 2
    up[:4, 0] = torch.tensor([2**-7, 2**-10, -(2**-10), 2**-5])
    weights = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    assert merge(family, weights) == 0.5
    assert target[:4, 0].tolist() == [1 + 2**-7, 1.0, 1.0, 1 + 2**-5] and target.dtype == torch.bfloat16
    wide = open_family(tiny.config(folders / "sd3", dtype="bf16"))
    wide.net.get_parameter(f"{layer}.weight").data.fill_(1.0)
    assert merge(wide, weights, torch.float32) == 0.0
    assert wide.net.get_parameter(f"{layer}.weight")[:4, 0].tolist() == [1 + 2**-7, 1 + 2**-10, 1 - 2**-10, 1 + 2**-5]
    assert merge(roles.family, {}) == 0.0


@pytest.mark.parametrize(("name", "full"), [("sdxl", "none"), ("sd3", "student")])
def test_base_of_another_model_is_an_error(folders: Path, name: str, full: str) -> None:
    weights = student_of(folders, "sd3", full).parameters("student")
    check_fits(open_family(tiny.config(folders / "sd3", full=full)), weights)
    other = open_family(tiny.config(folders / name, full=full))
    if name == "sd3":
        weights = {key: value for key, value in weights.items() if "proj_out" not in key}
    with pytest.raises(ValueError, match="is not the base of this student: .* layers are missing on one side"):
        check_fits(other, weights)


def test_kohya_file_has_the_same_deltas(folders: Path, tmp_path: Path) -> None:
    roles = student_of(folders, "sdxl")
    save_lora(roles.family, roles.parameters("student"), tmp_path)
    kohya = load_file(tmp_path / KOHYA_FILE)
    net, before = open_family(roles.family.cfg), open_family(roles.family.cfg).net.state_dict()
    merge(net, roles.parameters("student"))
    for layer, weights in net.net.state_dict().items():
        key = "lora_unet_" + layer.removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_up.weight" not in kohya:
            assert torch.equal(weights, before[layer])
            continue
        up, down = kohya[f"{key}.lora_up.weight"], kohya[f"{key}.lora_down.weight"]
        scale = kohya[f"{key}.alpha"].item() / len(down)
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weights.shape)
        assert torch.allclose(weights - before[layer], scale * delta, atol=1e-5), layer
    assert len(kohya) == 3 * len(roles.parameters("student")) / 2


def test_card_pins_revision_and_variant(folders: Path) -> None:
    roles = student_of(folders, "sd15")
    for pinned, wanted in (
        ({}, ").to"),
        ({"revision": "c0ffee", "variant": "fp16"}, ", revision='c0ffee', variant='fp16')"),
    ):
        roles.family.cfg = roles.family.cfg.model_copy(update=pinned)
        cfg = RunConfig(name="x", model=roles.family.cfg, loop={}, rewards=[{"kind": "clip"}])
        card = model_card(cfg, roles.family, call_arguments(roles.family, UNIFORM), {}, merged=False)
        assert f'StableDiffusionPipeline.from_pretrained("{folders / "sd15"}", dtype=torch.float32{wanted}' in card


@pytest.mark.parametrize(("trained", "given", "wanted"), [("bf16", "fp32", "float32"), ("bf16", None, "bfloat16")])
def test_cards_code_keeps_the_precision_of_the_export(
    folders: Path, trained: str, given: str | None, wanted: str
) -> None:
    """Loaded in bf16, a pipeline that was merged in fp32 loses the small changes that fp32 keeps."""
    family = student_of(folders, "sd15").family
    family.cfg = family.cfg.model_copy(update={"dtype": trained})
    cfg = RunConfig(name="x", model=family.cfg, loop={}, rewards=[{"kind": "clip"}])
    card = model_card(cfg, family, call_arguments(family, UNIFORM), {}, merged=True, dtype=given)
    assert f'from_pretrained("THIS_FOLDER", dtype=torch.{wanted}).to("cuda")' in card


def test_cards_command_and_base_model(folders: Path) -> None:
    family = student_of(folders, "sd15").family
    cfg = RunConfig(name="x", model=family.cfg, loop={}, rewards=[{"kind": "clip"}])
    facts = {"command": ["/some/where/gdmd/__main__.py", "train", "sd15_gdmd", "rewards=[{kind: clip}]"]}
    card = model_card(cfg, family, {}, facts, merged=False)
    assert "```sh\ngdmd train sd15_gdmd 'rewards=[{kind: clip}]'\n```" in card and "some/where" not in card
    assert (
        "base_model" not in ModelCard(card).data.to_dict()
        and "`base_model`: the hub id of sd15; `license`: that of sd15" in card
    )


def test_card_of_a_lora_with_others_in_it_names_the_version_that_reads_it(folders: Path) -> None:
    """Before 0.42, diffusers took the rank of one layer as the alpha of all: a layer of another rank got another scale."""
    family = student_of(folders, "sd15").family
    cfg = RunConfig(name="x", model=family.cfg, loop={}, rewards=[{"kind": "clip"}])
    style = LoraFile(path="style.safetensors")
    family.cfg = family.cfg.model_copy(update={"teacher_loras": (style,)})
    family.encoder.loras = ({},)
    said = "may have several ranks, which needs diffusers 0.42 or later"
    assert said in model_card(cfg, family, {}, {}, merged=False)
    assert said not in model_card(cfg, family, {}, {}, merged=True)
    assert said not in model_card(cfg, family, {}, {}, merged=False, separate=(style,))


@pytest.mark.parametrize(("full", "merged"), [("none", False), ("none", True), ("student", True)])
def test_cards_metadata(folders: Path, full: str, merged: bool) -> None:
    """A merged pipeline is not an adapter: the Hub would show code that loads a missing LoRA."""
    family = student_of(folders, "sd15").family
    model = family.cfg.model_copy(update={"path": "some-body/some-model", "full": full})
    cfg = RunConfig(name="x", model=model, method={"kind": "dmd"}, loop={}, rewards=[])
    terms = {"license": "other", "license_name": "theirs: v1", "license_link": "https://example.org"}
    images = "images/step_000040.png"
    facts = {"step": 7, "validation": {"clip": (0.25, None)}}
    card = model_card(cfg, family, {}, facts, merged=merged, license=terms, samples=images, where="me/student")
    read = ModelCard(card)
    assert isinstance(read.data, ModelCardData) and read.data.to_dict() == {
        "base_model": "some-body/some-model",
        "base_model_relation": "finetune" if merged else "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", *([] if merged else ["lora", "template:sd-lora"])]
        + ["few-step", "distillation", "gdmd", "dmd"],
        **terms,
        "widget": [{"text": "samples after 40 iterations", "output": {"url": images}}],
    }
    assert f"![samples]({images})" in card and "Complete before publishing" not in card and "THIS_FOLDER" not in card
    assert "| clip | 0.2500 | - | unseen |" in card
    assert "| iterations | 7 |\n| student updates | 7 |" in card  # of the checkpoint, not of the recipe


def test_a_remote_reward_is_not_unseen_on_the_card(folders: Path) -> None:
    """In the log it is called remote_clip."""
    family = student_of(folders, "sd15").family
    rewards = [{"kind": "remote", "url": "http://127.0.0.1:1", "reward": "clip"}]
    cfg = RunConfig(name="x", model=family.cfg, method={"kind": "gdmd"}, loop={}, rewards=rewards)
    facts = {"validation": {"remote_clip": (0.25, 0.2), "clip": (0.3, 0.2), "hps": (0.4, 0.3)}}
    card = model_card(cfg, family, {}, facts, merged=False)
    for name, seen in (("remote_clip", "trained on"), ("clip", "trained on"), ("hps", "unseen")):
        assert re.search(rf"\| {name} \| 0.*\| {seen} \|", card), name
    card = model_card(cfg, family, {}, {**facts, TRAINED_BEFORE: ["hps"]}, merged=False)
    assert re.search(r"\| hps \| 0.*\| trained on \|", card) and "| reward model | hps |" in card
    assert "| rewards of earlier runs | hps |" in card


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ("---\nlicense: mit\ntags: [x]\n---\n# Base", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE.md\n---\n",
            {"license": "other", "license_name": "own"}
            | {"license_link": "https://huggingface.co/org/base/blob/main/LICENSE.md"},
        ),
        ("---\ntags: [x]\n---\n", {}),
        ("# no metadata", {}),
        ("---\nlicense: [\n---\n", {}),
        (None, {}),
    ],
)
def test_license_of_the_base_model(tmp_path: Path, card: str | None, wanted: dict[str, str]) -> None:
    base = tmp_path / "models--org--base" / "snapshots" / "0123"
    base.mkdir(parents=True)
    if card:
        (base / "README.md").write_text(card)
    model = tiny.config(base)
    assert base_license(model) == wanted and base_id(model) == "org/base"


def run_card(card: str, folder: Path) -> Any:
    """The pipeline of a card's lines of use, which plain diffusers executes on the CPU, the call included."""
    code = card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(folder))
    names: dict[str, Any] = {}
    exec(code.replace('.to("cuda")', "").replace("bfloat16", "float32"), names)
    assert names["image"].size == (tiny.SIZE, tiny.SIZE)
    return names["pipe"]


def exported(folders: Path, target: Path, name: str, *, merged: bool, **changes: Any) -> tuple[Any, str]:
    """A family and its card, exported as ``gdmd export`` does."""
    roles = DiffusersRoles(open_family(tiny.config(folders / name, max_tokens=128, **changes)))
    family = open_family(roles.family.cfg, extras=merged)
    cfg = RunConfig(name="tiny", model=family.cfg, method={"kind": "dmd", "fake_updates": 1}, loop={}, rewards=[])
    card = model_card(cfg, family, call_arguments(family, UNIFORM), {}, merged=merged)
    if merged:
        save_merged(family, roles.parameters("student"), UNIFORM, target)
    else:
        save_lora(roles.family, roles.parameters("student"), target)
        student_scheduler(family, UNIFORM).save_pretrained(target / "scheduler")
    return family, card


@pytest.mark.parametrize(("lacks", "merged"), [("setting", False), ("folder", True), ("index", False)])
def test_card_of_sd3_without_t5_runs(folders: Path, tmp_path: Path, lacks: str, merged: bool) -> None:
    """T5 is left out by model.t5, its folders were deleted, or the base was saved without it."""
    shutil.copytree(tiny.saved(folders, "sd3"), tmp_path / "base")
    for part in ("text_encoder_3", "tokenizer_3"):
        if lacks == "folder":
            shutil.rmtree(tmp_path / "base" / part)
    if lacks == "index":
        without = {"text_encoder_3": None, "tokenizer_3": None}
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "base", **without)
        shutil.rmtree(tmp_path / "base")
        pipe.save_pretrained(tmp_path / "base")
    changes = {"t5": False} if lacks == "setting" else {}
    _, card = exported(tmp_path, tmp_path / "export", "base", merged=merged, **changes)
    pipe = run_card(card, tmp_path / "export")
    assert pipe.text_encoder_3 is None and pipe.text_encoder is not None
    again: Any = open_source(read_source(f"{tmp_path / ('export' if merged else 'base')},dtype=fp32,device=cpu"))
    assert again.pipe.text_encoder is not None and (lacks == "setting" and not merged) != (
        again.pipe.text_encoder_3 is None
    )


@pytest.mark.parametrize(("lacks", "merged"), [("", True), ("", False), ("feature_extractor", False)])
def test_safety_checker_is_exported_but_not_used(
    folders: Path, tmp_path: Path, lacks: str, merged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save_with_checker(tmp_path / "base")
    if lacks:
        shutil.rmtree(tmp_path / "base" / lacks)
    _, card = exported(tmp_path, tmp_path / "export", "base", merged=merged)
    pipe = run_card(card, tmp_path / "export")
    assert (pipe.safety_checker is None) == bool(lacks) == ("black image" not in card)
    if lacks:
        return
    arguments = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "pt"}
    assert not pipe("a dog", **arguments).images.any()  # what plain diffusers makes of a flagged image
    for folder in [tmp_path / "base", *([tmp_path / "export"] if merged else [])]:
        caplog.clear()
        source = open_source(read_source(f"{folder},steps=1,height=32,width=32,dtype=fp32,device=cpu"))
        (image,) = source.generate(image_slots(["a dog"], 1), 0)
        assert max(high for _, high in image.getextrema()) > 0
        assert caplog.text.count("the safety checker of") == 1


def test_training_loads_no_safety_checker(tmp_path: Path) -> None:
    tiny.save_with_checker(tmp_path / "base")
    assert open_family(tiny.config(tmp_path / "base")).pipe.safety_checker is None


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("self.text_encoder_3=None of type <class 'NoneType'> cannot be saved.", False),
        ("No LoRA keys associated to CLIPTextModel found with the prefix='text_encoder'.", False),
        ("self.vae=3 of type <class 'int'> cannot be saved.", True),
    ],
)
def test_expected_warnings_of_libraries_are_filtered(message: str, kept: bool) -> None:
    record = logging.LogRecord("diffusers.pipelines.pipeline_utils", logging.WARNING, "", 0, message, None, None)
    assert record.name in FILTERED_LOGGERS and _should_log(record) == kept


def test_cards_code_loads_the_lora_without_warnings(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    roles = student_of(folders, "sd3")
    noises = noises_of(roles)
    save_lora(roles.family, roles.parameters("student"), tmp_path)
    student_scheduler(roles.family, UNIFORM).save_pretrained(tmp_path / "scheduler")
    cfg = RunConfig(name="x", model=roles.family.cfg, loop={}, rewards=[{"kind": "clip"}])
    card = model_card(cfg, roles.family, {}, {}, merged=False)
    lines = card.partition("```python\n")[2].partition("image =")[0]
    names: dict[str, Any] = {}
    lines = lines.replace("THIS_FOLDER", str(tmp_path)).replace("bfloat16", "float32").replace('.to("cuda")', "")
    exec(lines, names)  # noqa: S102
    wanted = trainers_images(roles, noises)
    assert torch.allclose(stock_images(names["pipe"], roles, noises, monkeypatch), wanted, atol=1e-4)
    assert not caplog.text


def test_validation_scores_of_a_card_are_those_of_the_same_prompts(tmp_path: Path) -> None:
    """The teacher's images are drawn again when the prompts change: its later scores are not those of an earlier step."""
    run = create(tmp_path / "run", {}, ["gdmd"])
    run.log(0, {"validation/clip": 0.1, "validation/teacher/clip": 0.5, "validation/teacher/hps": float("nan")})
    run.log(5, {"validation/clip": 0.2, "validation/hps": 0.3})
    run.log(10, {"validation/clip": 0.7, "validation/teacher/clip": 0.9})
    assert validation_at(run.path, 5) == {"clip": (0.2, 0.5), "hps": (0.3, None)}
    assert validation_at(run.path, 10) == {"clip": (0.7, 0.9)}
