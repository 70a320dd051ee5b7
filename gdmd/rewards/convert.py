"""Convert third-party files of reward models to safetensors with transformers' names, once.

A .pt file is read with ``weights_only=True``, so nothing in it can run code. A missing or unexpected key is an error, and
tests compare the converted networks with independent implementations of the originals.

  hps, hps_v2   open_clip ViT-H/14 {"state_dict": ...}       -> a folder of ``transformers.CLIPModel``
  imagereward   {"blip.visual_encoder...", "blip.text_encoder...", "mlp.layers..."} -> towers.json + model.safetensors
  aesthetic     {"layers.0.weight", ...}                     -> model.safetensors
  hpsv3         {"visual...", "model...", "rm_head..."}      -> a folder of ``transformers.Qwen2VLModel`` + head.safetensors
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.io import file_hash, follow_umask
from gdmd.rewards.aesthetic import linear_head
from gdmd.rewards.hpsv3 import CONFIG, preference_head
from gdmd.rewards.weights import (
    CONVERTED,
    WeightsLocation,
    cache_dir,
    locate_weights,
    pretrained_weights,
    raw_tokenizer,
)

Tensors = dict[str, Tensor]
_BOTH = ("weight", "bias")
_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CLIP_REST = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' spelling
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
_BLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_UNUSED = re.compile(r"(blip\.(vision_proj|text_proj)\.|.*position_ids$|attn_mask$)")
"""Buffers and projections that do not affect the score."""


def read_published(path: Path) -> Tensors:
    """The tensors of a .safetensors or .pt file, on the CPU. ValueError for a file with anything but tensors."""
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file; get it with gdmd rewards fetch")
    if path.suffix != ".safetensors":
        return _read_pt(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {path} cannot be read: {str(error)[:200]}; fetch them again") from error


def _read_pt(path: Path) -> Tensors:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"weights {path} cannot be read as tensors only: {str(error)[:200]}; fetch it again"
        ) from error
    except Exception as error:  # UnpicklingError of a foreign object: its class is in the pickle module
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(
            f"weights {path} contain objects that are not tensors and could run code; refused. Use the published file"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"weights {path} are not a dictionary of tensors; give the file that the authors publish")
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def clip_from_open_clip(tensors: Mapping[str, Tensor]) -> Tensors:
    """open_clip's CLIP (text tower at the top level, image tower "visual") -> ``transformers.CLIPModel``."""
    remaining = _Remaining(tensors)
    named: Tensors = {}
    for theirs, ours in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for layer in range(remaining.layers(f"{theirs}.resblocks")):
            source, target = f"{theirs}.resblocks.{layer}", f"{ours}.encoder.layers.{layer}"
            for kind in _BOTH:
                parts = remaining.take(f"{source}.attn.in_proj_{kind}").chunk(3)
                for letter, part in zip("qkv", parts, strict=True):
                    named[f"{target}.self_attn.{letter}_proj.{kind}"] = part
            remaining.rename(named, source, target, _BLOCK)
    remaining.rename(named, "", "", _CLIP_REST)
    named["visual_projection.weight"] = remaining.take("visual.proj").T
    named["text_projection.weight"] = remaining.take("text_projection").T
    remaining.finish("an open_clip CLIP")
    return named


