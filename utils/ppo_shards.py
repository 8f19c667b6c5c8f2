"""A policy whose weights are cut into shards, one for each process: torch's `fully_shard` (FSDP2), as PPO needs it.

Zhao et al. 2023, arXiv:2304.11277. Cut are the blocks, the repeated layers of a transformer. Whole in each process stay the
embeddings, the last norm and the head (a small share, and the head is used outside of the model's forward pass), and adapters
(smaller still, and the main process can save one alone).

In an update each pass gathers a block's weights when it comes to the block, so all processes have to make the same passes.
Sampling takes as many passes as the longest completion has tokens, which differs from process to process: for that time the
blocks are gathered once (`whole`).

A policy without an adapter is saved by all processes: torch's `get_model_state_dict` with `full_state_dict=True` puts together
what the main one then gives to `save_pretrained`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from utils.generation import base_model
from utils.lab import LabError

if TYPE_CHECKING:
    from utils.ppo_run import PPOConfig


def check_passes(config: PPOConfig, processes: int) -> None:
    """Raise `LabError` where the processes cannot share a minibatch so that all of them make the same passes."""
    prompts = config.minibatch_size // config.num_completions
    pieces = math.ceil(prompts / max(1, config.micro_batch_size // config.num_completions))
    if pieces % processes:
        raise LabError(
            f"shard=True: minibatch_size={config.minibatch_size} in parts of micro_batch_size={config.micro_batch_size} (with "
            f"num_completions={config.num_completions}, which stay together) makes {pieces} micro-batches, and {processes} "
            f"processes need a multiple of {processes}: choose another micro_batch_size or minibatch_size."
        )


def shard(model: PreTrainedModel | PeftModel, processes: int) -> None:
    """Cut the blocks of `model`, which all processes hold alike and whole; their gradients are summed, not averaged.

    Raises `LabError` where the model does not name its blocks.
    """
    base = base_model(model)
    blocks = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
    if not blocks:
        raise LabError(f"shard=True: {type(base).__name__} does not say which of its modules are blocks: leave it out.")
    mesh, adapters = init_device_mesh(model.device.type, (processes,)), getattr(model, "peft_config", {})
    stay = {p for name, p in model.named_parameters() if not adapters.keys().isdisjoint(name.split("."))}
    for block in blocks:
        # A block's gradients travel together, in one dtype: that of the most numbers. The others are summed with the head's.
        trained, numbers = [p for p in block.parameters() if p.requires_grad and p not in stay], Counter()
        for parameter in trained:
            numbers[parameter.dtype] += parameter.numel()
        stay |= {p for p in trained if p.dtype != numbers.most_common(1)[0][0]}
        fully_shard(block, mesh=mesh, ignored_params=stay)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for stack in _stacks(model):  # what holds no shards of its own, and has the next block's weights sent ahead
        fully_shard(stack, mesh=mesh, ignored_params=set(stack.parameters()))


@contextmanager
def whole(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Meanwhile each process holds all weights of `model`, and its passes wait for no other. All enter, and make a pass.

    A model that was never cut is left alone.
    """
    stacks = [stack for stack in _stacks(model) if isinstance(stack, FSDPModule)]
    blocks = [module for stack in stacks for module in stack.modules() if isinstance(module, FSDPModule)]
    for stack in stacks:
        stack.set_reshard_after_forward(False)
    for block in blocks:
        block.unshard()
    yield  # after an exception the processes stand at different places, and nothing can be put in order
    for stack in stacks:
        stack.set_reshard_after_forward(True)
        stack.reset_iter_state()  # cuts the weights again, and forgets the passes, of which each process has made its own


def _stacks(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """The modules in which blocks stand one behind the other."""
    base = base_model(model)
    return [base.get_encoder(), base.get_decoder()] if base.config.is_encoder_decoder else [base.base_model]


def alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those in shards and those that are whole, apart, since no kernel takes both at once."""
    kinds = [t for t in tensors if isinstance(t, DTensor)], [t for t in tensors if not isinstance(t, DTensor)]
    return [kind for kind in kinds if kind]


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Shorten the gradient of all `parameters` to `max_norm`, where it is longer; the norm it had. All processes take part."""
    kinds = alike(parameters)
    norms = [_gathered(get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, norm)
    return float(norm)


def gather_shards(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors, whole, on the CPU, where the process is to `keep` them; else none. All processes take part."""
    found = {}
    for name, tensor in tensors.items():
        tensor = _gathered(tensor.detach())
        if keep:
            found[name] = tensor.cpu()
    return found


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole `tensor`, which all processes hold, what belongs beside this process's part of `parameter`, on its device."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
