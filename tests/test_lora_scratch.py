"""Memory by component: what a step really keeps beside the formulas, NF4's bits, and LoRA's parameter count beside PEFT's."""

import copy
import math

import pytest
import torch
from conftest import broken_copy, make_model, make_tokenizer
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from utils import memory
from utils.architectures import PUBLISHED, build_on_meta
from utils.kernels import FAST_ATTENTION, fused_lora
from utils.lab import LabError
from utils.memory import COMPONENTS, METHODS
from utils.training import label_loss, lora_config

TOKENIZER = make_tokenizer(pad_is_eos=True, chat=True)
ATTENTION = {
    "kept": (torch.bfloat16, FAST_ATTENTION),
    "fused": (torch.bfloat16, "sdpa"),
    "float32": (torch.float32, "sdpa"),
}


def llama(dtype, attention, **sizes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=96, intermediate_size=160, num_attention_heads=6, num_key_value_heads=2) | sizes
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=3, **sizes)).to(dtype)
    model.set_attn_implementation(attention)
    return model.train()


def texts(count, length, learned):
    ids = torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": [-100] * (length - learned) + row[-learned:]} for row in ids]


def counted(model, method, examples, r=4):
    learner = copy.deepcopy(model).train()
    if method == "LoRA":
        learner = get_peft_model(learner, lora_config(learner, r=r))

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16), fused_lora(learner):
            return label_loss(learner, TOKENIZER, examples)

    return memory.memory_of_a_step(learner, loss)


