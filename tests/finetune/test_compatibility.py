"""The table in docs/from_diffusers.md is true: which recipe takes a flag, its default, and that it does something.

Flags and defaults are those of the five scripts at commit 58eb52c of huggingface/diffusers (0.40.0.dev0, August 2026).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import re
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import HfApi, constants
from PIL import Image
from safetensors.torch import load_file, save_file

from configs.errors import TisserandError, UsageError
from configs.load import as_dict, load
from configs.options import Option, options_of
from configs.recipes import RECIPES as ALL_RECIPES

ROOT = Path(__file__).parents[2]
NUM_FLAGS = {"full": 57, "lora": 51, "textual_inversion": 48, "dreambooth": 61, "lora_dreambooth": 59}
"""``add_argument`` calls of each script."""
RECIPES = [name for name in ALL_RECIPES if name in NUM_FLAGS]
"""Those that diffusers has a script for."""


@dataclass(frozen=True)
class Row:
    """One flag: its default in each script that has it, as argparse is told it, and what it does here."""

    flag: str
    defaults: dict[str, str]
    here: str

    @property
    def is_refused(self) -> bool:
        return self.here.startswith("refused: ")


def read_table() -> list[Row]:
    page = (ROOT / "docs" / "from_diffusers.md").read_text(encoding="utf-8")
    text = re.search(r"<!-- compatibility -->\n(.*?)<!-- /compatibility -->", page, re.DOTALL)
    assert text is not None
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text[1].strip().splitlines()]
    assert head == ["flag", *(f"`{name}`" for name in RECIPES), "here"]
    return [
        Row(
            cells[0].strip("`"),
            {name: cell.strip("`") for name, cell in zip(RECIPES, cells[1:6], strict=True) if cell},
            cells[6],
        )
        for cells in lines
    ]


TABLE = {row.flag: row for row in read_table()}
PAIRS = [(row.flag, recipe) for row in TABLE.values() for recipe in row.defaults]


def of_recipe(recipe: str) -> tuple[type, Callable[[Any], None]]:
    module = importlib.import_module(f"finetune.{recipe}")
    return getattr(module, ALL_RECIPES[recipe].settings), module.main


@functools.cache
def options(recipe: str) -> dict[str, Option]:
    return options_of(of_recipe(recipe)[0])


@functools.cache
def least(recipe: str) -> tuple[str, ...]:
    """Return the words a recipe cannot do without."""
    values = {"initializer_token": "a", "placeholder_token": "<x>"}
    known = options(recipe)
    required = [name for name, option in known.items() if option.is_required or name == "train_data_dir"]
    return tuple(word for name in required for word in (f"--{name}", values.get(name, "somewhere")))


@pytest.mark.parametrize("recipe", RECIPES)
def test_table_has_as_many_flags_as_the_script(recipe: str) -> None:
    assert sum(recipe in row.defaults for row in TABLE.values()) == NUM_FLAGS[recipe]
    assert len(TABLE) == len(read_table())


@pytest.mark.parametrize("flag", TABLE)
def test_table_says_of_every_flag_what_it_does(flag: str) -> None:
    assert re.fullmatch(r"same([:;] .+)?|refused: .+", TABLE[flag].here)


ZERO_IS_TAKEN = {
    *(
        "num_validation_images",
        "checkpoints_total_limit",
        "lr_warmup_steps",
        "seed",
        "noise_offset",
        "input_perturbation",
    ),
    *("dataloader_num_workers", "max_grad_norm", "prior_loss_weight", "adam_weight_decay", "lora_dropout"),
}
ZERO_IS_NOT = {
    *(
        "validation_epochs",
        "validation_steps",
        "checkpointing_steps",
        "max_train_samples",
        "snr_gamma",
        "learning_rate",
    ),
    *("max_train_steps", "num_train_epochs", "gradient_accumulation_steps", "train_batch_size", "adam_epsilon", "rank"),
    *("lr_num_cycles", "lr_power", "num_vectors", "repeats", "save_steps", "num_class_images", "sample_batch_size"),
}


@pytest.mark.parametrize("flag", sorted(ZERO_IS_TAKEN | ZERO_IS_NOT))
def test_zero_is_taken_where_it_means_something(flag: str) -> None:
    config_class, _ = of_recipe(next(iter(TABLE[flag].defaults)))
    words = [*least(next(iter(TABLE[flag].defaults))), f"--{flag}", "0"]
    if flag in ZERO_IS_TAKEN:
        load(config_class, words)
        assert "must be above 0" not in TABLE[flag].here
    else:
        with pytest.raises(UsageError, match=f"--{flag} 0.*: must be above 0"):
            load(config_class, words)


def test_only_these_are_refused() -> None:
    refused = {flag for flag, row in TABLE.items() if "refused" in row.here.replace("refused with", "")}
    dream = {"dream_training", "dream_detail_preservation"}
    unread = {"class_labels_conditioning", "text_encoder_use_attention_mask"}
    assert refused == {"no_safe_serialization", "random_flip"} | dream | unread


@pytest.mark.parametrize(("flag", "recipe"), PAIRS)
def test_recipe_knows_the_flag(flag: str, recipe: str) -> None:
    assert flag in options(recipe)


@pytest.mark.parametrize(("flag", "recipe"), [pair for pair in PAIRS if TABLE[pair[0]].is_refused])
def test_refused_flag_is_refused_by_name(flag: str, recipe: str) -> None:
    value = {"class_labels_conditioning": ["timesteps"], "dream_detail_preservation": ["0.5"]}.get(flag, [])
    with pytest.raises(UsageError, match=f"--{flag}.*: .+"):
        load(of_recipe(recipe)[0], [*least(recipe), f"--{flag}", *value])


@pytest.mark.parametrize(("flag", "recipe"), [pair for pair in PAIRS if not TABLE[pair[0]].is_refused])
def test_default_is_that_of_the_script(flag: str, recipe: str) -> None:
    row, option = TABLE[flag], options(recipe)[flag]
    said = re.search(r"default here (?:in `(\w+)` )?`([^`]+)`", row.here)
    expected = said[2] if said and said[1] in (None, recipe) else row.defaults[recipe]
    if expected == "required":
        assert option.is_required or flag == "instance_prompt"  # captions may come with the images
        return
    if flag == "train_data_dir":  # it, or a data set's name
        assert expected == "none"
        assert not option.is_required
        return
    value = as_dict(load(of_recipe(recipe)[0], least(recipe)))[flag] if not option.is_required else "required"
    if expected in ("none", "off", "on"):
        assert value in {"none": (None, []), "off": (False,), "on": (True,)}[expected]
    elif isinstance(value, str):
        assert value == expected
    else:
        assert value == float(expected)


# What each flag changes. Two runs of the first recipe that takes it, with `where` in both and `given` in the second
# alone, differ in what is `seen`; ``make slow`` asks the other recipes, too.


@dataclass(frozen=True)
class Change:
    """How a flag shows: the words that carry it, the words both runs have, and what of the run differs."""

    given: str
    where: str = ""
    seen: str = "weights"


PRIOR = "--with_prior_preservation --class_prompt b --num_class_images 2 --class_data_dir {root}/class"
PREVIEW = "--validation_prompt a --num_validation_images 1 --validation_steps 1"
EPOCHS = "--max_train_steps 4 --validation_prompt a --num_validation_images 1 --validation_epochs 1"
HUB = "--pretrained_model_name_or_path toy/sd --cache_dir {hub}"
CHANGES = {
    "adam_beta1": Change("--adam_beta1 0.5"),
    "adam_beta2": Change("--adam_beta2 0.5"),
    "adam_epsilon": Change("--adam_epsilon 0.1"),
    "adam_weight_decay": Change("--adam_weight_decay 0.5"),
    "allow_tf32": Change("--allow_tf32", seen="tf32"),
    "cache_dir": Change("--cache_dir {hub}", "--pretrained_model_name_or_path toy/sd", seen="refused"),
    "caption_column": Change("--caption_column other"),
    "center_crop": Change("--center_crop", "--no_center_crop"),
    "checkpointing_steps": Change("--checkpointing_steps 1", seen="files"),
    "checkpoints_total_limit": Change("--checkpoints_total_limit 1", "--checkpointing_steps 1", seen="files"),
    "class_data_dir": Change(PRIOR, PRIOR.replace("{root}/class", "{root}/other"), seen="files"),
    "class_prompt": Change("--class_prompt bb", PRIOR),
    "dataloader_num_workers": Change("--dataloader_num_workers 1", seen="readers"),
    "dataset_name": Change("--dataset_name {named}", "--train_data_dir --dataset_name {others}"),
    "dataset_config_name": Change("--dataset_config_name second", "--train_data_dir --dataset_name {named}"),
    "enable_xformers_memory_efficient_attention": Change(
        "--enable_xformers_memory_efficient_attention", seen="refused"
    ),
    "foreach_ema": Change("--foreach_ema", "--use_ema", seen="ema"),
    "gradient_accumulation_steps": Change("--gradient_accumulation_steps 2", seen="passes"),
    "gradient_checkpointing": Change("--gradient_checkpointing", seen="passes"),
    "hub_model_id": Change("--hub_model_id me/mine", "--push_to_hub", seen="hub"),
    "hub_token": Change("--hub_token hf_xyz", "--push_to_hub", seen="hub"),
    "image_column": Change("--image_column other"),
    "image_interpolation_mode": Change("--image_interpolation_mode nearest", "--resolution 24"),
    "initializer_token": Change("--initializer_token b"),
    "input_perturbation": Change("--input_perturbation 0.5"),
    "instance_data_dir": Change("--instance_data_dir {others}"),
    "instance_prompt": Change("--instance_prompt bb"),
    "learnable_property": Change("--learnable_property style"),
    "learning_rate": Change("--learning_rate 0.02"),
    "local_rank": Change("--local_rank 1", seen="said"),
    "logging_dir": Change("--logging_dir elsewhere", "--report_to tensorboard", seen="files"),
    "lora_dropout": Change("--lora_dropout 0.5"),
    "lr_num_cycles": Change("--lr_num_cycles 2", "--lr_scheduler cosine_with_restarts --lr_warmup_steps 0"),
    "lr_power": Change("--lr_power 3", "--lr_scheduler polynomial --lr_warmup_steps 0"),
    "lr_scheduler": Change("--lr_scheduler linear", "--lr_warmup_steps 0"),
    "lr_warmup_steps": Change("--lr_warmup_steps 1", "--lr_scheduler linear"),
    "max_grad_norm": Change("--max_grad_norm 1e-9"),
    "max_train_samples": Change("--max_train_samples 1"),
    "max_train_steps": Change("--max_train_steps 1", seen="metrics"),
    "mixed_precision": Change("--mixed_precision bf16"),
    "noise_offset": Change("--noise_offset 0.5"),
    "non_ema_revision": Change("--non_ema_revision second", HUB),
    "num_class_images": Change("--num_class_images 3", PRIOR, seen="files"),
    "num_train_epochs": Change("--num_train_epochs 2", "--max_train_steps null --num_train_epochs 1", seen="metrics"),
    "num_validation_images": Change("--num_validation_images 2", PREVIEW, seen="pictures"),
    "num_vectors": Change("--num_vectors 2"),
    "offload_ema": Change("--offload_ema", "--use_ema", seen="ema"),
    "offset_noise": Change("--offset_noise"),
    "output_dir": Change("--output_dir {root}/elsewhere", seen="files"),
    "placeholder_token": Change("--placeholder_token <y>"),
    "pre_compute_text_embeddings": Change("--pre_compute_text_embeddings", "--train_text_encoder", seen="refused"),
    "prediction_type": Change("--prediction_type v_prediction"),
    "pretrained_model_name_or_path": Change("--pretrained_model_name_or_path {toy_v}"),
    "prior_generation_precision": Change(
        "--prior_generation_precision bf16", f"{PRIOR} --prior_generation_precision fp32", seen="passes"
    ),
    "prior_loss_weight": Change("--prior_loss_weight 0.1", PRIOR),
    "push_to_hub": Change("--push_to_hub", seen="hub"),
    "random_flip": Change("--random_flip"),
    "rank": Change("--rank 2"),
    "repeats": Change("--repeats 3", "--repeats 1", seen="metrics"),
    "report_to": Change("--report_to tensorboard", seen="files"),
    "resolution": Change("--resolution 24", seen="passes"),
    "resume_from_checkpoint": Change("--resume_from_checkpoint {checkpoint}", "--checkpointing_steps 1", seen="said"),
    "revision": Change("--revision second", HUB),
    "sample_batch_size": Change("--sample_batch_size 1", PRIOR, seen="passes"),
    "save_as_full_pipeline": Change("--save_as_full_pipeline", seen="files"),
    "save_steps": Change("--save_steps 1", seen="files"),
    "scale_lr": Change("--scale_lr"),
    "seed": Change("--seed 1"),
    "set_grads_to_none": Change("--set_grads_to_none", "--no_set_grads_to_none", seen="gradients"),
    "skip_save_text_encoder": Change("--skip_save_text_encoder", seen="files"),
    "snr_gamma": Change("--snr_gamma 0.1"),
    "tokenizer_max_length": Change("--tokenizer_max_length 40", seen="passes"),
    "tokenizer_name": Change("--tokenizer_name {tokenizer}"),
    "tracker_project_name": Change("--tracker_project_name mine", "--report_to tensorboard", seen="files"),
    "train_batch_size": Change("--train_batch_size 1", seen="passes"),
    "train_data_dir": Change("--train_data_dir {others}"),
    "train_text_encoder": Change("--train_text_encoder"),
    "use_8bit_adam": Change("--use_8bit_adam", seen="refused"),
    "use_ema": Change("--use_ema"),
    "validation_epochs": Change("--validation_epochs 2", EPOCHS, seen="files"),
    "validation_images": Change("--validation_images {images}/0.png", PREVIEW, seen="pictures"),
    "validation_prompt": Change("--validation_prompt a", seen="files"),
    "validation_prompts": Change("--validation_prompts a b", seen="files"),
    "validation_scheduler": Change("--validation_scheduler DDPMScheduler", PREVIEW, seen="pictures"),
    "validation_steps": Change("--validation_steps 1", "--validation_prompt a --num_validation_images 1", seen="files"),
    "variant": Change("--variant fp16", "--pretrained_model_name_or_path {half}"),
    "with_prior_preservation": Change(
        "--with_prior_preservation", "--class_prompt b --num_class_images 2 --class_data_dir {root}/class"
    ),
}


def test_every_accepted_flag_has_something_to_see() -> None:
    assert sorted(CHANGES) == sorted(flag for flag, row in TABLE.items() if not row.is_refused)


@dataclass(frozen=True)
class World:
    """Models, pictures and runs that the words of a change may name."""

    places: dict[str, Path]
    root: Path
    runs: dict[tuple[str, str], dict[str, object]]


def grey_folder(folder: Path, *, level: int, captions: list[dict[str, str]] | None) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(level)
    for index in range(4):
        for prefix in ("", "other-"):
            pixels = (level + 15 * index + random.normal(0, 20, size=(32, 40))).clip(0, 255).astype(np.uint8)
            if captions or not prefix:
                Image.fromarray(pixels).save(folder / f"{prefix}{index}.png")
    if captions:
        rows = [
            {"file_name": f"{index}.png", "other_file_name": f"other-{index}.png", **captions[index % len(captions)]}
            for index in range(4)
        ]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def reweighed(model: Path, folder: Path, variant: str | None = None) -> Path:
    """Copy a model with smaller weights: instead of its own, or beside them, in float16, as a variant."""
    shutil.copytree(model, folder)
    for path in folder.rglob("*.safetensors"):
        smaller = {name: 0.9 * value for name, value in load_file(path).items()}
        if variant:
            path = path.with_name(f"{path.stem}.{variant}.safetensors")
            smaller = {name: value.half() for name, value in smaller.items()}
        save_file(smaller, path, metadata={"format": "pt"})
    return folder


def hub_cache(folder: Path, revisions: dict[str, Path]) -> Path:
    """Write a model as the hub's cache keeps it, each revision under a commit of its own."""
    model = folder / "models--toy--sd"
    for number, (revision, source) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        shutil.copytree(source, model / "snapshots" / commit)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(commit)
    return folder


