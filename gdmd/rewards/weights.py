"""Where published reward models come from: pinned hub ids, the folder of converted weights, and safe loading.

Only safetensors are ever read here; a third-party .pt is converted once (``rewards.convert``). A local folder never
touches the network. No torch at import time: ``gdmd rewards list`` reads this file.
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
HOME = "GDMD_REWARDS"
"""Environment variable: the folder of converted rewards; default ~/.cache/gdmd/rewards."""
CONFIG = "config.json"
"""In every repository that a reward is loaded from."""
CURE = "check id, revision and network, or give a local folder as path"
CONVERTED = "converted.json"
"""In a converted folder: where its tensors came from."""


@dataclass(frozen=True)
class Hub:
    """A repository on a model hub at one commit; ``revision`` None = its default branch (not repeatable)."""

    name: str
    revision: str | None = None


@dataclass(frozen=True)
class Published:
    """What is known about a reward model's weights and scores."""

    kind: str
    about: str
    range: str
    weights: Hub
    file: str = ""  # one third-party .pt that has to be converted; "" = loaded as it is
    tokenizer: Hub | None = None
    reads: Literal["image and text", "image"] = "image and text"

    @property
    def converted(self) -> bool:
        """Whether the published file is a .pt that must be converted first."""
        return bool(self.file)


