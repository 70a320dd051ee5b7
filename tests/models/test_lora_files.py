"""Third-party LoRAs: every layer changes by alpha / rank B A of the file, or the file is an error."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from safetensors.torch import save_file
from torch import Tensor, nn

from gdmd.config.image_source import read_source
from gdmd.config.model import LoraFile
from gdmd.models.lora_files import ADAPTER, add_lora, check_stock_loading
from gdmd.models.lora_keys import denoiser_name

Deltas = dict[str, Tensor]
Tensors = tuple[dict[str, Tensor], Deltas]
"""A file's tensors, and what each COMPONENT.LAYER should change by."""


@pytest.fixture(scope="session")
def built() -> Callable[[str], Any]:
    def build(name: str) -> Any:
        torch.manual_seed(0)
        return tiny.BUILD[name]()

    return build


def layers(pipe: Any, *ends: str) -> dict[str, nn.Linear]:
    """COMPONENT.NAME -> layer of the denoiser and the text encoders."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name != "vae"}
    return {
        f"{component}.{name}": module
        for component, part in parts.items()
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ends)
    }


def pair(layer: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)


def changes(pipe: Any) -> Deltas:
    """What the loaded adapter adds to the weights of each layer."""
    found = {}
    for component, part in pipe.components.items():
        for name, module in part.named_modules() if isinstance(part, nn.Module) else ():
            if ADAPTER in getattr(module, "lora_A", {}):
                found[f"{component}.{name}"] = module.get_delta_weight(ADAPTER).detach()
    return found


def peft_keys(pipe: Any, ends: tuple[str, ...], text: bool = False) -> Tensors:
    """diffusers' own keys; rank 2 and 3 in turn, no alpha: scale 1."""
    tensors: dict[str, Tensor] = {}
    expected = {}
    for number, (name, layer) in enumerate(layers(pipe, *ends).items()):
        down, up = pair(layer, 2 + number % 2)
        if not text and name.startswith("text_encoder"):
            continue
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
        expected[name] = up @ down
    return tensors, expected