def other_tokenizer(model: Path, folder: Path) -> Path:
    """Write the toy's tokenizer with the letters a and b exchanged."""
    from transformers import CLIPTokenizer

    vocabulary = CLIPTokenizer.from_pretrained(model / "tokenizer").get_vocab()
    pairs = {"a": "b", "b": "a", "a</w>": "b</w>", "b</w>": "a</w>"}
    swapped = {piece: vocabulary[pairs.get(piece, piece)] for piece in vocabulary}
    CLIPTokenizer(vocab=swapped, merges=[], model_max_length=77).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, toy_sd: Path, toy_sd_v: Path) -> World:
    root = tmp_path_factory.mktemp("world")
    captions = [{"text": "a b", "other": "c"}, {"text": "b", "other": "d d"}]
    named = root / "named"
    grey_folder(named / "one", level=60, captions=captions)
    grey_folder(named / "two", level=160, captions=captions)
    blocks = [{"config_name": "first", "data_dir": "one"}, {"config_name": "second", "data_dir": "two"}]
    blocks[0]["default"] = True
    (named / "README.md").write_text(f"---\nconfigs: {json.dumps(blocks)}\n---\n", encoding="utf-8")
    places = {
        "toy": toy_sd,
        "toy_v": toy_sd_v,
        "half": reweighed(toy_sd, root / "half", "fp16"),
        "hub": hub_cache(root / "hub", {"main": toy_sd, "second": reweighed(toy_sd, root / "smaller")}),
        "tokenizer": other_tokenizer(toy_sd, root / "tokenizer"),
        "images": grey_folder(root / "images", level=60, captions=captions),
        "others": grey_folder(root / "others", level=160, captions=captions),
        "plain": grey_folder(root / "plain", level=60, captions=None),
        "other_plain": grey_folder(root / "other_plain", level=160, captions=None),
        "named": named,
    }
    return World(places, root, {})


