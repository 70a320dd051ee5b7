"""LoRAs of denoiser and text encoders as model.teacher_loras: fused as diffusers does, keyed, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel, LoraFile
from gdmd.export.lora import save_lora
from gdmd.models.families.base import Family
from gdmd.models.loading import LazyTextEncoder, encoder_identity, open_family
from gdmd.models.lora_files import fuse_loras, lora_factors
from gdmd.models.lora_location import DIFFUSERS_FILE
from gdmd.models.student_start import open_start

CAPTIONS = list(tiny.WORDS[:2])
ENDS = ("to_q", "to_out.0", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, by name."""
    place = tmp_path_factory.mktemp("pipelines")

    def saved(name: str) -> Path:
        if not (place / name).exists():
            tiny.save(name, place / name)
        return place / name

    return saved


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The denoiser and the text encoders that diffusers loads a LoRA into."""
    return {name: getattr(pipe, name) for name in pipe._lora_loadable_modules}


def weights(pipe: Any) -> dict[str, Tensor]:
    parts = networks(pipe)
    return {f"{part}.{key}": value.clone() for part, net in parts.items() for key, value in net.state_dict().items()}


def layers(pipe: Any) -> dict[str, nn.Linear]:
    """COMPONENT.LAYER, the latter with text_model as in published files, -> its module."""
    return {
        f"{part}.{'text_model.' if name.startswith('encoder.') else ''}{name}": module
        for part, net in networks(pipe).items()
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ENDS)
    }


def drawn(
    pipe: Any, key: Callable[[str, str], str], alpha: Callable[[int], float | None]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random LoRA whose keys are key(LAYER, "down" | "up"), and the change alpha / rank B A of each layer."""
    tensors, changes = dict[str, Tensor](), dict[str, Tensor]()
    for number, (name, layer) in enumerate(layers(pipe).items()):
        rank, scale = 1 + number % 3, alpha(number)
        down = torch.randn(rank, layer.in_features) * layer.in_features**-0.5
        up = torch.randn(layer.out_features, rank) * 0.3
        tensors |= {key(name, "down"): down, key(name, "up"): up}
        if scale is not None:
            tensors[key(name, "down").rpartition(".lora_")[0] + ".alpha"] = torch.tensor(scale)
        changes[name] = (scale / rank if scale is not None else 1.0) * up @ down
    return tensors, changes


def peft(name: str, part: str) -> str:
    return f"{name}.lora_{'A' if part == 'down' else 'B'}.weight"


def kohya(name: str, part: str) -> str:
    component, _, layer = name.partition(".")
    return f"{KOHYA[component]}{layer.replace('.', '_')}.lora_{part}.weight"


def sd15_kohya(name: str, part: str) -> str:
    return kohya(name, part).replace("lora_te1_", "lora_te_")


def older(name: str, part: str) -> str:
    """Keys of diffusers before PEFT; of the text encoders only their linear layers have them."""
    if name.startswith("unet."):
        return peft(name, part)
    layer = name.replace("q_proj", "to_q_lora").replace("out_proj", "to_out_lora")
    return f"{layer}.{part}.weight" if "attn" in name else f"{layer}.lora_linear_layer.{part}.weight"


def fused(pipe: Any, file: Path, weight: float = 0.7) -> dict[str, Tensor]:
    fuse_loras(pipe, [lora_factors(pipe, LoraFile(path=str(file), weight=weight))])
    return weights(pipe)


def in_network(pipe: Any, name: str) -> str:
    """COMPONENT.LAYER.weight in the state_dict."""
    own = weights(pipe)
    return next(key for key in (f"{name}.weight", f"{name.replace('text_model.', '')}.weight") if key in own)