def agree(module, kind, method, length):
    """Hold the prediction of `module` to what one real step keeps: exact but for step counters, 1 % on activations."""
    model = llama(*ATTENTION[kind])
    real = counted(model, method, texts(2, length, length // 2), r=16)
    size = dict(batch=2, length=length, learned=length // 2 * 2, weight_bytes=model.dtype.itemsize)
    predicted = module.predict_memory(model, method, r=16, **size)
    for component in COMPONENTS:
        close = 0.01 if component == "activations" else 0.002
        assert predicted[component] == pytest.approx(real[component], rel=close), component


@pytest.mark.parametrize("length", [48, 200])  # within one part of the attention, and in two
@pytest.mark.parametrize("method", ["full", "LoRA"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_a_real_step_keeps_what_the_formulas_say(kind, method, length):
    agree(memory, kind, method, length)


def _agree_on_both(module):
    for method in ("full", "LoRA"):
        agree(module, "kept", method, 200)


BREAKS = {
    "no normalised input": ("norm += b * h", "norm += 0"),
    "norms in two bytes": ("norm = 4 * h + 4", "norm = 2 * h + 4"),
    "inputs not shared": ("inputs = b * (h + q + h + f)", "inputs = b * (5 * h + q + f)"),
    "no narrow product": ("inputs += b * 7 * r", "inputs += 0"),
    "keys as wide as queries": ("attention = b * (q + 2 * kv)", "attention = b * 3 * q"),
    "attention weights forgotten": ("b * heads * _places_seen(length) if", "0 if"),
    "attention over the whole square": ("(end - start) * end for start", "(end - start) * length for start"),
    "one product less": ("network = b * 3 * f", "network = b * 2 * f"),
    "logits in two bytes": ("learned * (4 * config.vocab_size", "learned * (2 * config.vocab_size"),
    "one moment": ('"optimizer": 2 * trained', '"optimizer": trained'),
    "adapters in bf16": ("trained = 4 * adapter if", "trained = 2 * adapter if"),
    "the base alone": ("weights = weight_bytes * everything + 4 * adapter", "weights = weight_bytes * everything"),
    "one factor": ("r * (rows + columns)", "r * rows"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_formula_is_noticed(name):
    broken = broken_copy(memory, *BREAKS[name])
    with pytest.raises(AssertionError):
        _agree_on_both(broken)


def check_counting(module):
    """A network whose bytes can be told by hand: weights (5, 3) and (2, 5), x (4, 3)."""
    network, x = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)), torch.randn(4, 3)
    real = module.memory_of_a_step(network, lambda: network(x).square().sum())
    # kept are x, what the second layer reads, and what is squared; Adam has two moments and a counter for each matrix
    assert real == {"weights": 100, "gradients": 100, "optimizer": 2 * 100 + 2 * 4, "activations": 48 + 80 + 32}
    assert module.tensor_bytes([x, x[1:], x.T]) == 48


def test_bytes_are_counted_once_and_without_the_weights():
    check_counting(memory)


@pytest.mark.parametrize(
    ("search", "replacement"),
    [
        ("not in own:", "is not None:"),
        ("in [*model.parameters(), *model.buffers()]}", "in model.buffers()}"),
        ("activations = tensor_bytes(kept)", "activations = sum(t.nbytes for t in kept) + 1"),
        ("    value.backward()\n    optimizer.step()", "    optimizer.step()\n    value.backward()"),
        ("{tensor.untyped_storage().data_ptr(): tensor.untyped_storage()", "{id(tensor): tensor.untyped_storage()"),
    ],
)
def test_broken_counting_is_noticed(search, replacement):
    with pytest.raises((AssertionError, AttributeError)):
        check_counting(broken_copy(memory, search, replacement))


def test_a_frozen_model_is_refused():
    layer = nn.Linear(3, 5).requires_grad_(False)
    with pytest.raises(LabError, match="No weight of the model requires a gradient"):
        memory.memory_of_a_step(layer, lambda: layer(torch.ones(1, 3)).sum())


def check_bits(module):
    """Dettmers et al. 2023, section 3: 0.5 bits a weight for the scales, 0.127 with double quantization."""
    assert module.nf4_bits(double_quantization=False) == 4.5
    assert module.nf4_bits() == pytest.approx(4.127, abs=5e-4)
    assert module.nf4_bits(block=128, double_quantization=False) == 4.25


def test_the_bits_are_those_of_the_paper():
    check_bits(memory)


@pytest.mark.parametrize(
    ("search", "replacement"),
    [("4 + 32 / block\n", "4 + 16 / block\n"), ("32 / (block * outer_block)", "32 / outer_block")],
)
def test_broken_bits_are_noticed(search, replacement):
    with pytest.raises(AssertionError):
        check_bits(broken_copy(memory, search, replacement))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("r", [1, 6])
def test_the_parameter_count_is_that_of_peft(kind, r):
    model = make_model(kind, 64)
    shapes = [tuple(layer.weight.shape) for layer in memory.linear_layers(model).values()]
    tuned = get_peft_model(model, lora_config(model, r=r))
    assert memory.lora_parameters(shapes, r) == tuned.get_nb_trainable_parameters()[0]


def test_qlora_of_a_published_model_quantizes_its_linear_layers_alone():
    model = build_on_meta(PUBLISHED["LLaMA-7B"])
    size = dict(r=8, batch=1, length=512, learned=64)
    lora, qlora = (memory.predict_memory(model, method, **size) for method in METHODS[1:])
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # by hand: four square matrices and three of the network
    rest = 2 * 32000 * 4096 + 65 * 4096  # embedding, output layer, norms
    assert lora["weights"] - qlora["weights"] == pytest.approx(linear * (2 - memory.nf4_bits() / 8))
    assert qlora["weights"] == pytest.approx(
        linear * memory.nf4_bits() / 8 + 2 * rest + 4 * 8 * 32 * (8 * 4096 + 3 * 15104)
    )
    assert {part: lora[part] for part in COMPONENTS[1:]} == {part: qlora[part] for part in COMPONENTS[1:]}


def test_an_encoder_decoder_has_no_formula_for_activations_and_is_counted():
    model = make_model("t5", len(TOKENIZER))
    predicted = memory.predict_memory(model, "full", r=4, batch=1, length=12, learned=5, weight_bytes=4)
    real = counted(model, "full", [{"input_ids": list(range(3, 15)), "labels": [5, 6, 7, 8, 2]}])
    assert math.isnan(predicted["activations"])
    assert predicted["weights"] == real["weights"]
    assert real["activations"] > 0


def test_an_unknown_method_is_refused():
    with pytest.raises(LabError, match="'IA3': choose one of full, LoRA, QLoRA"):
        memory.predict_memory(make_model("llama", 64), "IA3", r=4, batch=1, length=8, learned=2)
