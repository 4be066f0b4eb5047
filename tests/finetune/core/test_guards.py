"""What a step costs, counted and not timed: no noise of the machine breaks these, and no waste gets past them.

The published sizes are counted on the meta device; everything else on the recipes as a user starts them, on the toy,
from one optimizer step to the next.
"""

from __future__ import annotations

import importlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import finetune.core.data.batches
import finetune.core.learns.trainable
import finetune.core.loop.loop
from configs.load import load
from configs.recipes import RECIPES
from data_prep.folders.run_folder import EMBEDDINGS_FILE, LORA_FILE
from finetune.core.learns.trainable import Group, Learns, all_weights, checkpoint_gradients, lora_adapters
from finetune.core.learns.words import LearnedRows
from finetune.core.loss import denoising_loss
from finetune.core.run import Batch
from finetune.core.settings.methods import LoraConfig
from finetune.diffusion.denoiser import Denoiser
from finetune.diffusion.models import Models
from finetune.diffusion.noise import NoiseSchedule
from finetune.diffusion.text import Conditions

ROWS = 49_408
"""Of the embedding table of Stable Diffusion 1.x and 2.x."""
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd15": (
        {"cross_attention_dim": 768, "attention_head_dim": 8},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "sd21": (
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    ),
}
TERA_PER_IMAGE = {
    ("sd15", "full"): 2.407,
    ("sd15", "full, checkpointing"): 3.002,
    ("sd15", "lora"): 1.714,
    ("sd15", "lora, checkpointing"): 2.303,
    ("sd15", "word"): 1.696,
    ("sd15", "full, text encoder"): 2.447,
    ("sd21", "full"): 2.409,
    ("sd21", "full, checkpointing"): 3.005,
    ("sd21", "lora"): 1.715,
    ("sd21", "lora, checkpointing"): 2.305,
    ("sd21", "word"): 1.761,
    ("sd21", "full, text encoder"): 2.544,
}
"""10^12 floating point operations that training on one picture of 512 px takes, forward and backward, latents cached.

Two for a multiplication with addition; counted apart from this code, on the model classes of diffusers.
"""
GIGABYTES_PER_IMAGE = {
    ("sd15", "full"): 0.95,
    ("sd15", "lora"): 0.80,
    ("sd15", "full, checkpointing"): 0.16,
    ("sd21", "lora"): 0.80,
}
"""10^9 bytes kept for the backward pass of one picture, all in bfloat16; counted in the same way."""
USUAL = {("sd15", "full"), ("sd15", "lora"), ("sd15", "word"), ("sd21", "full, text encoder")}