CLIP_L = Hub("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
CLIP_H = Hub("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
PICKSCORE = Hub("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
_HPS = Hub("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a")
_IMAGEREWARD = Hub("zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72")
BERT = Hub("google-bert/bert-base-uncased")
DETECTOR = Hub("facebook/mask2former-swin-small-coco-instance")
OCR = Hub("stepfun-ai/GOT-OCR-2.0-hf", "d3017ef2c2c1395888c8d635c5e0508bcb0ac78d")

PUBLISHED = (
    Published("clip", "CLIPScore: cosine of CLIP ViT-L/14 (arXiv 2104.08718 without 2.5 max(., 0))", "[-1, 1]", CLIP_L),
    Published("hps", "HPSv2.1: cosine of a tuned ViT-H/14 (arXiv 2306.09341)", "[-1, 1]", _HPS,
              "HPS_v2.1_compressed.pt", CLIP_H),
    Published("hps_v2", "HPSv2: the first weights of the same model", "[-1, 1]", _HPS, "HPS_v2_compressed.pt", CLIP_H),
    Published("pickscore", "PickScore v1: exp(logit_scale) x cosine (arXiv 2305.01569)", "about 15 to 27", PICKSCORE,
              tokenizer=CLIP_H),
    Published("imagereward", "ImageReward v1: BLIP + MLP, standardized (arXiv 2304.05977)", "about -3 to 3",
              _IMAGEREWARD, "ImageReward.pt", BERT),
    Published("aesthetic", "LAION aesthetic v2: linear layers on CLIP ViT-L/14 embeddings", "about 1 to 10",
              Hub("trl-lib/ddpo-aesthetic-predictor"), "aesthetic-model.pth", reads="image"),
    Published("ocr", "OCR: max(0, 1 - edit distance / length) of the text quoted in the prompt (arXiv 2505.05470)", "[0, 1]",
              OCR),
)  # fmt: skip


def published(kind: str) -> Published:
    """What is known about a kind. ValueError for an unknown one, with the known ones."""
    for one in PUBLISHED:
        if one.kind == kind:
            return one
    known = [one.kind for one in PUBLISHED]
    meant = near(kind, known)
    advice = f"did you mean '{meant[0]}'?" if meant else f"published ones are {', '.join(known)}"
    raise ValueError(f"unknown reward {kind!r}; {advice}")


def home() -> Path:
    """The folder of converted rewards: $GDMD_REWARDS, else ~/.cache/gdmd/rewards."""
    given = os.environ.get(HOME)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "gdmd" / "rewards"


def converted_folder(kind: str, given: str | None) -> Path:
    """The folder of a converted reward. ValueError that says how to make it where there is none."""
    folder = Path(given).expanduser() if given else home() / kind
    if (folder / "model.safetensors").is_file():
        return folder
    raise ValueError(
        f"reward {kind}: no converted weights in {folder} (model.safetensors is missing); its authors publish a .pt "
        f"file: do `gdmd rewards fetch {kind}`, which also converts it (`gdmd rewards convert {kind} FILE` for a file that "
        "is here already), or give the folder as path"
    )


@dataclass(frozen=True)
class Place:
    """Where to load from: a local folder, or a hub id at a revision."""

    where: str
    revision: str | None
    local: bool

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a ``from_pretrained``; neither a local folder nor an unreachable hub asks the network."""
        if self.local:
            return {"local_files_only": True}
        return {"revision": self.revision, "local_files_only": bool(unreachable(self.where, CONFIG, self.revision))}

    def require(self) -> None:
        """ValueError, at once, for a hub id that can neither be downloaded nor is in the cache."""
        if not self.local:
            _reading(self, lambda: hub_file(self.where, CONFIG, self.revision))


def place_of(given: str | None, revision: str | None, default: Hub) -> Place:
    """A given path or id, else the default id at its pinned revision. ValueError for a folder that does not exist."""
    if given is None:
        return Place(default.name, revision or default.revision, local=False)
    folder = Path(given).expanduser()
    if folder.is_dir():
        return Place(str(folder), None, local=True)
    if given.startswith((".", "/", "~")) or given.count("/") != 1 or "\\" in given or folder.exists():
        raise ValueError(
            f"{given} is no folder with weights; give a folder in transformers' format or a hub id ORG/NAME"
        )
    pinned = default.revision if given == default.name else None
    return Place(given, revision or pinned, local=False)


def weights_content(where: str, revision: str | None = None, variant: str | None = None) -> str:
    """Which weights lie at a place: a hash of a local folder's or file's content, or ORG/NAME[/FILE]@COMMIT of the hub.

    A branch whose commit the hub's cache does not hold never equals itself.
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
    """One loaded network for everybody who asks with the same key while somebody holds it."""
    found = _shared.get(key)
    if found is None:
        found = load()
        _shared[key] = found
    return found


def load_clip(place: Place, key: object) -> Any:
    """``transformers.CLIPModel``, loaded once per place and key (a ``Placement``). ValueError for unreadable weights."""

    def load() -> Any:
        from transformers import CLIPModel

        return _reading(
            place, lambda: CLIPModel.from_pretrained(place.where, use_safetensors=True, **place.arguments())
        )

    return shared(("clip", place, key), load)


def load_detector(place: Place, key: object) -> Any:
    """``mask2former.Mask2Former``, loaded once per place and key."""

    def build() -> Any:
        from gdmd.rewards.geneval.mask2former import Mask2Former

        return Mask2Former.from_pretrained(place.where, use_safetensors=True, **place.arguments())

    return shared(("detector", place, key), lambda: _reading(place, build))


@dataclass(frozen=True)
class ReadingNet:
    """A model that writes down what an image says, and the processor (image processor and tokenizer) it was made with."""

    net: Any
    processor: Any


def load_reader(place: Place, key: object) -> ReadingNet:
    """An image-to-text model of transformers with its processor, loaded once per place and key."""

    def build() -> ReadingNet:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        net = AutoModelForImageTextToText.from_pretrained(place.where, use_safetensors=True, **place.arguments())
        processors: Any = AutoProcessor  # its from_pretrained is not typed
        return ReadingNet(net, processors.from_pretrained(place.where, **place.arguments()))

    return shared(("ocr", place, key), lambda: _reading(place, build))


def raw_tokenizer(place: Place) -> Any:
    """A ``transformers`` tokenizer. ValueError where it cannot be read."""

    def load() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(place.where, **place.arguments())

    return _reading(place, load)


@dataclass(frozen=True)
class PaddedTokenizer:
    """Texts -> token ids padded and cut to ``length``, so that a row never depends on the other rows.

    clean: what the original of a reward does to a text before its tokenizer.
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
        """How long the texts are that it reads."""

        def tokens(texts: Sequence[str]) -> Any:
            whole = [self.clean(text) for text in texts]
            return self.tokenizer(whole, padding=False, truncation=False, verbose=False)["input_ids"]

        return Reader(name, self.length, tokens)


def load_tokenizer(place: Place, length: int, clean: Callable[[str], str] = str) -> PaddedTokenizer:
    """A tokenizer for ``length`` tokens. ValueError where it cannot be read."""
    return PaddedTokenizer(raw_tokenizer(place), length, clean)


def _reading(place: Place, load: Callable[[], T]) -> T:
    try:
        return load()
    except ImportError as error:
        raise ValueError(
            f"loading {place.where} needs {error.name or 'transformers'}; do: {install('diffusers')}"
        ) from error
    except (OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        if place.local:
            raise ValueError(f"cannot load {place.where}: {first}; check the folder") from error
        away = offline()
        reason = f"it is not in the cache, and the hub cannot be reached ({away}); {CURE}" if away else None
        reason = reason or (hub_reason(error, CONFIG, place.revision) if _of_the_hub(error) else f"{first}; {CURE}")
        raise ValueError(f"cannot load {place.where}: {reason}") from error


def _of_the_hub(error: Exception) -> bool:
    return type(error).__module__.startswith("huggingface_hub")
