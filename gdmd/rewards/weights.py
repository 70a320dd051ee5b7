"""Weights of the pretrained rewards: pinned hub ids, the cache of converted weights, and safe loading.

Only safetensors are read; a third-party .pt is converted once (``rewards.convert``). Loading from a local folder never
uses the network. No torch at import time: ``gdmd rewards list`` reads this file.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakValueDictionary

from gdmd.config.extras import install
from gdmd.config.names import near
from gdmd.diffusion.prompt_length import Reader
from gdmd.hub import hub_file, hub_reason, offline, unreachable
from gdmd.io import weights_fingerprint

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
CACHE_VARIABLE = "GDMD_REWARDS"
"""Environment variable with the folder of converted rewards; default ~/.cache/gdmd/rewards."""
CONFIG = "config.json"
"""Exists in every repository that a reward is loaded from."""
ADVICE = "check id, revision and network, or give a local folder as path"
CONVERTED = "converted.json"
"""The file in a converted folder that records the origin of its tensors."""


@dataclass(frozen=True)
class HubRepo:
    """A repository on a model hub at one commit; revision None: its default branch (not reproducible)."""

    name: str
    revision: str | None = None


@dataclass(frozen=True)
class PretrainedWeights:
    """The published weights of a reward model, and the range of its scores."""

    kind: str
    about: str
    range: str
    weights: HubRepo
    file: str = ""  # a third-party file to convert; "": loaded directly
    tokenizer: HubRepo | None = None
    reads: Literal["image and text", "image", "image and questions"] = "image and text"

    @property
    def converted(self) -> bool:
        """Whether the published file must be converted first."""
        return bool(self.file)


CLIP_L = HubRepo("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
CLIP_H = HubRepo("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
PICKSCORE = HubRepo("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
_HPS = HubRepo("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a")
_IMAGEREWARD = HubRepo("zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72")
BERT = HubRepo("google-bert/bert-base-uncased")
DETECTOR = HubRepo("facebook/mask2former-swin-small-coco-instance")
OCR = HubRepo("stepfun-ai/GOT-OCR-2.0-hf", "d3017ef2c2c1395888c8d635c5e0508bcb0ac78d")
_HPSV3 = HubRepo("MizzenAI/HPSv3", "4f81e3e09edd82fe3c5f636444c721b592a735ca")
QWEN2_VL = HubRepo("Qwen/Qwen2-VL-7B-Instruct", "eed13092ef92e448dd6875b2a00151bd3f7db0ac")
QWEN3_VL = HubRepo("Qwen/Qwen3-VL-8B-Instruct", "0c351dd01ed87e9c1b53cbc748cba10e6187ff3b")

PRETRAINED = (
    PretrainedWeights(
        "clip", "CLIPScore: cosine of CLIP ViT-L/14 (arXiv 2104.08718 without 2.5 max(., 0))", "[-1, 1]", CLIP_L
    ),
    PretrainedWeights(
        "hps",
        "HPSv2.1: cosine of a tuned ViT-H/14 (arXiv 2306.09341)",
        "[-1, 1]",
        _HPS,
        "HPS_v2.1_compressed.pt",
        CLIP_H,
    ),
    PretrainedWeights(
        "hps_v2", "HPSv2: the first weights of the same model", "[-1, 1]", _HPS, "HPS_v2_compressed.pt", CLIP_H
    ),
    PretrainedWeights(
        "pickscore",
        "PickScore v1: exp(logit_scale) x cosine (arXiv 2305.01569)",
        "about 15 to 27",
        PICKSCORE,
        tokenizer=CLIP_H,
    ),
    PretrainedWeights(
        "imagereward",
        "ImageReward v1: BLIP + MLP, standardized (arXiv 2304.05977)",
        "about -3 to 3",
        _IMAGEREWARD,
        "ImageReward.pt",
        BERT,
    ),
    PretrainedWeights(
        "aesthetic",
        "LAION aesthetic v2: linear layers on CLIP ViT-L/14 embeddings",
        "about 1 to 10",
        HubRepo("trl-lib/ddpo-aesthetic-predictor"),
        "aesthetic-model.pth",
        reads="image",
    ),
    PretrainedWeights(
        "hpsv3",
        "HPSv3: mean preference of a tuned Qwen2-VL-7B (arXiv 2508.03789)",
        "about -5 to 15",
        _HPSV3,
        "HPSv3.safetensors",
        QWEN2_VL,
    ),
    PretrainedWeights(
        "geneval2",
        "GenEval 2: Soft-TIFA, probabilities of right answers of Qwen3-VL-8B (arXiv 2512.16853)",
        "[0, 1]",
        QWEN3_VL,
        reads="image and questions",
    ),
    PretrainedWeights(
        "ocr",
        "OCR: max(0, 1 - edit distance / length) of the text quoted in the prompt (arXiv 2505.05470)",
        "[0, 1]",
        OCR,
    ),
)


def pretrained_weights(kind: str) -> PretrainedWeights:
    """The entry of a kind. ValueError that suggests known kinds for an unknown one."""
    known = {entry.kind: entry for entry in PRETRAINED}
    if kind in known:
        return known[kind]
    similar = near(kind, list(known))
    advice = f"did you mean '{similar[0]}'?" if similar else f"known rewards are {', '.join(known)}"
    raise ValueError(f"unknown reward {kind!r}; {advice}")


def cache_dir() -> Path:
    """The folder of converted rewards: $GDMD_REWARDS, else ~/.cache/gdmd/rewards."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "gdmd" / "rewards"