def clip_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The ``CLIPConfig`` that fits the shapes of converted tensors; exact GELU and 16 heads, as in ViT-H/14."""
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    words = tensors["text_model.embeddings.token_embedding.weight"]
    positions = tensors["vision_model.embeddings.position_embedding.weight"]
    side = round((len(positions) - 1) ** 0.5)

    def tower(name: str, width: int) -> dict[str, Any]:
        layers = {key.split(".")[3] for key in tensors if key.startswith(f"{name}.encoder.layers.")}
        inner = len(tensors[f"{name}.encoder.layers.0.mlp.fc1.weight"])
        return {
            "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers),
            "num_attention_heads": 16, "hidden_act": "gelu",
        }  # fmt: skip

    text = tower("text_model", words.shape[1]) | {
        "vocab_size": len(words),
        "max_position_embeddings": len(tensors["text_model.embeddings.position_embedding.weight"]),
        "bos_token_id": len(words) - 2,
        "eos_token_id": len(words) - 1,
    }
    vision = tower("vision_model", patch.shape[0]) | {
        "patch_size": patch.shape[-1],
        "image_size": side * patch.shape[-1],
    }
    return {"projection_dim": len(tensors["text_projection.weight"]), "text_config": text, "vision_config": vision}


def imagereward_from_blip(tensors: Mapping[str, Tensor]) -> Tensors:
    """ImageReward.pt -> vision.*, text.* (``ImageRewardTowers``) and mlp.* (``linear_head``)."""
    remaining = _Remaining(tensors)
    visual = "blip.visual_encoder"
    named: Tensors = {
        "vision.embeddings.class_embedding": remaining.take(f"{visual}.cls_token"),
        "vision.embeddings.position_embedding": remaining.take(f"{visual}.pos_embed"),
    }
    remaining.rename(
        named, visual, "vision", {"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"}
    )
    for layer in range(remaining.layers(f"{visual}.blocks")):
        remaining.rename(named, f"{visual}.blocks.{layer}", f"vision.encoder.layers.{layer}", _BLIP_BLOCK)
    for theirs, ours in (("blip.text_encoder.", "text."), ("mlp.layers.", "mlp.")):
        for key in remaining.under(theirs):
            named[ours + key.removeprefix(theirs)] = remaining.take(key)
    remaining.finish("ImageReward")
    return named


def aesthetic_from_layers(tensors: Mapping[str, Tensor]) -> Tensors:
    """layers.N.weight -> N.weight, as in ``linear_head``."""
    remaining = _Remaining(tensors)
    named = {key.removeprefix("layers."): remaining.take(key) for key in remaining.under("layers.")}
    remaining.finish("the aesthetic predictor")
    width = named["0.weight"].shape[1] if "0.weight" in named else 0
    want = {key: value.shape for key, value in linear_head(width or 1).state_dict().items()}
    if want != {key: value.shape for key, value in named.items()}:
        raise ValueError("these layers are not D-1024-128-64-16-1; give sac+logos+ava1-l14-linearMSE.pth")
    return named


_QWEN2_VL = {
    "model.visual.": "visual.",
    "model.language_model.": "language_model.",
    "visual.": "visual.",
    "model.": "language_model.",
    "rm_head.": "rm_head.",
}
"""Prefixes of HPSv3's tensors, under the names of transformers from 4.52 on and before, and those of ``Qwen2VLModel``."""


