"""Error messages for common mistakes, verbatim."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_world import Gdmd

from gdmd.cli.app import main

KINDS = (
    "shapes_clip, shapes_pref, shapes_clip_heldout, shapes_partial_credit, clip, hps, hps_v2, pickscore, imagereward, "
    "aesthetic, hpsv3, geneval2, geneval, ocr, callable, function, remote, composite"
)


def lines(gdmd: Gdmd, *arguments: str) -> list[str]:
    """What is on stderr after exit code 2, without the label; never a traceback, a library's name or an empty part."""
    finished = gdmd(*arguments)
    assert finished.code == 2 and finished.out == "", finished
    for word in ("Traceback", "pydantic", "Value error", ": :", "valid tuple", "Input tag", "(the whole config)"):
        assert word not in finished.err, finished.err
    return [line.removeprefix("error: ") for line in finished.err.splitlines()]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards=clip", "rewards: got 'clip': should be a list of {kind: ...}; write 'rewards=[{kind: clip}]'"),
        (
            "rewards=clip,pickscore",
            "rewards: got 'clip,pickscore': should be a list of {kind: ...}; "
            "write 'rewards=[{kind: clip}, {kind: pickscore}]'",
        ),
        (
            "rewards=my_rewards:warm",
            "rewards: got 'my_rewards:warm': should be a list of {kind: ...}; "
            "write 'rewards=[{kind: callable, target: my_rewards:warm}]'",
        ),
        (
            "rewards=my_rewards.py",
            "rewards: got 'my_rewards.py': should be a list of {kind: ...}; "
            "write 'rewards=[{kind: callable, target: my_rewards.py:FUNCTION}]'",
        ),
        (
            "method.student_steps=0",
            "method.student_steps: got 0: should be a number of steps from 1 to 1000, or a list of times like [1, 0.5]",
        ),
        (
            "method.student_steps=[0.5, 1]",
            "method.student_steps: got [0.5, 1]: should fall strictly from at most 1, like [1, 0.75, 0.5, 0.25]",
        ),
        ("rewards={kind: clip}", "rewards: should be a list of {kind: ...}; write 'rewards=[{kind: clip}]'"),
        ("rewards=[clip]", "rewards.0: got 'clip': should be {kind: ...}; write {kind: clip}"),
        ("rewards.0=hps", "rewards.0: got 'hps': should be {kind: ...}; write {kind: hps}"),
        ("rewards=[{kind: clipp}]", "rewards.0.kind: got 'clipp': unknown kind; did you mean 'clip'?"),
        ("rewards=CLIP", "rewards: got 'CLIP': should be a list of {kind: ...}; write 'rewards=[{kind: clip}]'"),
        ("rewards=[{kind: HPSv2}]", "rewards.0.kind: got 'HPSv2': unknown kind; did you mean 'hps_v2'?"),
        (
            "rewards=[{kind: clip, weight: 2}]",
            "rewards.0.weight: got 2: unknown key; weights belong to the parts of a composite: "
            "{kind: composite, parts: [{reward: {kind: ...}, weight: ...}]}",
        ),
        (
            "rewards=[{kind: composite, parts: [clip]}]",
            "rewards.0.parts.0: got 'clip': should be a mapping; write {reward: {kind: clip}}",
        ),
        (
            "rewards=[{kind: composite, parts: [{reward: clip}]}]",
            "rewards.0.parts.0.reward: got 'clip': should be {kind: ...}; write {kind: clip}",
        ),
        ("model=/models/sdxl", "model: got '/models/sdxl': should be a mapping; write 'model.path=/models/sdxl'"),
        (
            "rewards=[{kid: clip}]",
            f"rewards.0: the key 'kind' is missing; write {{kind: ..., ...}}; known kinds are: {KINDS}",
        ),
        (
            "rewards=[{kind: callable, target: my_rewards.py}]",
            "rewards.0.target: got 'my_rewards.py': names a file without its function; write my_rewards.py:FUNCTION",
        ),
        (
            "rewards=[{kind: callable, target: warm}]",
            "rewards.0.target: got 'warm': does not name a function; write module:function or path/to/file.py:function, "
            "like my_rewards.py:warm",
        ),
        (
            "rewards=[{kind: remote, url: 'host:8766', reward: hps}]",
            "rewards.0.url: got 'host:8766': is not an address; write http://HOST:PORT, like http://host:8766",
        ),
        (
            "loop.lr=1e-4",
            "loop.lr: got '1e-4': unknown key; here this is called loop.lr_student and loop.lr_fake (two networks are "
            "trained)",
        ),
        (
            "loop.gradient_accumulation_steps=2",
            "loop.gradient_accumulation_steps: got 2: unknown key; here this is called loop.micro_batch (samples per "
            "backward pass, not their number)",
        ),
        (
            "method.num_generations=4",
            "method.num_generations: got 4: unknown key; here this is called method.group_size (images_per_prompt: methods "
            "with group advantages; group_size: student updates per rollout of GDMD)",
        ),
        (
            "model.lora_r=8",
            "model.lora_r: got 8: unknown key; here this is called model.lora_rank, which the model of this recipe does "
            "not have",
        ),
        (
            "loop.beta=0.04",
            "loop.beta: got 0.04: unknown key; gdmd has no such setting: the DMD loss takes the place of a KL penalty; "
            "method.beta scales the positive and negative policies",
        ),
        ("batch_size=8", "batch_size: got 8: unknown key; did you mean loop.batch_size?"),
        ("gamma=1", "gamma: got 1: unknown key; did you mean method.gamma?"),
        ("loop.gamma=1", "loop.gamma: got 1: unknown key; did you mean method.gamma?"),
        (
            "method.guidance_scale=3",
            "method.guidance_scale: got 3: unknown key; here this is called method.guidance"
            " (of the teacher, in training)",
        ),
        ("output_dir=x", "output_dir: got 'x': unknown key; here this is `gdmd train --run FOLDER`"),
        ("loop.qqq=1", "loop.qqq: got 1: unknown key; `gdmd recipes RECIPE` prints every key of a recipe"),
        ("prompts=p.txt", "prompts: got 'p.txt': should be a mapping; write 'prompts.file=p.txt'"),
        ("loop.betas=0.9", "loop.betas: got 0.9: should be a list; write 'loop.betas=[0.9]'"),
        ("loop.betas=[0.9, 0.9, 0.9]", "loop.betas: got [0.9, 0.9, 0.9]: should have at most 2 items, not 3"),
        ("loop.ema_warmup=maybe", "loop.ema_warmup: got 'maybe': should be true or false"),
    ],
)
def test_bad_overrides(gdmd: Gdmd, override: str, message: str) -> None:
    assert lines(gdmd, "train", "shapes_smoke", override) == [f"shapes_smoke.yaml (override '{override}'): {message}"]
    assert not list(gdmd.folder.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards=[]"], "shapes_smoke.yaml: method gdmd reads rewards and needs at least one under `rewards`"),
        (
            ["loop.batch_size=10", "loop.micro_batch=3"],
            "shapes_smoke.yaml: loop: micro_batch = 3 does not divide batch_size = 10 into equal parts; use 0 (whole "
            "batch) or a divisor of 10",
        ),
        (
            ["rewards=[{kind:"],
            "override 'rewards=[{kind:': line 1, column 8: expected the node content, but found '<stream end>' (while "
            "parsing a flow node); the shell splits at spaces: put the whole argument in quotes, like 'rewards=[...]'",
        ),
    ],
)
def test_config_is_not_dumped(gdmd: Gdmd, overrides: list[str], message: str) -> None:
    assert lines(gdmd, "train", "shapes_smoke", *overrides) == [message]


