"""Real models: which diffusers pipeline is distilled, at which size, and how student and fake score are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from gdmd.config.base import Config, Count, Finite, NonNegative, NonNegativeCount, Positive, Probability
from gdmd.config.shapes_pipeline import located, read_shapes_pipeline

FamilyName = Literal[
    "sd15", "sdxl", "sd3", "flux", "flux2", "flux2_klein", "z_image", "qwen_image", "qwen_image21", "sana", "krea2"
]
Quantization = Literal["none", "int8", "nf4", "fp8"]
Pixels = Annotated[Count, Field(multiple_of=8)]
"""Side of an image; the families' latents are at least eight times smaller."""


class LoraFile(Config):
    """A LoRA, with the keys of diffusers, PEFT, kohya or ComfyUI."""

    path: str = Field(
        description="A .safetensors file, a folder with one, or a hub id: ORG/NAME or ORG/NAME/FILE.safetensors."
    )
    weight: Finite = Field(default=1.0, description="Factor of its weight change, in addition to alpha / rank.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub id.")


def _by_path(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


Lora = Annotated[LoraFile, BeforeValidator(_by_path)]
"""A LoRA, or just its path."""


class DiffusersModel(Config):
    """A text-to-image pipeline in diffusers' format: a folder, or the id of one on a model hub."""

    kind: Literal["diffusers"] = "diffusers"
    path: str = Field(
        description="Folder with model_index.json (needs no network), a hub id ORG/NAME, or shapes:NAME of a small "
        "pipeline that ships with the package."
    )
    family: FamilyName | None = Field(
        default=None, description="The family that the pipeline must be of; default: read from its model_index.json."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of the hub id; a commit makes the run repeatable."
    )
    variant: str | None = Field(
        default=None, description='Variant of the weight files, for example "fp16"; default: none.'
    )
    teacher_loras: tuple[Lora, ...] = Field(
        default=(),
        description="Your LoRAs, fused into the frozen base model: the teacher of the distillation is base model + LoRAs. "
        "A list of paths or of {path, weight, revision}. They may change the text encoders, too, where diffusers loads "
        "such LoRAs (SD 1.5, SDXL, SD3, FLUX.1) and student is not set: all roles read the same embeddings.",
    )
    student: str | None = Field(
        default=None,
        description="Folder or hub id of a pipeline of the same family, such as a turbo model, whose denoiser and scheduler "
        "the student starts from; default: it starts as the teacher.",
    )
    student_revision: str | None = Field(
        default=None, description="Branch, tag or commit of the hub id in student; a commit makes the run repeatable."
    )
    student_variant: str | None = Field(
        default=None, description="Variant of the weight files of student; default: none."
    )
    student_lora: Lora | None = Field(
        default=None,
        description="A few-step LoRA (DMD2, Lightning, Hyper, LCM) of the denoiser that the student starts with, on top of "
        "the teacher or of student: a path or {path, weight, revision}.",
    )
    fake_from: Literal["teacher", "student"] = Field(
        default="teacher",
        description="What the fake score starts as (the teacher in RTDMD, arXiv 2605.26108, which was no worse here).",
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="bf16",
        description="Precision of the frozen weights and of the computation; trained weights are always fp32.",
    )
    quantization: Quantization = Field(
        default="none",
        description="Storage of the linear layers of the frozen denoiser: int8 or fp8 (half of bf16; fp8 has several times "
        "the error of int8; torchao) or nf4 (0.28 of bf16; bitsandbytes, needs a GPU). Convolutions, text encoders and "
        "VAE keep their dtype, adapters are fp32, and an export is for the original weights. Needs full = none.",
    )
    offload: Literal["none", "idle", "base"] = Field(
        default="none",
        description="What stays in CPU memory and is copied to the GPU while in use. idle: text encoders and decoder. "
        "base: also the blocks of the frozen denoiser, one by one in every call; needs full = none, and much more time "
        "(gdmd plan says how much). Results are the same. Rewards have their own offload field.",
    )
    height: Pixels = Field(default=1024, description="Image height in pixels.")
    width: Pixels = Field(default=1024, description="Image width in pixels.")
    sizes: tuple[tuple[Pixels, Pixels], ...] = Field(
        default=(),
        description="Several image sizes, [height, width] each, of which every outer iteration draws one: for example "
        "[[1024, 1024], [768, 1344], [1344, 768]]. One of them is height x width, the default of exports and samples. "
        "Default: height x width only.",
    )
    full: Literal["none", "student", "fake", "both"] = Field(
        default="none",
        description="Roles whose weights are all trained, each as a separate copy; the others are LoRA adapters on one "
        "base model.",
    )
    lora_rank: Count = Field(
        default=64, description="Rank of the LoRA adapters of student and fake score (arXiv 2605.26108: 32 to 64)."
    )
    lora_alpha: Positive = Field(
        default=64.0,
        description="Adapters are scaled by lora_alpha / lora_rank: 1 here, 2 in the code of arXiv 2605.26108. The "
        "small Shapes pipelines learn equally well with both.",
    )
    lora_targets: tuple[str, ...] = Field(
        default=(),
        description="Endings of the names of the layers that get adapters, linear ones or convolutions. Default: attention "
        "and feed-forward layers, SD3's modulation and a UNet's convolutions, because on the small Shapes pipelines "
        "students with adapters on attention layers alone scored below fully trained ones, and students with all of these "
        "did not.",
    )
    checkpointing: bool = Field(
        default=True,
        description="Activation checkpointing: recompute activations in the backward pass; less memory, a third more "
        "time.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the repeated blocks with torch.compile: faster steps after minutes of compilation. "
        "Needs Triton on a GPU, a C++ compiler on a CPU.",
    )
    forward_chunk: NonNegativeCount = Field(
        default=8,
        description="Maximum batch of a network call without gradient (guidance doubles the rows); 0 = no limit. "
        "Rollouts and scores of larger batches are computed in parts, so their memory does not grow with "
        "loop.batch_size.",
    )
    t5: bool = Field(
        default=True,
        description="SD3: load the T5 encoder; false saves 9 GB, but rendered text gets worse. Other families need all "
        "their encoders.",
    )
    max_tokens: NonNegativeCount = Field(
        default=0, description="Maximum number of prompt tokens of the long text encoder; 0 = the family's default."
    )
    embeddings: str | None = Field(
        default=None,
        description="Folder for text embeddings: all prompts are embedded once, then the text encoders are unloaded. "
        "Default: embed every batch and keep the encoders in memory.",
    )
    embedded_guidance: NonNegative = Field(
        default=3.5,
        description="Guidance scale given as an input to networks that have one (FLUX.1-dev, FLUX.2-dev, LCM UNets); "
        "others ignore it.",
    )
    guidance_rescale: Probability = Field(
        default=0.0,
        description="UNets: guidance rescale; 0 = off (arXiv 2305.08891: 0.7 for models with zero terminal SNR).",
    )
    distilled: bool | None = Field(
        default=None,
        description="Whether the base model is a few-step or guidance-distilled model, which is refused as a teacher "
        "with guidance; default: detected from its files and its name.",
    )
    decode_chunk: Count = Field(
        default=1, description="Images per call of the VAE; more is faster and needs more memory."
    )
    scoring_decoder: str | None = Field(
        default=None,
        description="Folder or hub id of an AutoencoderTiny that decodes latents for the rewards: less memory, less "
        "exact; default: the VAE.",
    )
    scoring_decoder_revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of the hub id in scoring_decoder; a commit makes the run repeatable.",
    )
    scoring_check: NonNegativeCount = Field(
        default=8,
        description="Teacher samples on which a run with a scoring_decoder first measures how much each reward differs "
        "from its value with the VAE (RUN/scoring_decoder.json); at most one batch, 0 = no check.",
    )
    decode_tiled: bool = Field(
        default=False,
        description="Decode in overlapping tiles of 512 pixels (VAEs of Qwen-Image and Krea 2: 256): less memory, but faint "
        "seams.",
    )

    _field: str = PrivateAttr(default="model.path")

    @property
    def field(self) -> str:
        """The field that gave ``path``."""
        return self._field

    @property
    def what(self) -> str:
        """That field and its value, for messages."""
        return f"{self._field} {self.path!r}"

    @property
    def start(self) -> DiffusersModel:
        """The model that the student starts as, which its adapters modify; ``self`` if that is the teacher.

        Its teacher_loras are all LoRAs fused into it: those of the teacher, unless ``student`` is given, and student_lora.
        """
        if self.student is None and self.student_lora is None:
            return self
        loras = self.teacher_loras if self.student is None else ()
        changes: dict[str, Any] = {"student": None, "student_lora": None, "distilled": None}
        changes["teacher_loras"] = loras if self.student_lora is None else (*loras, self.student_lora)
        if self.student is None:
            return self.model_copy(update=changes)
        changes |= {"path": self.student, "revision": self.student_revision, "variant": self.student_variant}
        own = self.model_copy(update=changes)
        own._field = "model.student"
        return own

    @property
    def location(self) -> str:
        """Where the files are: ``path``, but the folder of a shipped pipeline for shapes:NAME."""
        return located(self.path)

    def at_size(self, height: int, width: int) -> DiffusersModel:
        """The same model with this image size only."""
        return self.model_copy(update={"height": height, "width": width, "sizes": ()})

    @property
    def each_size(self) -> tuple[DiffusersModel, ...]:
        """This model with each of its image sizes."""
        return tuple(self.at_size(*size) for size in self.sizes) or (self,)

    @property
    def largest(self) -> DiffusersModel:
        """This model with the largest of its image sizes, by area."""
        return max(self.each_size, key=lambda model: model.height * model.width)

    def _mistakes(self) -> Iterator[str]:
        yield from self._size_mistakes()
        yield from self._revision_mistakes()
        yield from self._quantization_mistakes()
        yield from self._offload_mistakes()
        yield from self._shapes_mistakes()

    def _size_mistakes(self) -> Iterator[str]:
        """Several sizes, or none: a single one is height and width."""
        given = [f"{height} x {width}" for height, width in self.sizes]
        if len(given) == 1:
            yield f"sizes is for several image sizes, got only {given[0]}; set height and width, and leave sizes out"
            return
        if len(set(given)) < len(given):
            yield f"sizes may list each size once, got {', '.join(given)}"
        if given and (self.height, self.width) not in self.sizes:
            yield (
                f"sizes ({', '.join(given)}) must contain height x width = {self.height} x {self.width}, the default of "
                f"exports and samples; set height={self.sizes[0][0]} and width={self.sizes[0][1]}, or add this size"
            )

    def _revision_mistakes(self) -> Iterator[str]:
        """A revision or variant without its model would have no effect."""
        needed = {"student_revision": "student", "student_variant": "student"}
        needed["scoring_decoder_revision"] = "scoring_decoder"
        for name, of in needed.items():
            if getattr(self, name) is not None and getattr(self, of) is None:
                yield f"{name} is set, but {of} is not: set it too, or leave {name} out"

    def _quantization_mistakes(self) -> Iterator[str]:
        """A full copy starts from the base model's own weights, which a quantized network no longer has."""
        if self.quantization != "none" and self.full != "none":
            yield (
                f"quantization = {self.quantization} needs full = none, got full = {self.full}: a role that trains all "
                "weights is a copy of the original ones; set model.full=none or model.quantization=none"
            )
        loras = "teacher_loras" if self.teacher_loras else "student_lora" if self.student_lora else ""
        if self.quantization != "none" and loras:
            yield (
                f"quantization = {self.quantization} cannot be used with {loras}, because a LoRA is fused into the original "
                "weights; fuse it in diffusers, save the pipeline, and give its folder instead, or set "
                "model.quantization=none"
            )

    def _offload_mistakes(self) -> Iterator[str]:
        """What cannot be copied block by block: full copies, weights packed on the GPU, compiled blocks."""
        if self.offload != "base":
            return
        reasons = {
            f"full = {self.full}": "the weights of a full copy are trained, on the GPU" if self.full != "none" else "",
            "quantization = nf4": "its weights are packed on the GPU" if self.quantization == "nf4" else "",
            "compile": "compiled blocks keep their weights" if self.compile else "",
        }
        wrong = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
        if wrong:
            yield (
                f"offload = base cannot be used with {', '.join(wrong)}; set model.full=none, model.compile=false and "
                "model.quantization=int8 or none, or model.offload=idle"
            )

    def _shapes_mistakes(self) -> Iterator[str]:
        """A pipeline of the Shapes world was trained on one image size and one length of captions."""
        trained = read_shapes_pipeline(self.path)
        names = ("height", "width", "max_tokens") if trained and trained.max_tokens else ("height", "width")
        wanted = {name: getattr(trained, name) for name in names} if trained else {}
        if trained and self.sizes:
            yield f"{self.path} was trained on images of one size, got sizes; leave sizes out"
        wrong = [name for name, value in wanted.items() if getattr(self, name) != value]
        if wrong:
            given = ", ".join(f"{name} = {getattr(self, name)}" for name in wrong)
            cure = " ".join(f"model.{name}={wanted[name]}" for name in wrong)
            yield f"{self.path} was trained on the Shapes world with other settings, got {given}; set {cure}"
