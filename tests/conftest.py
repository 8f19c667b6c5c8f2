"""Tiny models with random weights, made once a session: Llama, GPT-2, T5 and BERT, each with a tokenizer of its own."""

import gc
import inspect
import os
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["LAB_HEADLESS"] = "1"
torch.set_num_threads(1)  # tiny matrices: a second thread only waits


def broken_copy(module: types.ModuleType, search: str, replacement: str) -> types.ModuleType:
    """`module` with one piece of its source replaced, as a fresh module; `search` has to stand there exactly once."""
    source = inspect.getsource(module)
    assert source.count(search) == 1, f"{search!r} stands {source.count(search)} times in the source, not once"
    copy = types.ModuleType(f"broken_{module.__name__.rpartition('.')[2]}")
    copy.__file__ = module.__file__
    sys.modules[copy.__name__] = copy  # dataclasses look their module up
    exec(compile(source.replace(search, replacement), f"{copy.__name__}.py", "exec"), copy.__dict__)  # noqa: S102 - our own source
    return copy


@pytest.fixture(scope="module")
def quick_garbage_collection():
    """Each Trainer collects garbage, a third of a second among all that is imported: leave what is there alone."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "and",
    "ran",
    "to",
    "red",
    "blue",
    "big",
    "small",
    "house",
    "river",
    "person1",
    "person2",
    "asks",
    "tells",
    "wants",
    "summary",
]


def make_tokenizer(*, pad_is_eos: bool, chat: bool):
    """A word-level tokenizer over `WORDS` and single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys([*WORDS, *letters, ".", ":", "?", "#"])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>" if pad_is_eos else "<pad>",
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s> ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<s> summary : ' }}{% endif %}"
        )
    return fast


def make_model(kind: str, vocabulary: int):
    """A model of the family `kind` with two layers of width 32 and random weights."""
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=2, **special,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=1024, **special)
        return GPT2LMHeadModel(config).eval()
    if kind == "t5":
        config = T5Config(
            vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
            eos_token_id=2, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).eval()
    if kind == "bert":
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        return BertModel(config).eval()
    raise ValueError(kind)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Folders with a saved tiny model and tokenizer, by family. For the Llama, padding is EOS, as in the embedded model."""
    folders = {}
    for kind in ("llama", "gpt2", "t5", "bert"):
        tokenizer = make_tokenizer(pad_is_eos=kind in ("llama", "gpt2"), chat=kind == "llama")
        model = make_model(kind, len(tokenizer))
        folders[kind] = tmp_path_factory.mktemp("models") / kind
        model.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


def save_classifier(encoder_folder, folder, labels):
    """A tiny classifier of texts with random weights, saved in `folder` with its labels' names; returns `folder`."""
    from utils.models import load_model

    torch.manual_seed(0)
    model, tokenizer = load_model(encoder_folder, dtype=torch.float32, device="cpu", num_labels=len(labels))
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: number for number, name in enumerate(labels)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "gpt2", "t5"])
def tiny(request, tiny_folders):
    """A tiny generating model and its tokenizer, in fp32, fresh for each test."""
    from utils.models import load_model

    return load_model(tiny_folders[request.param], dtype=torch.float32, device="cpu")