def test_key_of_another_kind(gdmd: Gdmd) -> None:
    printed = lines(gdmd, "train", "shapes_smoke", "method.kind=dmd")
    assert printed == [
        "shapes_smoke.yaml: method.group_size: got 2: kind 'dmd' has no such key, only gdmd, gdmd_tilted, "
        "gdmd_ablation, gdmd_tilted_shuffled; "
        "replace the whole section: 'method={kind: dmd, ...}'"
    ]


def test_all_errors_at_once(gdmd: Gdmd) -> None:
    printed = lines(gdmd, "train", "shapes_smoke", "loop.lr=1", "rewards=clip", "model.rank=8", "rubbish", "lora_r=4")
    assert len(printed) == 5
    assert any("rubbish" in line and "is not KEY=VALUE" in line for line in printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "no recipe was named; write, for example, gdmd train shapes_smoke; `gdmd recipes` lists them"),
        (
            ["train", "shape"],
            "unknown recipe 'shape'; did you mean 'shapes', 'shapes_sd3' or 'shapes_dmd'? `gdmd recipes` lists them",
        ),
        (
            ["recipes", "sdxl"],
            "unknown recipe 'sdxl'; did you mean 'sdxl_gdmd', 'sdxl_lightning_gdmd' or 'sdxl_dmd'? `gdmd recipes` lists "
            "them",
        ),
        (["plan", "qqq"], "unknown recipe 'qqq'; `gdmd recipes` lists them"),
        (
            ["train", "sdxl_gdmd"],
            "prompts.file is not set: a diffusers pipeline needs a file of prompts, for example prompts.txt",
        ),
        (
            ["study", "simulate", "--tie-rate", "1"],
            "simulated raters: tie_rate: got 1.0: input should be less than 1",
        ),
        (
            ["study", "simulate", "--win-rate", "1.5"],
            "simulated raters: win_rate: got 1.5: input should be less than 1",
        ),
        (
            ["sweep", "smoke", "--pages-only", "--only", "gdmd"],
            "--only is about training, and --pages-only trains nothing and shows all lines of the table; leave one "
            "of them out",
        ),
        (["sweep", "headlin"], "unknown sweep 'headlin'; did you mean 'headline'? Or give a .yaml file"),
        (
            ["eval", "preference", "teacher", "--scorer", "clipp", "-o", "x"],
            "scorer 'clipp': kind: got 'clipp': unknown kind; did you mean 'clip'?",
        ),
        (
            ["eval", "preference", "teacher", "--scorer", "clip,dtpe=bf16", "-o", "x"],
            "scorer 'clip,dtpe=bf16': dtpe: got 'bf16': unknown key; did you mean 'dtype'?",
        ),
        (["rewards", "convert", "hps", "x.pt", "-o", __file__], f"{__file__} is a file; give a folder with --out"),
        (["rewards", "serve", "clipp"], "reward 'clipp': kind: got 'clipp': unknown kind; did you mean 'clip'?"),
        (
            ["rewards", "serve", "own.py"],
            "reward 'own.py': target: got 'own.py': names a file without its function; write own.py:FUNCTION",
        ),
        (
            ["study", "plan", "a=x", "b=y", "-o", "s", "--raters", "2"],
            "study: votes_per_pair is 3, above raters = 2: nobody judges the same pair twice; lower --votes, or raise "
            "--raters",
        ),
    ],
)
def test_suggestions(gdmd: Gdmd, arguments: list[str], message: str) -> None:
    assert lines(gdmd, *arguments) == [message]