def denoiser_of(size: str, job: str) -> Denoiser:
    """Return the denoiser of a job as it is trained, in bfloat16, on the meta device."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet_config, text_config = SIZES[size]
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **unet_config)
        text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=ROWS, **text_config))
        models = Models(
            base_tokenizer=None, text_encoder=text_encoder, vae=None, unet=unet, base_scheduler=scheduler, name=size
        )
        for part in (unet, text_encoder):
            part.requires_grad_(False)
        if "lora" in job:
            lora_adapters(models, LoraConfig(rank=4), learning_rate=1.0, seed=0)
        elif job == "word":
            table = text_encoder.get_input_embeddings()
            text_encoder.set_input_embeddings(LearnedRows(table, table.weight[:1], ROWS - 1))
        else:
            all_weights(models, learning_rate=1.0, text_encoder_rate=1.0 if "text encoder" in job else None)
        if "checkpointing" in job:
            checkpoint_gradients(models)
    return Denoiser(text_encoder, unet).bfloat16().train()


def loss_of(denoiser: Denoiser, job: str, device: str) -> Tensor:
    """Return the loss of a job on one picture of 512 px."""
    latents = torch.empty(1, 4, 64, 64, dtype=torch.bfloat16, device=device)
    ids = torch.zeros(1, 77, dtype=torch.int64, device=device)
    embeds = torch.empty(1, 77, denoiser.unet.config.cross_attention_dim, dtype=torch.bfloat16, device=device)
    batch = Batch(
        latents=latents,
        noise=latents,
        input_noise=latents,
        timesteps=torch.zeros(1, dtype=torch.int64, device=device),
        conditions=Conditions(prompts=ids if job in ("word", "full, text encoder") else embeds),
        weights=torch.ones(1, device=device),
        names=("a.png",),
        positions=(0,),
    )
    schedule = NoiseSchedule(torch.empty(1000, dtype=torch.float64, device=device), "epsilon")
    return denoising_loss(denoiser, batch, schedule=schedule)


@pytest.mark.parametrize(
    ("size", "job"),
    [pytest.param(*key, marks=[] if key in USUAL else [pytest.mark.slow]) for key in TERA_PER_IMAGE],
)
def test_a_picture_costs_the_operations_that_were_counted(size: str, job: str) -> None:
    denoiser = denoiser_of(size, job)
    with FlopCounterMode(display=False) as counted:
        loss_of(denoiser, job, "meta").sum().backward()
    assert counted.get_total_flops() / 1e12 == pytest.approx(TERA_PER_IMAGE[size, job], rel=0.02)


def claim_to_be_on_the_cpu(module: nn.Module) -> None:
    """Replace tensors of the meta device by fake ones."""

    def empty(value: Tensor) -> Tensor:
        return torch.empty(value.shape, dtype=value.dtype)

    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(empty(weight), weight.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = empty(value)


@pytest.mark.parametrize(("size", "job"), GIGABYTES_PER_IMAGE)
def test_a_picture_keeps_no_more_for_the_backward_pass_than_was_counted(size: str, job: str) -> None:
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept.setdefault(value.untyped_storage()._cdata, value)
        return value

    denoiser = denoiser_of(size, job)
    # On the meta device attention is computed step by step, on a CPU by the fused kernel, which keeps no weights.
    with FakeTensorMode():
        claim_to_be_on_the_cpu(denoiser)
        own = {value.untyped_storage()._cdata for value in (*denoiser.parameters(), *denoiser.buffers())}
        with saved_tensors_hooks(keep, lambda value: value):
            loss_of(denoiser, job, "cpu")
    kept_bytes = sum(value.untyped_storage().nbytes() for place, value in kept.items() if place not in own)
    assert 0.9 * GIGABYTES_PER_IMAGE[size, job] < kept_bytes / 1e9 <= GIGABYTES_PER_IMAGE[size, job]


@dataclass
class Spent:
    """What happened between one optimizer step and the next; entry 0 is everything before the first.

    Attributes:
        flops: operations.
        reads: values of tensors that the program looked at: on a GPU each waits until all work before it is done.
        calls: forward passes, by class of the module.
        largest: elements of the largest tensor that an operation made.
        texts: token ids that the text encoder read, a tensor for each call.
        held: numbers that the optimizer holds, by parameter; one entry per step.
        wanted: parameters of the denoiser that want gradients; one entry per step.
        parts: modules that were called, by class: the last of each.
        waste: what a test does after each prediction of the denoiser, with the prediction.
        saved: numbers in the files that the run left.
    """

    flops: list[int] = field(default_factory=lambda: [0])
    reads: list[int] = field(default_factory=lambda: [0])
    calls: list[Counter[str]] = field(default_factory=lambda: [Counter()])
    largest: list[int] = field(default_factory=lambda: [0])
    texts: list[list[Tensor]] = field(default_factory=lambda: [[]])
    held: list[dict[int, int]] = field(default_factory=list)
    wanted: list[set[int]] = field(default_factory=list)
    parts: dict[str, nn.Module] = field(default_factory=dict)
    waste: Callable[[nn.Module, Any, Tensor], object] | None = None
    saved: int = 0
    watching: bool = True


_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}
_BY_PLACE = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class Operations(TorchDispatchMode):
    """Counts reads among operations, and notes the largest tensor."""

    def __init__(self, spent: Spent) -> None:
        super().__init__()
        self.spent = spent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A choice by truth values has a size that only the device knows.
        by_truth = func in _BY_PLACE and any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if func in _READS or by_truth:
            self.spent.reads[-1] += self.spent.watching
        made = [
            one.untyped_storage().nbytes() // one.element_size() for one in tree_leaves(result) if is_new(one, args)
        ]
        self.spent.largest[-1] = max(self.spent.largest[-1], *made, 0)
        return result


def is_new(one: object, given: Any) -> bool:
    """Tell whether an operation took memory for a tensor."""
    if not isinstance(one, Tensor):
        return False
    places = {value.untyped_storage()._cdata for value in tree_leaves(given) if isinstance(value, Tensor)}
    return one.untyped_storage()._cdata not in places


class Copies(TorchFunctionMode):
    """Counts reads that no operation shows on a CPU."""

    def __init__(self, spent: Spent) -> None:
        super().__init__()
        self.spent = spent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu", "__array__"):
            self.spent.reads[-1] += self.spent.watching
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(spent: Spent) -> Iterator[None]:
    """Fill in what is spent, step by step."""

    def called(module: nn.Module, args: Any, named: Any, result: Any) -> None:
        name = type(module).__name__
        spent.calls[-1][name] += 1
        spent.parts[name] = module
        if name == "Denoiser" and spent.waste is not None:
            spent.waste(module, (args, named), result)
        if name == "CLIPTextModel":
            spent.texts[-1].append(args[0])

    def stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
        held = [value for group in optimizer.param_groups for value in group["params"]]
        spent.held.append({id(value): value.numel() for value in held})
        spent.wanted.append({id(value) for value in spent.parts["Denoiser"].parameters() if value.requires_grad})
        spent.flops[-1] = counted.get_total_flops() - sum(spent.flops[:-1])
        for entries, empty in (
            (spent.flops, 0),
            (spent.reads, 0),
            (spent.calls, Counter()),
            (spent.largest, 0),
            (spent.texts, []),
        ):
            entries.append(empty)  # type: ignore[attr-defined]

    hooks = [register_module_forward_hook(called, with_kwargs=True), register_optimizer_step_post_hook(stepped)]
    try:
        with FlopCounterMode(display=False) as counted, Operations(spent), Copies(spent):
            yield
    finally:
        for hook in hooks:
            hook.remove()


METHODS = {
    "full": "--train_data_dir {images}",
    "lora": "--train_data_dir {images}",
    "textual_inversion": (
        "--train_data_dir {images} --placeholder_token <x> --initializer_token a --instance_prompt <x>"
    ),
    "dreambooth": "--instance_data_dir {images} --instance_prompt a --train_text_encoder",
    "lora_dreambooth": "--instance_data_dir {images} --instance_prompt a --train_text_encoder",
    "pivotal_tuning": ("--instance_data_dir {images} --placeholder_token <x> --initializer_token a --token_steps 1"),
}
LEARNS_TEXT = {"textual_inversion", "dreambooth", "lora_dreambooth", "pivotal_tuning"}
STEPS = slice(1, 4)
"""The whole steps of four: from the first to the second, and so on."""
Change = Callable[[pytest.MonkeyPatch, Spent], None]
Spend = Callable[..., Spent]


@pytest.fixture(scope="module")
def spend(toy_sd: Path, captioned_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Spend:
    """Return a function that trains four steps of a method on the toy, as on a GPU, and says what each took."""

    @cache
    def run(method: str, change: Change | None = None, base: Path = toy_sd) -> Spent:
        config_class, own = RECIPES[method].settings, METHODS[method]
        module = importlib.import_module(f"finetune.{method}")
        folder = tmp_path_factory.mktemp(method)
        words = f"--pretrained_model_name_or_path {base} --output_dir {folder}/run "
        words += own.format(images=captioned_images)
        words += " --max_train_steps 4 --train_batch_size 5 --seed 0 --logging_steps 100 --report_to none"
        spent = Spent()

        def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
            """Random numbers are drawn, and looked at, in the memory of the host."""

            def unwatched(*arguments: Any, **options: Any) -> Any:
                spent.watching = False
                try:
                    return function(*arguments, **options)
                finally:
                    spent.watching = True

            return unwatched

        with pytest.MonkeyPatch.context() as patch:
            for name in ("draw", "_order"):
                patch.setattr(finetune.core.data.batches, name, on_the_host(getattr(finetune.core.data.batches, name)))
            patch.setattr(finetune.core.loop.loop, "reading_waits_for_nothing", lambda device: False)
            if change is not None:
                change(patch, spent)
            with watched(spent):
                module.main(load(getattr(module, config_class), words.split()))
        AcceleratorState._reset_state(reset_partial_state=True)
        files = [folder / "run" / name for name in (LORA_FILE, EMBEDDINGS_FILE)]
        spent.saved = sum(value.numel() for file in files if file.is_file() for value in load_file(file).values())
        return spent

    return run


def check_pictures_are_not_encoded(spent: Spent) -> None:
    assert spent.calls[0]["Encoder"] > 0
    assert [step["Encoder"] for step in spent.calls[STEPS]] == [0, 0, 0]


def check_nothing_is_read(spent: Spent) -> None:
    assert spent.reads[STEPS] == [0, 0, 0]


def check_the_optimizer_holds_what_learns(spent: Spent) -> None:
    assert all(set(held) == wanted for held, wanted in zip(spent.held, spent.wanted, strict=True))
    parts = (spent.parts["UNet2DConditionModel"], spent.parts["CLIPTextModel"])
    whole = {sum(weight.numel() for part in parts[:count] for weight in part.parameters()) for count in (1, 2)}
    numbers = sum(spent.held[-1].values())
    assert numbers == spent.saved or (spent.saved == 0 and numbers in whole)


def check_one_pass_is_all(spent: Spent) -> None:
    """The operations of a step are those of one forward and backward pass of five pictures, prompts read once."""
    text_encoder = spent.parts["CLIPTextModel"]
    denoiser = Denoiser(text_encoder, spent.parts["UNet2DConditionModel"]).train()
    latents, embeds = torch.zeros(5, 4, 8, 8), torch.zeros(5, 77, 16)
    with FlopCounterMode(display=False) as counted:
        if spent.texts[1]:
            ids = torch.unique(spent.texts[1][0], dim=0)
            embeds = text_encoder(ids)[0][[0] * 5]
        denoiser(latents, torch.zeros(5, dtype=torch.int64), embeds).sum().backward()
    assert set(spent.flops[STEPS]) == {counted.get_total_flops()}


@pytest.mark.parametrize("method", METHODS)
def test_after_caching_no_picture_is_encoded(spend: Spend, method: str) -> None:
    check_pictures_are_not_encoded(spend(method))


@pytest.mark.parametrize("method", METHODS)
def test_each_prompt_is_read_once_a_step_where_the_text_encoder_learns_and_never_else(
    spend: Spend, method: str
) -> None:
    for texts in spend(method).texts[STEPS]:
        assert len(texts) == (method in LEARNS_TEXT)
        assert all(len(ids) == len(torch.unique(ids, dim=0)) for ids in texts)


@pytest.mark.parametrize("method", METHODS)
def test_no_value_is_read_off_the_device_between_log_points(spend: Spend, method: str) -> None:
    check_nothing_is_read(spend(method))


def test_on_a_cpu_each_step_looks_at_its_loss_alone(spend: Spend) -> None:
    def as_on_a_cpu(patch: pytest.MonkeyPatch, spent: Spent) -> None:
        patch.setattr(finetune.core.loop.loop, "reading_waits_for_nothing", lambda device: True)

    assert spend("lora", as_on_a_cpu).reads[STEPS] == [1, 1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_the_optimizer_holds_what_learns_and_nothing_else(spend: Spend, method: str) -> None:
    check_the_optimizer_holds_what_learns(spend(method))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "pivotal_tuning"])
def test_a_step_is_one_pass_and_no_more(spend: Spend, method: str) -> None:
    check_one_pass_is_all(spend(method))


def encode_a_picture(patch: pytest.MonkeyPatch, spent: Spent) -> None:
    spent.waste = lambda denoiser, given, predicted: spent.parts["Encoder"](torch.zeros(1, 3, 32, 32))


def read_the_prediction(patch: pytest.MonkeyPatch, spent: Spent) -> None:
    spent.waste = lambda denoiser, given, predicted: predicted.mean().item()


def list_the_prediction(patch: pytest.MonkeyPatch, spent: Spent) -> None:
    spent.waste = lambda denoiser, given, predicted: predicted.tolist()


def predict_twice(patch: pytest.MonkeyPatch, spent: Spent) -> None:
    spent.waste = lambda denoiser, given, predicted: denoiser.forward(*given[0], **given[1])


def train_one_more_tensor(patch: pytest.MonkeyPatch, spent: Spent) -> None:
    def adapters(models: Models, *arguments: Any, **options: Any) -> Learns:
        learns = lora_adapters(models, *arguments, **options)
        extra = models.unet.conv_in.weight.requires_grad_(True)
        (group, *more) = learns.groups
        return Learns((Group({**group.parameters, "unet.conv_in.weight": extra}, group.learning_rate), *more))

    patch.setattr(finetune.core.learns.trainable, "lora_adapters", adapters)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (encode_a_picture, check_pictures_are_not_encoded),
        (read_the_prediction, check_nothing_is_read),
        (list_the_prediction, check_nothing_is_read),
        (predict_twice, check_one_pass_is_all),
        (train_one_more_tensor, check_the_optimizer_holds_what_learns),
    ],
    ids=lambda one: one.__name__,
)
def test_waste_is_seen(spend: Spend, change: Change, check: Callable[[Spent], None]) -> None:
    spent = spend("lora", change)
    with pytest.raises(AssertionError):
        check(spent)


@pytest.fixture(scope="module")
def toy_with_a_whole_table(toy_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the toy with as many rows of embeddings as a published model has."""
    from transformers import CLIPTextModel

    folder = shutil.copytree(toy_sd, tmp_path_factory.mktemp("toy") / "whole_table")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    text_encoder.resize_token_embeddings(ROWS, mean_resizing=False)
    text_encoder.save_pretrained(folder / "text_encoder")
    return folder


@pytest.mark.parametrize("method", ["textual_inversion", "pivotal_tuning"])
def test_a_step_never_takes_memory_for_the_embedding_table(
    spend: Spend, toy_with_a_whole_table: Path, method: str
) -> None:
    spent = spend(method, base=toy_with_a_whole_table)
    assert spent.parts["CLIPTextModel"].config.vocab_size == ROWS
    assert 0 < max(spent.largest[STEPS]) < ROWS * 16 / 4