FORMS: Mapping[str, tuple[str, Callable[[str, str], str], Callable[[int], float | None]]] = {
    "SD1.5, kohya": ("sd15", sd15_kohya, lambda number: 2.0),
    "SD1.5, diffusers": ("sd15", peft, lambda number: None),
    "SDXL, kohya": ("sdxl", kohya, lambda number: 2.0),
    "SDXL, diffusers": ("sdxl", peft, lambda number: None),
    "SDXL, diffusers before PEFT": ("sdxl", older, lambda number: None),
    "SD3, diffusers": ("sd3", peft, lambda number: None),
    "FLUX.1, diffusers": ("flux", peft, lambda number: None),
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("form", FORMS)
def test_fused_as_by_diffusers(form: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    name, key, alpha = FORMS[form]
    ours, theirs = (open_family(tiny.config(folders(name))).pipe for _ in range(2))
    tensors, changes = drawn(ours, key, alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    before, found = weights(ours), fused(ours, tmp_path / "a.safetensors")
    theirs.load_lora_weights(str(tmp_path / "a.safetensors"))
    theirs.fuse_lora(theirs._lora_loadable_modules, lora_scale=0.7)
    theirs.unload_lora_weights()
    wanted = weights(theirs)
    assert {key: value for key, value in wanted.items() if not torch.allclose(found[key], value, atol=1e-5)} == {}
    own = {in_network(ours, layer): 0.7 * change for layer, change in changes.items()}
    assert {layer.partition(".")[0] for layer in own} == set(networks(ours))
    for layer, value in found.items():
        assert torch.allclose(value - before[layer], own.get(layer, torch.zeros(())), atol=1e-5), layer


def test_alpha_of_every_layer(folders: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = open_family(tiny.config(folders("sdxl"))).pipe
    tensors, changes = drawn(pipe, kohya, lambda number: (0.5, 1.0, 4.0)[number % 3])
    save_file(tensors, tmp_path / "a.safetensors")
    before, found = weights(pipe), fused(pipe, tmp_path / "a.safetensors", 1.0)
    for layer, change in changes.items():
        key = in_network(pipe, layer)
        assert torch.allclose(found[key] - before[key], change, atol=1e-5), layer


def test_alpha_in_the_header(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Diffusers' training scripts write one alpha for the UNet and one for each text encoder into it."""
    ours, theirs = (open_family(tiny.config(folders("sdxl"))).pipe for _ in range(2))
    alphas, given = {"unet": 4, "text_encoder": 6, "text_encoder_2": 8}, dict[str, Any]()
    tensors, _ = drawn(ours, peft, lambda number: None)
    tensors = {key: value[:1] if "lora_A" in key else value[:, :1] for key, value in tensors.items()}
    for part, alpha in alphas.items():
        own = {k.removeprefix(f"{part}."): v.contiguous() for k, v in tensors.items() if k.startswith(f"{part}.")}
        given |= {
            f"{part}_lora_layers": own,
            f"{part}_lora_adapter_metadata": {"r": 1, "lora_alpha": alpha, "target_modules": list(ENDS)},
        }
    type(ours).save_lora_weights(tmp_path, **given)
    before, found = weights(ours), fused(ours, tmp_path)
    theirs.load_lora_weights(str(tmp_path))
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    wanted = weights(theirs)
    assert all(torch.allclose(found[key], wanted[key], atol=1e-5) for key in wanted)
    for layer in layers(ours):
        key, part = in_network(ours, layer), layer.partition(".")[0]
        change = tensors[peft(layer, "up")] @ tensors[peft(layer, "down")]
        assert torch.allclose(found[key] - before[key], 0.7 * alphas[part] * change, atol=1e-5), layer


def lora(folders: Callable[[str], Path], file: Path, name: str = "sdxl", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    pipe = open_family(tiny.config(folders(name))).pipe
    save_file(drawn(pipe, peft, lambda number: None)[0], file)
    return file


def config(folder: Path, *loras: tuple[Path, float], **more: Any) -> DiffusersModel:
    return tiny.config(folder, teacher_loras=[{"path": str(file), "weight": weight} for file, weight in loras], **more)


def embedded(text: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = text.encode(CAPTIONS)
    return found


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_encoders_that_are_loaded_later(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Loaded late, as for model.embeddings, they give the same embeddings, which differ from the base model's."""
    cfg = config(folders(name), (lora(folders, tmp_path / "a.safetensors", name), 0.7))
    at_once, late = open_family(cfg), open_family(cfg, encoders=False)
    wanted, plain = embedded(at_once.encoder), embedded(open_family(tiny.config(folders(name))).encoder)
    text = LazyTextEncoder(late)
    for _ in range(2):  # unloaded and loaded again
        assert late.pipe.text_encoder is None
        found = embedded(text)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        text.unload()
        text = LazyTextEncoder(late)
    assert all(not torch.allclose(wanted[key], plain[key], atol=1e-3) for key in ("embeds", "pooled") if key in wanted)
    assert encoder_identity(late) == encoder_identity(at_once)


def test_embeddings_are_keyed_by_the_loras(folders: Callable[[str], Path], tmp_path: Path) -> None:
    one, other = (lora(folders, tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    moved = Path(shutil.copy(one, tmp_path / "moved.safetensors"))
    tensors = load_file(one)
    unet, text = (tmp_path / f"{part}.safetensors" for part in ("unet", "text_encoder"))
    for file in (unet, text):
        save_file({key: value for key, value in tensors.items() if key.startswith(file.stem)}, file)

    def key(*loras: tuple[Path, float]) -> str:
        return encoder_identity(open_family(config(folders("sdxl"), *loras), encoders=False))

    keys = [key(), key((one, 0.7)), key((one, 1.0)), key((other, 0.7)), key((one, 0.7), (other, 0.7))]
    assert len(set(keys)) == len(keys)
    assert key((moved, 0.7)) == key((one, 0.7)) and key((unet, 0.7)) == key() and key((text, 0.7)) == keys[1]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_exported_lora_has_the_text_encoders(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers adds it to the base pipeline and gets the fused pipeline with the student's adapter."""
    styles = [(lora(folders, tmp_path / f"{seed}.safetensors", name, seed), 0.7) for seed in (1, 2)]
    family, base = open_family(config(folders(name), *styles)), open_family(tiny.config(folders(name))).pipe
    net = next(iter(networks(base)))
    layer = next(key for key in layers(base) if key.startswith(net)).removeprefix(f"{net}.")
    linear: Any = family.net.get_submodule(layer)
    down, up = torch.randn(4, linear.in_features), 0.1 * torch.randn(linear.out_features, 4)
    student = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    save_lora(family, student, tmp_path / "export", family.cfg.teacher_loras)
    base.load_lora_weights(str(tmp_path / "export"), weight_name=DIFFUSERS_FILE)
    base.fuse_lora(base._lora_loadable_modules)
    base.unload_lora_weights()
    wanted, found = weights(family.pipe), weights(base)
    wanted[f"{net}.{layer}.weight"] += family.cfg.lora_alpha / family.cfg.lora_rank * up @ down
    assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in wanted.items())


def test_layer_that_does_not_fit(folders: Callable[[str], Path], tmp_path: Path) -> None:
    file = lora(folders, tmp_path / "a.safetensors")
    tensors = load_file(file)
    name = next(key for key in tensors if key.startswith("text_encoder_2") and "lora_A" in key)
    save_file(tensors | {name: torch.ones(len(tensors[name]), 3)}, file)
    cfg = config(folders("sdxl"), (file, 1.0))
    with pytest.raises(
        ValueError, match="layers are in a StableDiffusionXLPipeline.*missing or of another size: text_enc"
    ):
        open_family(cfg)
    late = open_family(cfg, encoders=False)
    with pytest.raises(ValueError, match=r"a LoRA changes text_encoder_2.*or has in another size; give a LoRA of this"):
        embedded(LazyTextEncoder(late))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("z_image", "text_encoder.model.layers.0.self_attn.q_proj"),
        ("z_image", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        ("sd3", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"),
        ("flux", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),
        ("sd3", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
    ],
)
def test_text_encoders_without_loras_in_diffusers(
    name: str, extra: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    file = lora(folders, tmp_path / "a.safetensors", name)
    more = {f"{extra}.lora_A.weight": torch.ones(1, 8), f"{extra}.lora_B.weight": torch.ones(8, 1)}
    save_file(load_file(file) | more, file)
    kind = type(open_family(tiny.config(folders(name))).pipe).__name__
    with pytest.raises(
        ValueError, match=rf"also changes text encoders \(1 layers, .*{extra}\).*not load .* into a {kind}"
    ):
        open_family(config(folders(name), (file, 1.0)))


def test_student_that_would_read_other_embeddings(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder, file = folders("sdxl"), lora(folders, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"model.student_lora .*also changes the text encoders .12 layers.*same embeddings"
    ):
        open_start(open_family(tiny.config(folder, student_lora={"path": str(file)})))
    with pytest.raises(
        ValueError, match=r"model.teacher_loras: .*also changes the text encoders.*leave model.student out"
    ):
        open_start(open_family(config(folder, (file, 1.0), student=str(folder))))


def test_student_lora_on_a_teacher_with_such_loras(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The text encoders of teacher and start are one object, which is changed once."""
    folder, file = folders("sdxl"), lora(folders, tmp_path / "a.safetensors")
    few = tmp_path / "few.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key.startswith("unet.")}, few)
    family: Family = open_family(config(folder, (file, 0.7), student_lora={"path": str(few)}))
    wanted = embedded(open_family(config(folder, (file, 0.7))).encoder)
    start = open_start(family)
    assert start.pipe.text_encoder is family.pipe.text_encoder
    assert all(torch.equal(value, wanted[key]) for key, value in embedded(start.encoder).items())
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    change = load_file(few)[f"{name}.lora_B.weight"] @ load_file(few)[f"{name}.lora_A.weight"]
    both = (one.pipe.unet.get_submodule(name.removeprefix("unet.")).weight for one in (start, family))
    assert torch.allclose(next(both) - next(both), change, atol=1e-5)