def kohya_keys(pipe: Any, ends: tuple[str, ...]) -> Tensors:
    """kohya's keys for the UNet and both text encoders; rank and alpha differ by layer."""
    tensors, expected = {}, {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for number, (name, layer) in enumerate(layers(pipe, *ends).items()):
        component, _, rest = name.partition(".")
        if component not in prefixes:
            continue
        rank, alpha = 1 + number % 3, (0.5, 1.0, 4.0)[number % 2]
        down, up = pair(layer, rank)
        text = "" if component == "unet" or rest.startswith("text_model.") else "text_model_"
        base = prefixes[component] + text + rest.replace(".", "_")
        tensors |= {
            f"{base}.lora_down.weight": down,
            f"{base}.lora_up.weight": up,
            f"{base}.alpha": torch.tensor(alpha),
        }
        expected[name] = alpha / rank * up @ down
    return tensors, expected


def peft_folder(pipe: Any, folder: Path, ends: tuple[str, ...], **settings: Any) -> Deltas:
    """Write a folder with PEFT's save_pretrained; return the changes of PEFT itself."""
    from peft import LoraConfig, get_peft_model

    net = pipe.components.get("unet") or pipe.transformer
    component = "unet" if "unet" in pipe.components else "transformer"
    kept = {name: weights.clone() for name, weights in net.state_dict().items()}
    wrapped: Any = get_peft_model(net, LoraConfig(r=4, target_modules=list(ends), **settings))
    with torch.no_grad():
        for name, weights in wrapped.named_parameters():
            if "lora_" in name:
                weights.normal_()
    wrapped.save_pretrained(folder)
    base = wrapped.base_model.model
    expected = {
        f"{component}.{name}": module.get_delta_weight("default").detach().clone()
        for name, module in base.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    wrapped.unload()
    assert net.state_dict().keys() == kept.keys()
    return expected


def load(pipe: Any, tensors: dict[str, Tensor], folder: Path, scale: float = 1.0, **options: Any) -> None:
    save_file(tensors, folder / "a.safetensors")
    add_lora(pipe, str(folder / "a.safetensors"), scale, **options)


def same(found: Deltas, expected: Mapping[str, Tensor]) -> bool:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:3]
    return all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("text", [False, True])
def test_diffusers_keys_change_their_layers(
    built: Callable[[str], Any], tmp_path: Path, text: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = built("sdxl")
    tensors, expected = peft_keys(pipe, ("attn1.to_q", "attn1.to_v", "q_proj"), text)
    load(pipe, tensors, tmp_path)
    assert same(changes(pipe), expected)
    assert ("text_encoder_2 2 of 2" in caplog.text) == text and "unet 8 of 8" in caplog.text


def test_kohya_keys_of_unet_and_text_encoders(built: Callable[[str], Any], tmp_path: Path) -> None:
    pipe = built("sdxl")
    tensors, expected = kohya_keys(pipe, ("to_q", "to_out.0", "q_proj", "out_proj", "fc1"))
    assert {name.partition(".")[0] for name in expected} == {"unet", "text_encoder", "text_encoder_2"}
    load(pipe, tensors, tmp_path, scale=0.5)
    assert same(changes(pipe), {name: 0.5 * delta for name, delta in expected.items()})


def test_kohya_keys_of_a_transformer(built: Callable[[str], Any], tmp_path: Path) -> None:
    pipe = built("flux")
    block = pipe.transformer.transformer_blocks[0].attn
    tensors, expected = {}, {}
    for side, name, layer, alpha in (
        ("img", "to_out.0", block.to_out[0], 1.0),
        ("txt", "to_add_out", block.to_add_out, 6.0),
    ):
        down, up = pair(layer, 2)
        base = f"lora_unet_double_blocks_0_{side}_attn_proj"
        tensors |= {
            f"{base}.lora_down.weight": down,
            f"{base}.lora_up.weight": up,
            f"{base}.alpha": torch.tensor(alpha),
        }
        expected[f"transformer.transformer_blocks.0.attn.{name}"] = alpha / 2 * up @ down
    load(pipe, tensors, tmp_path)
    assert same(changes(pipe), expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd3", {"lora_alpha": 3, "use_rslora": True, "init_lora_weights": "gaussian"}),
        ("sdxl", {"lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn1.to_q": 6, "to_q": 1}}),
        ("flux", {"lora_alpha": 16}),
        ("z_image", {"lora_alpha": 16}),
    ],
)
def test_peft_folder_equals_peft(
    built: Callable[[str], Any], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    expected = peft_folder(built(name), tmp_path / "adapter", ("to_q", "to_k"), **settings)
    for given in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        pipe = built(name)
        add_lora(pipe, str(given), 1.0)
        assert expected and same(changes(pipe), expected)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_what_the_stock_call_does_not_load(built: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    """We read PEFT's folders and ComfyUI's keys in every family; the code of a card has only ``load_lora_weights``."""
    peft_folder(built(name), tmp_path / "adapter", ("to_q", "to_k"), lora_alpha=3)
    pipe = built(name)
    tensors, _ = peft_keys(pipe, ("to_q",))
    component = denoiser_name(pipe)
    own = {key: value for key, value in tensors.items() if key.startswith(component)}
    save_file(own, tmp_path / "own.safetensors")
    check_stock_loading(pipe, LoraFile(path=str(tmp_path / "own.safetensors"), weight=0.7))
    assert not any("lora_" in key for key in getattr(pipe, component).state_dict()), "it is not kept"
    files = {"adapter": "such as .*to_[kq]"}
    if name == "sd3":
        comfy = {key.replace(component, "diffusion_model", 1): value for key, value in own.items()}
        save_file(comfy, tmp_path / "comfy.safetensors")
        save_file(own | {"transformer_blocks.0.attn.to_q.alpha": torch.ones(())}, tmp_path / "alpha.safetensors")
        files |= {"comfy.safetensors": "such as .*to_q", "alpha.safetensors": "cannot be loaded into"}
    for file, said in files.items():
        with pytest.raises(ValueError, match=f"{file}.*{said}.*Export without --no-loras"):
            check_stock_loading(built(name), LoraFile(path=str(tmp_path / file)))


FORMS: Mapping[str, Callable[[str, str], str]] = {
    "bare": lambda layer, part: f"{layer}.{part}",
    "ComfyUI": lambda layer, part: f"diffusion_model.{layer}.{part}",
    "diffusers": lambda layer, part: f"{{component}}.{layer}.{part}",
    "kohya": lambda layer, part: f"lora_unet_{layer.replace('.', '_')}.{part}",
    "PEFT's state_dict": lambda layer, part: f"{{component}}.{layer}.{part.replace('.', '.default.')}",
}
"""How programs write the key of a layer's part; {component} is unet or transformer."""


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("sdxl", form) for form in FORMS),
        *(("sd3", form) for form in FORMS),
        *((name, "kohya") for name in ("sd15", "flux", "flux2", "z_image", "qwen_image", "sana")),
        *(("flux", form) for form in ("bare", "ComfyUI")),
    ],
)
def test_key_formats_of_the_families(built: Callable[[str], Any], tmp_path: Path, name: str, form: str) -> None:
    """All linear layers and convolutions of a denoiser in fp16, with several ranks, and bf16 alphas if the form has them."""
    pipe = built(name)
    component = "unet" if "unet" in pipe.components else "transformer"
    alphas, tensors, expected = form != "PEFT's state_dict", {}, {}
    parts = ("lora_A", "lora_B") if form in ("diffusers", "PEFT's state_dict") else ("lora_down", "lora_up")
    for number, (layer, module) in enumerate(getattr(pipe, component).named_modules()):
        if not (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)):
            continue
        rank = 1 + number % 3
        down, up = torch.randn(rank, *module.weight.shape[1:]).half(), torch.randn(module.weight.shape[0], rank).half()
        shaped = up[..., None, None] if down.ndim == 4 else up
        own = {f"{parts[0]}.weight": down, f"{parts[1]}.weight": shaped}
        own |= {"alpha": torch.tensor(2.0, dtype=torch.bfloat16)} if alphas else {}
        tensors |= {FORMS[form](layer, part).format(component=component): value for part, value in own.items()}
        delta = (up.float() @ down.float().flatten(1)).reshape(module.weight.shape)
        expected[f"{component}.{layer}"] = delta * (2 / rank if alphas else 1)
    load(pipe, tensors, tmp_path)
    assert same(changes(pipe), expected)