def hpsv3_from_qwen(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensors:
    """HPSv3.safetensors -> ``transformers.Qwen2VLModel`` with this config, and rm_head.* (``preference_head``).

    The head that predicts tokens (lm_head) is left out: no score depends on it.
    """
    from transformers import Qwen2VLConfig, Qwen2VLModel

    remaining = _Remaining(tensors)
    remaining.take("lm_head.weight")
    named: Tensors = {}
    for theirs, ours in _QWEN2_VL.items():
        for key in remaining.under(theirs):
            named[ours + key.removeprefix(theirs)] = remaining.take(key)
    remaining.finish("HPSv3")
    with torch.device("meta"):
        wanted = Qwen2VLModel(Qwen2VLConfig(**config)).state_dict()
        head = preference_head(config["text_config"]["hidden_size"]).state_dict()
    wanted |= {f"rm_head.{key}": value for key, value in head.items()}
    wrong = named.keys() ^ wanted.keys() | {
        key for key in named if key in wanted and named[key].shape != wanted[key].shape
    }
    if wrong:
        raise ValueError(
            f"these weights are not HPSv3: {len(wrong)} tensors are missing, unknown or of another shape, such as "
            f"{sorted(wrong)[:4]}; give the file that the authors publish"
        )
    return named


class _Remaining:
    """The tensors that are not converted yet."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {key: value for key, value in tensors.items() if not _UNUSED.match(key)}

    def take(self, key: str) -> Tensor:
        if key not in self._tensors:
            raise ValueError(f"these weights have no {key!r}; give the file that the authors publish")
        return self._tensors.pop(key)

    def rename(self, named: Tensors, source: str, target: str, table: Mapping[str, str]) -> None:
        """Take all entries of the table: tensors, or layers with weight and bias."""
        for theirs, ours in table.items():
            alone = _dotted(source, theirs)
            for end in ("",) if alone in self._tensors else _BOTH:
                named[_dotted(target, ours, end)] = self.take(_dotted(alone, end))

    def layers(self, prefix: str) -> int:
        numbers = {int(key[len(prefix) + 1 :].split(".")[0]) for key in self.under(prefix + ".")}
        return len(numbers)

    def under(self, prefix: str) -> list[str]:
        return [key for key in self._tensors if key.startswith(prefix)]

    def finish(self, what: str) -> None:
        if self._tensors:
            raise ValueError(f"these weights are not {what}: unexpected keys {sorted(self._tensors)[:4]}")


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def convert(
    kind: str, source: Path, folder: Path | None = None, tokenizer: str | None = None, revision: str | None = None
) -> Path:
    """Convert a published file; returns the folder, ready for ``from_pretrained``.

    tokenizer: folder or hub id of the tokenizer that is copied into it; default: the published one, pinned. revision: the
    commit that the file was downloaded from, if that is known; it is recorded.
    ValueError for a reward that needs no conversion, an unsafe or unknown file, and a folder that is not empty.
    """
    known = pretrained_weights(kind)
    if not known.converted:
        raise ValueError(f"reward {kind} is published as safetensors and needs no conversion; use it by its id")
    folder = folder or cache_dir() / kind
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder with --out")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give another folder with --out, or remove it")
    tensors = read_published(source)
    files: dict[str, Any] = {}
    if kind == "imagereward":
        from gdmd.rewards.imagereward import TEXT, VISION

        tensors, files = imagereward_from_blip(tensors), {"towers.json": {"vision": VISION, "text": TEXT}}
    elif kind == "aesthetic":
        tensors = aesthetic_from_layers(tensors)
    elif kind == "hpsv3":
        tensors = hpsv3_from_qwen(tensors, CONFIG)
        files = {"config.json": CONFIG}
    else:
        tensors = clip_from_open_clip(tensors)
        files = {"config.json": clip_config(tensors) | {"model_type": "clip", "architectures": ["CLIPModel"]}}
    files[CONVERTED] = {
        "reward": kind,
        "file": source.name,
        "sha256": file_hash(source),
        "published": known.weights.name,
        "revision": revision,
    }
    location = locate_weights(tokenizer, None, known.tokenizer) if known.tokenizer else None
    _write(folder, tensors, files, location)
    return folder


def _write(whole: Path, tensors: Tensors, files: Mapping[str, Any], tokenizer: WeightsLocation | None) -> None:
    """Write the tokenizer first (its download may fail); the folder appears once it is complete.

    A head on a backbone that ``from_pretrained`` loads (rm_head) is written to a separate file.
    """
    from safetensors.torch import save_file

    folder = whole.absolute().with_name(f".{whole.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if tokenizer is not None:
        raw_tokenizer(tokenizer).save_pretrained(str(folder))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    head = {key.removeprefix("rm_head."): tensors.pop(key) for key in list(tensors) if key.startswith("rm_head.")}
    for name, own in (("model.safetensors", tensors), ("head.safetensors", head)):
        if own:
            save_file({key: _alone(value) for key, value in own.items()}, folder / name, metadata={"format": "pt"})
            follow_umask(folder / name)
    folder.replace(whole)  # an empty folder may be there


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without others in its storage; copied only if necessary, since HPSv3 has 16 GB."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.contiguous().clone()