def converted_folder(kind: str, given: str | None) -> Path:
    """The folder of a converted reward. ValueError with the command that creates it if it does not exist."""
    folder = Path(given).expanduser() if given else cache_dir() / kind
    if (folder / "model.safetensors").is_file():
        return folder
    raise ValueError(
        f"reward {kind}: no converted weights in {folder} (model.safetensors is missing). Its authors publish another "
        f"format: run `gdmd rewards fetch {kind}`, which downloads and converts it (`gdmd rewards convert {kind} FILE` for "
        "a file that you already have), or give the folder as path"
    )


@dataclass(frozen=True)
class WeightsLocation:
    """A local folder, or a hub id at a revision."""

    name_or_path: str
    revision: str | None
    local: bool

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained``; no network for a local folder or an unreachable hub."""
        if self.local:
            return {"local_files_only": True}
        return {
            "revision": self.revision,
            "local_files_only": bool(unreachable(self.name_or_path, CONFIG, self.revision)),
        }

    def require(self) -> None:
        """ValueError, without retries, for a hub id that is neither cached nor can be downloaded."""
        if not self.local:
            _reading(self, lambda: hub_file(self.name_or_path, CONFIG, self.revision))


def locate_weights(given: str | None, revision: str | None, default: HubRepo) -> WeightsLocation:
    """The given folder or hub id, else the default at its pinned revision. ValueError for a missing folder."""
    if given is None:
        return WeightsLocation(default.name, revision or default.revision, local=False)
    folder = Path(given).expanduser()
    if folder.is_dir():
        return WeightsLocation(str(folder), None, local=True)
    if given.startswith((".", "/", "~")) or given.count("/") != 1 or "\\" in given or folder.exists():
        raise ValueError(
            f"{given} is not a folder with weights; give a folder in transformers' format or a hub id ORG/NAME"
        )
    pinned = default.revision if given == default.name else None
    return WeightsLocation(given, revision or pinned, local=False)


def weights_content(where: str, revision: str | None = None, variant: str | None = None) -> str:
    """Identity of weights: a hash of the content of a local folder or file, or ORG/NAME[/FILE]@COMMIT of the hub.

    A branch whose commit is not in the hub's cache gets a random identity, so that it never matches.
    """
    if Path(where).exists():
        return weights_fingerprint(Path(where), variant)
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return f"{where}@{revision}"
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository = repo_folder_name(repo_id="/".join(where.split("/")[:2]), repo_type="model")
    reference = Path(constants.HF_HUB_CACHE, repository, "refs", revision or "main")
    return f"{where}@{reference.read_text(encoding='utf-8').strip() if reference.is_file() else secrets.token_hex()}"


_shared: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()


def shared(key: tuple[object, ...], load: Callable[[], T]) -> T:
    """Load once per key, as long as somebody holds the result."""
    loaded = _shared.get(key)
    if loaded is None:
        loaded = load()
        _shared[key] = loaded
    return loaded


def load_clip(location: WeightsLocation, key: object) -> Any:
    """``transformers.CLIPModel``, shared by callers with the same location and key (the ``Placement``).

    ValueError for weights that cannot be read.
    """

    def load() -> Any:
        from transformers import CLIPModel

        return _reading(
            location,
            lambda: CLIPModel.from_pretrained(location.name_or_path, use_safetensors=True, **location.arguments()),
        )

    return shared(("clip", location, key), load)


def load_detector(location: WeightsLocation, key: object) -> Any:
    """``transformers.Mask2FormerForUniversalSegmentation``, shared as in ``load_clip``."""

    def build() -> Any:
        from transformers import Mask2FormerForUniversalSegmentation

        return Mask2FormerForUniversalSegmentation.from_pretrained(
            location.name_or_path, use_safetensors=True, **location.arguments()
        )

    return shared(("detector", location, key), lambda: _reading(location, build))


@dataclass(frozen=True)
class OcrModel:
    """An image-to-text model and its processor (image processor and tokenizer)."""

    net: Any
    processor: Any


def load_ocr_model(location: WeightsLocation, key: object) -> OcrModel:
    """An image-to-text model of transformers with its processor, shared as in ``load_clip``."""

    def build() -> OcrModel:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        net = AutoModelForImageTextToText.from_pretrained(
            location.name_or_path, use_safetensors=True, **location.arguments()
        )
        processors: Any = AutoProcessor  # its from_pretrained is not typed
        return OcrModel(net, processors.from_pretrained(location.name_or_path, **location.arguments()))

    return shared(("ocr", location, key), lambda: _reading(location, build))


def load_backbone(location: WeightsLocation) -> Any:
    """``transformers.Qwen2VLModel`` without the head for tokens. ValueError for weights that cannot be read."""

    def build() -> Any:
        from transformers import Qwen2VLModel

        return Qwen2VLModel.from_pretrained(location.name_or_path, use_safetensors=True, **location.arguments())

    return _reading(location, build)


def load_question_model(location: WeightsLocation) -> Any:
    """``transformers.Qwen3VLForConditionalGeneration`` of any size. ValueError for another model."""

    def build() -> Any:
        from transformers import AutoConfig, Qwen3VLForConditionalGeneration

        kind = AutoConfig.from_pretrained(location.name_or_path, **location.arguments()).model_type
        if kind != "qwen3_vl":
            raise ValueError(f"it is a {kind}; geneval2 needs a Qwen3-VL, such as {QWEN3_VL.name}")
        return Qwen3VLForConditionalGeneration.from_pretrained(
            location.name_or_path, use_safetensors=True, **location.arguments()
        )

    return _reading(location, build)


def raw_tokenizer(location: WeightsLocation) -> Any:
    """A ``transformers`` tokenizer. ValueError if it cannot be read."""

    def load() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(location.name_or_path, **location.arguments())

    return _reading(location, load)


@dataclass(frozen=True)
class PaddedTokenizer:
    """Texts to token ids, padded and truncated to ``length``, so that a row never depends on the other rows.

    clean: text cleaning of the reward's original code, applied before the tokenizer.
    """

    tokenizer: Any
    length: int
    clean: Callable[[str], str] = str

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, length]."""
        cut = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        rows = self.tokenizer([self.clean(text) for text in texts], **cut)
        return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}

    def reader(self, name: str) -> Reader:
        """For warnings about prompts that are longer than ``length``."""

        def tokens(texts: Sequence[str]) -> Any:
            cleaned = [self.clean(text) for text in texts]
            return self.tokenizer(cleaned, padding=False, truncation=False, verbose=False)["input_ids"]

        return Reader(name, self.length, tokens)


def load_tokenizer(location: WeightsLocation, length: int, clean: Callable[[str], str] = str) -> PaddedTokenizer:
    """A tokenizer for ``length`` tokens. ValueError if it cannot be read."""
    return PaddedTokenizer(raw_tokenizer(location), length, clean)


def _reading(location: WeightsLocation, load: Callable[[], T]) -> T:
    try:
        return load()
    except ImportError as error:
        raise ValueError(
            f"loading {location.name_or_path} needs {error.name or 'transformers'}; do: {install('diffusers')}"
        ) from error
    except (OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        if location.local:
            raise ValueError(f"cannot load {location.name_or_path}: {first}; check the folder") from error
        away = offline()
        reason = f"it is not in the cache, and the hub cannot be reached ({away}); {ADVICE}" if away else None
        reason = reason or (
            hub_reason(error, CONFIG, location.revision) if _of_the_hub(error) else f"{first}; {ADVICE}"
        )
        raise ValueError(f"cannot load {location.name_or_path}: {reason}") from error


def _of_the_hub(error: Exception) -> bool:
    return type(error).__module__.startswith("huggingface_hub")