def test_suggested_file_or_run(gdmd: Gdmd) -> None:
    Path("mine.yaml").write_text("name: x\n")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("name: x\n")
    assert "did you mean the file mine.yaml?" in lines(gdmd, "train", "mine")[0]
    assert "it is a run folder; continue it with gdmd train --resume run" in lines(gdmd, "train", "run")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pretrain", "vea"],
            "Invalid value for 'network': 'vea' is not one of 'vae', 'teacher', 'scorers', 'pipeline', 'student'.",
        ),
        (
            ["study", "plan", "a=x", "b=y", "-o", "s", "--question", "foo"],
            "Invalid value for '--question': 'foo' is not one of 'overall', 'quality', 'alignment'.",
        ),
        (["doctr"], "No such command 'doctr'. Did you mean 'doctor'?"),
        (
            ["train", "shapes_smoke", "--learning_rate", "1e-4"],
            "No such option: --learning_rate; here this is called loop.lr_student and loop.lr_fake (two networks are "
            "trained); write fields as KEY=VALUE, without dashes",
        ),
        (
            ["train", "shapes_smoke", "--steps=5"],
            "No such option: --steps; did you mean loop.steps; write fields as KEY=VALUE, without dashes",
        ),
        (["plan", "shapes", "--output-dir=x"], "No such option: --output-dir; here this is `gdmd train --run FOLDER`"),
        (["train", "--rnu", "x"], "No such option: --rnu (Possible options: --resume, --run)"),
        (["sample", "--lr", "x"], "No such option: --lr (Possible options: --help)"),
        (
            ["doctor", "--device", "gpu"],
            "Invalid value for '--device': 'gpu' is not a device; write cpu, cuda, cuda:1 or mps",
        ),
    ],
)
def test_usage_errors(gdmd: Gdmd, arguments: list[str], message: str) -> None:
    usage, *_, last = lines(gdmd, *arguments)
    assert usage.startswith("Usage: gdmd") and last == f"Error: {message}"