def test_alpha_in_the_header(built: Callable[[str], Any], tmp_path: Path) -> None:
    """The header has the format of diffusers' ``save_lora_weights``."""
    pipe = built("sd3")
    own, expected = {}, {}
    for name, layer in layers(pipe, "attn.to_q").items():
        down, up = pair(layer, 2)
        bare = name.removeprefix("transformer.")
        own |= {f"{bare}.lora_A.weight": down, f"{bare}.lora_B.weight": up}
        expected[name] = 3 * up @ down
    header = {"r": 2, "lora_alpha": 6, "target_modules": ["attn.to_q"]}
    type(pipe).save_lora_weights(tmp_path, own, transformer_lora_adapter_metadata=header)
    add_lora(pipe, str(tmp_path), 1.0)
    assert same(changes(pipe), expected)


def flux_keys(pipe: Any, before: str, parts: tuple[str, str]) -> Tensors:
    """Keys of FLUX.1 with Black Forest Labs' names: q, k and v are one layer, and one layer is outside the blocks."""
    tensors, expected = {}, {}
    width, out = pipe.transformer.proj_out.in_features, pipe.transformer.proj_out.out_features
    heads = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
    for layer, rows in {
        **{f"double_blocks.0.{side}_attn.qkv": 3 * width for side in heads},
        "final_layer.linear": out,
    }.items():
        key = before + (layer.replace(".", "_") if before.endswith("_") else layer)
        down, up = torch.randn(2, width), torch.randn(rows, 2)
        tensors |= {f"{key}.{parts[0]}.weight": down, f"{key}.{parts[1]}.weight": up}
        split = heads.get(layer.split(".")[-2].removesuffix("_attn"), ())
        for name, part in zip(split, up.chunk(3), strict=bool(split)):
            expected[f"transformer.transformer_blocks.0.attn.{name}"] = part @ down
        expected |= {} if split else {"transformer.proj_out": up @ down}
    return tensors, expected


@pytest.mark.parametrize(
    ("before", "parts"),
    [
        ("lora_unet_", ("lora_down", "lora_up")),
        ("diffusion_model.", ("lora_down", "lora_up")),
        ("diffusion_model.", ("lora_A", "lora_B")),
    ],
)
def test_black_forest_labs_names(
    built: Callable[[str], Any], tmp_path: Path, before: str, parts: tuple[str, str]
) -> None:
    pipe = built("flux")
    tensors, expected = flux_keys(pipe, before, parts)
    load(pipe, tensors, tmp_path)
    assert len(expected) == 7 and same(changes(pipe), expected)


def test_lost_layer_next_to_fused_ones(built: Callable[[str], Any], tmp_path: Path) -> None:
    pipe = built("flux")
    tensors, _ = flux_keys(pipe, "lora_unet_", ("lora_down", "lora_up"))
    other = "lora_te2_encoder_block_0_layer_0_SelfAttention_q"
    tensors |= {f"{other}.lora_down.weight": torch.ones(1, 4), f"{other}.lora_up.weight": torch.ones(4, 1)}
    with pytest.raises(ValueError, match=rf"7 of 7, 1 that diffusers does not convert\).*{other}"):
        load(pipe, tensors, tmp_path)


def test_fused_layer_with_its_parts(built: Callable[[str], Any], tmp_path: Path) -> None:
    """Some trainers of Z-Image write both."""
    pipe = built("z_image")
    width = pipe.transformer.layers[0].attention.to_q.in_features
    rows = {"to.q": width, "to.k": width, "to.v": width, "qkv": 3 * width, "to_out.0": width, "out": width}
    tensors = {}
    for layer, count in rows.items():
        base = f"diffusion_model.layers.0.attention.{layer}.lora"
        tensors |= {f"{base}.down.weight": torch.randn(2, width), f"{base}.up.weight": torch.randn(count, 2)}
    load(pipe, tensors, tmp_path)
    names = ("to_q", "to_k", "to_v", "to_out.0")
    assert changes(pipe).keys() == {f"transformer.layers.0.attention.{name}" for name in names}