COMMON = (
    "--pretrained_model_name_or_path {toy} --output_dir {root}/run --seed 0 --max_train_steps 2 --train_batch_size 2 "
    "--learning_rate 0.01 --checkpointing_steps 100 --logging_steps 1 --report_to none "
)
OWN = {
    "full": "--train_data_dir {images} ",
    "lora": "--train_data_dir {images} ",
    "textual_inversion": "--train_data_dir {plain} --placeholder_token <x> --initializer_token a --repeats 1 ",
    "dreambooth": "--instance_data_dir {plain} --instance_prompt a ",
    "lora_dreambooth": "--instance_data_dir {plain} --instance_prompt a ",
}
opened_in: list[str] | None = None


def _watch_files(event: str, arguments: tuple[Any, ...]) -> None:
    if (
        opened_in is not None
        and event == "open"
        and str(arguments[0]).endswith(".png")
        and "w" not in str(arguments[1])
    ):
        opened_in.append("main" if threading.current_thread() is threading.main_thread() else "another")


sys.addaudithook(_watch_files)  # it cannot be taken away again, and sleeps between the runs


def observe(world: World, recipe: str, words: str) -> dict[str, object]:
    """Run a recipe in this process and return what can be seen of it; a run asked for again is not run again."""
    if (recipe, words) not in world.runs:
        root = Path(tempfile.mkdtemp(dir=world.root))
        world.runs[recipe, words] = run_once(world, recipe, words, root)
    return world.runs[recipe, words]