def test_mistakes_outside_the_recipe_are_one_message_before_anything_is_loaded(gdmd: Gdmd) -> None:
    Path("photos").mkdir()
    Path("photos/a.txt").write_text("a circle")
    Path("own.py").write_text("def one(images):\n    return [1.0]\n")
    rewards = "rewards=[{kind: callable, target: 'own.py:two'}, {kind: callable, target: 'own.py:one'}]"
    folder, prompts, *functions = lines(
        gdmd, "train", "shapes_smoke", "prompts.file=no.txt", rewards, "--run", "photos"
    )
    assert folder.startswith("photos is not empty and is not a run folder (it holds a.txt).")
    assert prompts == "prompt file no.txt: cannot be read (no such file); check the path"
    assert "has no 'two'" in functions[0] and "cannot be called with (images, prompts)" in functions[1]
    places = ["model.path=./sd", "model.student=./me", "model.teacher_loras=[{path: ./style.safetensors}]"]
    places += ["model.scoring_decoder=./tiny"]
    base, student, style, tiny = lines(gdmd, "train", "sdxl_gdmd", "prompts.file=photos/a.txt", *places)
    assert base.startswith("model.path './sd': there is no such folder") and student.startswith("model.student './me'")
    assert style.startswith("lora './style.safetensors': no such file or folder, and not a hub id")
    assert tiny.startswith("model.scoring_decoder './tiny': there is no such folder")


def test_profile_reports_missing_prompts_and_base_model_together(gdmd: Gdmd) -> None:
    prompts, base = lines(gdmd, "profile", "sdxl_dmd", "model.path=./sd")
    assert prompts.startswith("prompts.file is not set") and base.startswith(
        "model.path './sd': there is no such folder"
    )


def test_explained_field_with_a_wrong_name(gdmd: Gdmd) -> None:
    (said,) = lines(gdmd, "recipes", "sdxl_dmd", "--explain", "loop.batch")
    assert said == "recipe sdxl_dmd has no field 'loop.batch'; did you mean 'batch_size'?"


def test_names_in_the_list_of_recipes_are_not_broken(gdmd: Gdmd) -> None:
    listed = gdmd("recipes").out
    assert "student from black-forest-labs/FLUX.2-klein-4B" in " ".join(listed.split())


def test_interrupted_command_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Typer ends a command silently at Ctrl-C; ``gdmd train`` reports its own stop and does not come here."""

    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("gdmd.recipes.read.shapes_names", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["recipes"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted; finished checkpoints and images are kept\n"