def deeper_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but one layer renamed as those of a deeper network."""
    first = next(iter(tensors)).partition(".lora_")[0]
    return {k if k.startswith(first) else k.replace(".attn", ".deeper.attn"): v for k, v in tensors.items()}


def wider_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    last = [key for key in tensors if "lora_A" in key][-1]
    return tensors | {last: torch.cat([tensors[last], tensors[last]], 1)}


def third_text_encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {
        "layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1, 8),
        "layers.0.self_attn.q_proj.lora_B.weight": torch.ones(8, 1),
    }
    return tensors | {f"text_encoder_3.{key}": value for key, value in own.items()}


def other_adapter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(".weight", ".old.weight"): value.clone() for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (deeper_model, r"only 1 of its 8 layers are in a StableDiffusionXLPipeline \(unet 1 of 8\)"),
        (wider_model, "only 7 of its 8 layers"),
        (third_text_encoder, r"only 8 of its 9 layers .*unet 8 of 8, text_encoder_3 0 of 1"),
        (lambda tensors: dict(list(tensors.items())[1:]), "only 7 of its 8 layers"),
        (
            lambda tensors: {k.replace("unet.", "transformer."): v for k, v in tensors.items()},
            "0 of its 8 layers.*transformer",
        ),
        (lambda tensors: tensors | other_adapter(tensors), "holds several adapters"),
        (
            lambda tensors: tensors | {f"{next(iter(tensors)).split('.lora_')[0]}.alpha": torch.ones(2)},
            "alpha is not one number",
        ),
        *(
            (lambda tensors, key=key: tensors | {key: torch.ones(1)}, message)
            for key, message in (
                ("unet.x.dora_scale", r"holds DoRA \(unet.x.dora_scale\)"),
                ("lora_unet_x.hada_w1_a", "holds LoHa"),
                ("lora_unet_x.lokr_w1", "holds LoKr"),
                ("lora_unet_x.on_input", "holds IA3"),
                ("lora_unet_x.lora_mid.weight", "holds LoCon"),
                ("lora_unet_x.diff_b", "1 of its 17 keys are not those of a LoRA.*diff_b"),
            )
        ),
        (
            lambda tensors: {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in tensors.items()},
            "adapter_config.json is missing",
        ),
    ],
)
def test_files_that_do_not_fit_change_nothing(
    built: Callable[[str], Any], tmp_path: Path, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    pipe = built("sdxl")
    tensors, _ = peft_keys(pipe, ("attn1.to_q", "attn1.to_v"))
    with pytest.raises(ValueError, match=message):
        load(pipe, {k: v.contiguous() for k, v in spoil(tensors).items()}, tmp_path)
    assert not changes(pipe)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("spoil", [deeper_model, third_text_encoder])
def test_partial_file_on_request(
    built: Callable[[str], Any],
    tmp_path: Path,
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = built("sdxl")
    tensors, expected = peft_keys(pipe, ("attn1.to_q", "attn1.to_v"))
    spoiled = spoil(tensors)
    load(pipe, spoiled, tmp_path, partial=True)
    assert same(changes(pipe), {name: delta for name, delta in expected.items() if f"{name}.lora_A.weight" in spoiled})
    assert f"unet {len(changes(pipe))} of 8" in caplog.text
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="changes no layer"):
        foreign = {k.replace("unet.", "unet.x."): v for k, v in tensors.items()}
        load(built("sdxl"), foreign, tmp_path, partial=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "use_dora is on, and DoRA is not supported"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA, which is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only', which is not supported"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"something_new": {"on": 1}}, "something_new"),
    ],
)
def test_other_peft_adapters_are_refused(
    built: Callable[[str], Any], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    pipe = built("sd3")
    peft_folder(pipe, tmp_path, ("to_q",), lora_alpha=8)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changed))
    with pytest.raises(ValueError, match=message):
        add_lora(pipe, str(tmp_path), 1.0)


def test_folder_above_the_adapter(built: Callable[[str], Any], tmp_path: Path) -> None:
    pipe = built("sd3")
    peft_folder(pipe, tmp_path / "lora", ("to_q",), lora_alpha=8)
    with pytest.raises(ValueError, match=f"did you mean {tmp_path / 'lora'}"):
        add_lora(pipe, str(tmp_path), 1.0)


@pytest.mark.parametrize("setting", ["lora_scale=0.5", "lora_partial=true"])
def test_lora_settings_without_lora(setting: str) -> None:
    with pytest.raises(ValueError, match="without lora changes nothing"):
        read_source(f"x,{setting}")
    assert read_source("x,lora=y.safetensors,lora_partial=true").lora_partial is True
