"""The families of fine-tuning: each trains what it says, and nothing else; what is measured is what was there."""

import pytest
import torch
from torch import nn

from utils.families import FAMILIES, families, largest_gradients, norm_names, train_family
from utils.lab import LabError, PeakMemory
from utils.models import load_model
from utils.prompts import encode_example
from utils.training import FineTuneConfig, fine_tune

PAIRS = [("the cat sat on the mat", "cat sat"), ("a dog ran", "dog"), ("the small blue house", "house"), ("big", "big")]
BY_NAME = {family.name: family for family in FAMILIES}
CONFIG = FineTuneConfig(batch_size=2, epochs=2)


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.fixture(params=["llama", "t5"])
def source(request, tiny_folders):
    return tiny_folders[request.param]


def examples_of(source):
    model, tokenizer = load_model(source)
    return [encode_example(tokenizer, p, c, encoder_decoder=model.config.is_encoder_decoder) for p, c in PAIRS]


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "QLoRA"])
def test_each_method_trains_its_own_numbers_alone(source, name):
    before = {key: value.clone() for key, value in load_model(source)[0].state_dict().items()}
    trained = train_family(BY_NAME[name], source, examples_of(source), CONFIG)
    after = trained.model
    total = sum(parameter.numel() for parameter in load_model(source)[0].parameters())
    assert trained.share == pytest.approx(trained.trainable / total)
    assert trained.stored_mb > 0
    assert trained.tokens_per_second > 0
    assert len(trained.losses) == 4
    if name == "full":
        assert trained.trainable == total
        assert any(not torch.equal(value, before[key]) for key, value in after.state_dict().items())
        return
    assert 0 < trained.trainable < total
    base = after.unload().state_dict() if hasattr(after.base_model, "unload") else after.get_base_model().state_dict()
    assert all(torch.equal(base[key], value) for key, value in before.items())


def test_norms_are_all_norms_and_nothing_else(source):
    model, _ = load_model(source)
    wanted = sum(
        parameter.numel()
        for module in model.modules()
        if "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    )
    trained = train_family(BY_NAME["norms"], source, examples_of(source), CONFIG)
    assert trained.trainable == wanted > 0
    assert len(norm_names(model)) == sum("Norm" in type(module).__name__ for module in model.modules())


def test_sparse_takes_the_largest_gradients_and_as_many_as_lora_has():
    layer = nn.Linear(6, 5, bias=False)
    layer.weight.grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    mask = largest_gradients(layer, 2)
    assert (mask.shape, mask.dtype, int(mask.sum())) == ((5, 6), torch.bool, 2 * (5 + 6))
    magnitude = layer.weight.grad.abs()
    assert magnitude[mask].min() > magnitude[~mask].max()
    with pytest.raises(LabError, match="backward"):
        largest_gradients(nn.Linear(2, 2), 1)


def test_four_bits_train_an_adapter(tiny_folders):
    source = tiny_folders["llama"]
    trained = train_family(BY_NAME["QLoRA"], source, examples_of(source), CONFIG)
    plain = train_family(BY_NAME["LoRA"], source, examples_of(source), CONFIG)
    assert (trained.trainable, trained.share) == (plain.trainable, pytest.approx(plain.share))
    packed = [p for p in trained.model.parameters() if p.dtype == torch.uint8]
    assert len(packed) == 7 * trained.model.config.num_hidden_layers
    assert trained.losses[-1] < trained.losses[0] + 0.5


def test_every_learning_rate_is_used(tiny_folders, monkeypatch):
    seen = []

    def spy(model, tokenizer, examples, config, **more):
        seen.append(config.learning_rate)
        return fine_tune(model, tokenizer, examples, config, **more)

    monkeypatch.setattr("utils.families.fine_tune", spy)
    for name in ("norms", "LoRA"):
        train_family(BY_NAME[name], tiny_folders["llama"], examples_of(tiny_folders["llama"]), CONFIG)
    assert seen == [BY_NAME["norms"].learning_rate, BY_NAME["LoRA"].learning_rate]


def test_peak_memory_sees_what_was_held_and_let_go():
    with PeakMemory() as memory:
        block = torch.ones(64, 2**20, dtype=torch.uint8).clone()
        for _ in range(200):
            block.add_(1)
        del block
    assert 60 < memory.peak_mb < 400
    with PeakMemory() as nothing:
        pass
    assert nothing.peak_mb < 20


def test_an_unknown_method_is_named():
    assert [family.name for family in families(["LoRA", "norms"])] == ["LoRA", "norms"]
    with pytest.raises(LabError, match="no method 'lora': choose among full, norms"):
        families(["lora"])