def run_once(world: World, recipe: str, words: str, root: Path) -> dict[str, object]:
    global opened_in
    places = {**world.places, "root": root}
    if recipe not in ("full", "lora"):
        places["others"] = places["other_plain"]
    if "{checkpoint}" in words:
        first = root / "first"
        run_once(world, recipe, f"--checkpointing_steps 1 --output_dir {first}", root)
        places["checkpoint"] = first / "checkpoint-1"
    if recipe == "full":  # its script has the plural
        words = words.replace("--validation_prompt ", "--validation_prompts ")
    config_class, main = of_recipe(recipe)
    passes: Counter[tuple[str, object, object]] = Counter()
    optimizer_calls: list[object] = []
    averages: list[object] = []
    uploads: list[object] = []

    def count(module: torch.nn.Module, arguments: tuple[object, ...]) -> None:
        tensor = arguments[0] if arguments else None
        if isinstance(tensor, torch.Tensor):
            passes[type(module).__name__, tuple(tensor.shape), tensor.dtype] += 1

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    refused, said = None, io.StringIO()
    opened_in = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        watch_library(patch, optimizer_calls, averages, uploads)
        try:
            main(load(config_class, (COMMON + OWN[recipe] + words).format(**places).split()))
        except TisserandError as error:
            refused = str(error).replace(str(root), "ROOT")
        finally:
            hook.remove()
            readers, opened_in = set(opened_in), None
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    torch.backends.cudnn.allow_tf32 = False
    AcceleratorState._reset_state(reset_partial_state=True)
    return {
        "refused": refused,
        "said": re.sub(r"[\d.]+ ?(s|ms|GB|GiB|MB|MiB)\b", "N", said.getvalue().replace(str(root), "ROOT")),
        "passes": passes,
        "readers": readers,
        "tf32": tf32,
        "gradients": optimizer_calls,
        "ema": averages,
        "hub": uploads,
        **of_folder(root),
    }


