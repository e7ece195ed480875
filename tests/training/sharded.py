"""Run by two processes (test_processes.py): train wrapped in FSDP2 on the CPU and compare with one plain process.

accelerate itself does not shard on the CPU, so its wrapping function is called directly, with the plugin that
data_configs/accelerate_fsdp2.yaml describes.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from dmllm.checkpoints.compose import ModelSpec
from dmllm.config import to_dict
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.models.vision import VisionConfig, resolve_vision
from dmllm.objectives import build_objective, requirements
from dmllm.training.assemble import Run
from dmllm.training.config import TrainConfig
from dmllm.training.distributed import local
from dmllm.training.ema import Ema
from dmllm.training.export import save_model
from dmllm.training.loop import training_step
from dmllm.training.optimiser import build_optimisers, set_learning
from dmllm.training.state import Learned, Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from dmllm.types import Batch

SHIPPED = Path(__file__).parents[2] / "data_configs" / "accelerate_fsdp2.yaml"
SHAPE = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = VisionConfig(
    name="timm:vit_tiny_patch16_224",
    pretrained=False,
    image_size=(16, 16),
    options={"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
)
ROWS = 2  # of a micro-batch in one of two processes
OPTIONS = {"masked": {}, "continuous": {"form": "diffuseq", "width": 8, "self_conditioning": 0.5}}
NAME = sys.argv[2] if len(sys.argv) > 2 else "masked"


def build(accelerator, folder, *, sharded):
    torch.manual_seed(0)
    vision = to_dict(resolve_vision(VISION))
    core = MultimodalModel(DmllmConfig(backbone=SHAPE, vision=vision, projector={"name": "linear"}, mask_token_id=2))
    core.initialise()
    core.adapt(**requirements(NAME, OPTIONS[NAME], "full"))
    config = TrainConfig(output_dir=str(folder), model=ModelSpec(), data="unused", steps=4, batch_size=8)
    set_learning(core, config.parts)
    if sharded:
        shard(core, accelerator)
    learned = Learned(model=core, optimisers=build_optimisers(core, config.optimiser, config.parts), ema=Ema(core, 0.9))
    return Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        model=core,
        learned=learned,
        processor=None,
        objective=build_objective(NAME, OPTIONS[NAME], core.config.special, "full"),
        mixture=None,
        validation=None,
        steps=4,
        micro_batch_size=ROWS if sharded else 2 * ROWS,
        micro_batches=2,
        start=Progress(),
    )


def shard(core, accelerator):
    given = yaml.safe_load(SHIPPED.read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=given["fsdp_version"],
        auto_wrap_policy=given["fsdp_auto_wrap_policy"],
        reshard_after_forward=given["fsdp_reshard_after_forward"],
        cpu_ram_efficient_loading=given["fsdp_cpu_ram_efficient_loading"],
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    like = SimpleNamespace(state=state, mixed_precision="no", device=accelerator.device, is_main_process=True)
    fsdp2_prepare_model(like, core)


def batches(run, start=0):
    """Row i is drawn from i alone; every fourth row has a picture, so that some processes have none."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    while True:
        indices = torch.arange(start + rank * run.micro_batch_size, start + (rank + 1) * run.micro_batch_size)
        ids = torch.stack(
            [torch.randint(3, 32, (9,), generator=torch.Generator().manual_seed(int(i))) for i in indices]
        )
        slots = torch.full_like(ids, -1)
        pictures = [row for row, index in enumerate(indices) if index % 4 == 0]
        for place, row in enumerate(pictures):
            slots[row, :4] = torch.arange(4) + 4 * place
        pixels = torch.full((len(pictures), 3, 16, 16), 50, dtype=torch.uint8) if pictures else None
        labels = ids.clone()
        labels[:, :5] = -100
        positions = torch.arange(9).expand_as(ids)
        yield Batch(
            input_ids=ids,
            labels=labels,
            image_slots=slots,
            documents=torch.zeros_like(ids),
            positions=positions,
            pixel_values=pixels,
            indices=indices,
        )
        start += world * run.micro_batch_size


def steps(run, first, last, start):
    rows = batches(run, start)
    for step in range(first, last):
        training_step(run, rows, step)


def main(out):
    accelerator = Accelerator(cpu=True)
    run = build(accelerator, out, sharded=True)
    steps(run, 0, 2, 0)
    save_checkpoint(out, Progress(step=2, examples=16), run.learned, accelerator, keep=1)
    steps(run, 2, 4, 16)
    again = build(accelerator, out, sharded=True)
    progress = load_checkpoint(newest_checkpoint(out), again.learned)
    steps(again, 2, 4, progress.examples)
    for a, b in zip(run.core.parameters(), again.core.parameters(), strict=True):
        assert torch.equal(local(a), local(b)), "resumed != uninterrupted"
    save_model(run, out / "weights", progress)
    with run.learned.ema.applied():
        save_model(run, out / "averages", progress)
    if accelerator.is_main_process:
        compare(run, out)
    accelerator.wait_for_everyone()


def compare(run, out):
    one = SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        backward=lambda loss: loss.backward(),
        no_sync=lambda _: nullcontext(),
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
    )
    plain = build(one, out, sharded=False)
    steps(plain, 0, 4, 0)
    weights, averages = (load_file(out / name / "model.safetensors") for name in ("weights", "averages"))
    for name, parameter in plain.core.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(averages[name], plain.learned.ema.averages[name], atol=1e-5, rtol=0)
    blocks = sum(isinstance(m, FSDPModule) and type(m).__name__ == "FSDPBlock" for m in run.core.modules())
    sys.stdout.write(f"sharded: {blocks} blocks\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