def watch_library(
    patch: pytest.MonkeyPatch, optimizer_calls: list[object], averages: list[object], uploads: list[object]
) -> None:
    """Note how torch's optimizers, diffusers' running average and the hub are called; the hub is not reached."""
    from diffusers.training_utils import EMAModel

    zero_grad, construct, move = torch.optim.Optimizer.zero_grad, EMAModel.__init__, EMAModel.to

    def noted_zero_grad(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        optimizer_calls.append(set_to_none)
        zero_grad(self, set_to_none)

    def noted_construct(self: EMAModel, *arguments: object, **named: object) -> None:
        averages.append({name: value for name, value in named.items() if isinstance(value, bool | float)})
        construct(self, *arguments, **named)

    def noted_move(self: EMAModel, device: object = None, *more: object, **named: object) -> None:
        averages.append(str(device))
        move(self, device, *more, **named)

    def create(self: HfApi, repo_id: str, **_: object) -> SimpleNamespace:
        uploads.append(("create", repo_id, self.token))
        return SimpleNamespace(repo_id=repo_id)

    def upload(self: HfApi, repo_id: str, **_: object) -> str:
        uploads.append(("upload", repo_id, self.token))
        return "somewhere"

    patch.setattr(torch.optim.Optimizer, "zero_grad", noted_zero_grad)
    patch.setattr(EMAModel, "__init__", noted_construct)
    patch.setattr(EMAModel, "to", noted_move)
    patch.setattr(HfApi, "create_repo", create)
    patch.setattr(HfApi, "upload_folder", upload)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)


def of_folder(root: Path) -> dict[str, object]:
    """Return what a run left: its tensors, files, pictures and logged numbers."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    files = [path for path in files if not {"cache", "first"} & set(path.relative_to(root).parts)]
    names = [re.sub(r"events\.out.*", "events", path.relative_to(root).as_posix()) for path in files]
    weights = {
        (path.relative_to(root).as_posix(), name): hashlib.sha256(
            value.contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for path in files
        if path.suffix == ".safetensors" and "checkpoint-" not in str(path)
        for name, value in load_file(path).items()
    }
    rows = [
        json.loads(line) for path in files if path.name == "metrics.jsonl" for line in path.read_text().splitlines()
    ]
    pictures = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.suffix == ".png"}
    return {
        "weights": weights,
        "files": names,
        "pictures": pictures,
        "metrics": [{name: row[name] for name in row if not name.endswith("_s")} for row in rows],
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_runs_alike_look_alike(world: World, recipe: str) -> None:
    again = world.root / f"again-{recipe}"
    again.mkdir()
    seen = observe(world, recipe, "")
    assert seen["refused"] is None
    assert run_once(world, recipe, "", again) == seen


def check(world: World, flag: str, recipe: str) -> None:
    change = CHANGES[flag]
    before = observe(world, recipe, change.where)
    after = observe(world, recipe, f"{change.where} {change.given}".strip())
    assert after["refused"] is None or change.seen == "refused", after["refused"]
    assert before["refused"] is None or change.seen == "refused", before["refused"]
    assert after[change.seen] != before[change.seen]


# diffusers tells huggingface_hub how to link files, which that ignores and says so.
LINKS = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")


@LINKS
@pytest.mark.parametrize("flag", CHANGES)
def test_flag_changes_something(world: World, flag: str) -> None:
    check(world, flag, next(iter(TABLE[flag].defaults)))


@LINKS
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "recipe"), [(flag, name) for flag in CHANGES for name in list(TABLE[flag].defaults)[1:]]
)
def test_flag_changes_something_in_the_other_recipes(world: World, flag: str, recipe: str) -> None:
    check(world, flag, recipe)
