"""From-scratch pieces against torch's and transformers' own; models on paper; and mutations, each caught by a named check.

A check takes the module: the tests run it on `utils.architectures`, the mutations on a copy with one line broken.
"""

import copy
import functools
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import broken_copy
from torch import nn
from transformers import AutoConfig, DistilBertConfig, LlamaConfig, LlamaForCausalLM, T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.t5.modeling_t5 import T5Attention

from utils import architectures
from utils.lab import LabError
from utils.models import load_model

CHECKS = {}


def check(function):
    """Mark a check that mutations may name."""
    CHECKS[function.__name__] = function
    return function


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, atol=1e-5):
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = (ours.float() - theirs.float()).abs().max()
    assert difference <= atol, f"differs by {difference}"


@functools.cache
def llama_config(**more):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", rms_norm_eps=1e-3,
    )  # fmt: skip
    return LlamaConfig(**(sizes | more))


def lively_llama(config):
    """Weights large enough that attention is far from even and the norms' weights are not all ones."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.3)
    return model


# --- masks and attention -----------------------------------------------------------------------------------------


@check
def masks(m):
    for n in (1, 2, 5):
        assert m.bidirectional_mask(n).all()
        assert m.bidirectional_mask(n).shape == (n, n)
        assert torch.equal(m.causal_mask(n), ~nn.Transformer.generate_square_subsequent_mask(n).bool())
        assert torch.equal(m.causal_mask(2, past=n), m.causal_mask(n + 2)[-2:])
    mask = m.prefix_mask(3, 5)
    assert mask[:3, :3].all()
    assert not mask[:3, 3:].any()
    assert torch.equal(mask[3:], m.causal_mask(5)[3:])
    assert torch.equal(m.prefix_mask(0, 4), m.causal_mask(4))
    assert torch.equal(m.prefix_mask(4, 4), m.bidirectional_mask(4))
    both = m.encoder_decoder_mask(2, 3)
    assert both[:2, :2].all()
    assert not both[:2, 2:].any()
    assert both[2:, :2].all()
    assert torch.equal(both[2:, 2:], m.causal_mask(3))


@check
def prefix_masks_of_a_batch(m):
    prefix = torch.tensor([3, 0, 2, 6])
    mask = m.prefix_mask(prefix, 6)
    assert mask.shape == (4, 6, 6)
    assert mask.dtype == torch.bool
    for b, i, j in itertools.product(range(4), range(6), range(6)):
        assert bool(mask[b, i, j]) == (j <= i or j < int(prefix[b])), f"row {i} and column {j} of sequence {b}"
    for own, number in zip(mask, prefix.tolist(), strict=True):
        assert torch.equal(own, m.prefix_mask(number, 6))
        assert torch.equal(own, m.prefix_mask(torch.tensor(number), 6))
    # In transformers' own model: without a prefix its causal mask; with one, the first token sees the prefix's end.
    model, ids = lively_llama(llama_config()), torch.tensor([[5, 6, 7, 8, 9, 10]])
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
    with torch.no_grad():
        close(model(ids, attention_mask=additive[1:2]).logits, model(ids).logits)
        here, there = (
            model(torch.tensor([[5, 6, end, 8, 9, 10]]), attention_mask=additive[:1]).logits[0] for end in (7, 20)
        )
        assert (here[0] - there[0]).abs().max() > 1e-2
        here, there = (
            model(torch.tensor([[5, 6, 7, end, 9, 10]]), attention_mask=additive[:1]).logits[0] for end in (8, 20)
        )
        close(here[:3], there[:3])


@check
def attention_is_torchs(m):
    query, key, value = random(2, 3, 4, 8), random(2, 3, 6, 8, seed=1), random(2, 3, 6, 5, seed=2)
    bias, mask = random(3, 4, 6, seed=3), torch.rand(4, 6, generator=torch.Generator().manual_seed(4)) < 0.6
    mask[:, 2] = True
    output, weights = m.attention(query, key, value)
    close(output, F.scaled_dot_product_attention(query, key, value))
    close(weights.sum(-1), torch.ones(2, 3, 4))
    close(m.attention(query, key, value, mask)[0], F.scaled_dot_product_attention(query, key, value, mask))
    output, weights = m.attention(query, key, value, mask, bias)
    close(output, F.scaled_dot_product_attention(query, key, value, bias.masked_fill(~mask, float("-inf"))))
    close(output, weights @ value)
    assert (weights[..., ~mask] == 0).all()


@check
def attention_keeps_bf16(m):
    query, key, value = (
        random(1, 1, 1, 8, scale=0.1).bfloat16(),
        random(1, 1, 900, 8).bfloat16(),
        torch.ones(1, 1, 900, 1).bfloat16(),
    )
    output, weights = m.attention(query, key, value)
    assert output.dtype == weights.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(query.float(), key.float(), torch.eye(900)[None, None])
    assert ((weights.float() - exact) / exact).abs().max() < 2**-7  # one rounding, after the softmax


@check
def heads_are_torchs_multihead_attention(m):
    ours, theirs = m.GroupedQueryAttention(24, 4, 4, bias=True), nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        for i, projection in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
            projection.weight.copy_(theirs.in_proj_weight.chunk(3)[i])
            projection.bias.copy_(theirs.in_proj_bias.chunk(3)[i])
        ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
        x, mask = random(2, 5, 24), m.causal_mask(5)
        expected, expected_weights = theirs(x, x, x, attn_mask=~mask, average_attn_weights=False)
        output, weights = ours(x, mask)
    close(output, expected)
    close(weights, expected_weights)


@check
def groups_are_transformers(m):
    config = llama_config()
    theirs, ours = LlamaAttention(config, 0), m.GroupedQueryAttention(32, 4, 2)
    ours.load_state_dict(theirs.state_dict())
    x, mask = random(2, 5, 32), m.causal_mask(5)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(5)[None])
    additive = torch.zeros(5, 5).masked_fill(~mask, float("-inf"))[None, None]
    with torch.no_grad():
        expected, expected_weights = theirs(x, (cos, sin), additive)
        output, weights = ours(x, mask, (cos[0], sin[0]))
    close(output, expected)
    close(weights, expected_weights)


# --- positions ---------------------------------------------------------------------------------------------------


@check
def sinusoids_are_transformers(m):
    theirs = torch.empty(128, DistilBertConfig().dim)
    create_sinusoidal_embeddings(*theirs.shape, out=theirs)
    close(m.sinusoidal_positions(*theirs.shape), theirs)


@check
def rotary_is_transformers(m):
    for base in (10_000.0, 500.0):
        config = llama_config()
        config = LlamaConfig(**config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": base}})
        x, positions = random(2, 4, 6, 8), torch.tensor([0, 1, 2, 7, 40, 600])
        theirs = LlamaRotaryEmbedding(config)(x, positions[None])
        ours = m.rotary_angles(positions, m.rotary_frequencies(8, base))
        close(ours[0], theirs[0][0])
        close(ours[1], theirs[1][0])
        close(m.apply_rotary(x, *ours), apply_rotary_pos_emb(x, x, *theirs)[0])


@check
def rotary_scores_depend_on_distance(m):
    query, key, frequencies = random(1, 16), random(1, 16, seed=1), m.rotary_frequencies(16)

    def score(i, j):
        turned = [
            m.apply_rotary(x, *m.rotary_angles(torch.tensor([p]), frequencies)) for x, p in ((query, i), (key, j))
        ]
        return turned[0] @ turned[1].T

    close(score(3, 1), score(103, 101), atol=1e-4)
    assert (score(3, 1) - score(1, 3)).abs() > 1e-2


@check
def alibi_is_blooms(m):
    for heads in (1, 2, 8, 12, 40, 112):
        n = 7
        theirs = build_alibi_tensor(torch.ones(1, n, dtype=torch.long), heads, torch.float32)  # (heads, 1, n)
        ours = m.alibi_bias(heads, n)
        assert ours.shape == (heads, n, n)
        # BLOOM adds slope times the key's place; the softmax forgives a constant for each query.
        blocked = ~m.causal_mask(n)
        weights = [
            scores.expand(heads, n, n).masked_fill(blocked, float("-inf")).softmax(-1) for scores in (ours, theirs)
        ]
        close(*weights)
        close(m.alibi_slopes(heads), theirs[:, 0, 1])
        assert (ours <= 0).all()


@check
def t5_buckets_are_transformers(m):
    for is_decoder in (False, True):
        for buckets, furthest in ((32, 128), (8, 20)):
            config = T5Config(
                d_model=8, d_kv=4, num_heads=3, is_decoder=is_decoder, relative_attention_num_buckets=buckets,
                relative_attention_max_distance=furthest,
            )  # fmt: skip
            theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
            nn.init.normal_(theirs.relative_attention_bias.weight)
            ours = m.t5_buckets(150, 170, bidirectional=not is_decoder, buckets=buckets, max_distance=furthest)
            expected = theirs.compute_bias(150, 170)
            with torch.no_grad():
                close(theirs.relative_attention_bias(ours).permute(2, 0, 1)[None], expected, atol=0)


# --- the LLaMA ---------------------------------------------------------------------------------------------------


@check
def norm_is_transformers(m):
    theirs, ours = LlamaRMSNorm(16, eps=1e-2), m.RMSNorm(16, eps=1e-2)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    for x in (random(3, 16, scale=0.1), random(3, 16, scale=50).bfloat16()):
        close(ours(x), theirs(x), atol=1e-6)
        assert ours(x).dtype == theirs(x).dtype


@check
def swiglu_is_transformers(m):
    theirs, ours = LlamaMLP(llama_config()), m.SwiGLU(32, 48)
    ours.load_state_dict(theirs.state_dict())
    close(ours(random(3, 32)), theirs(random(3, 32)), atol=1e-6)


LLAMAS = {
    "grouped": {},
    "multi-head": dict(num_key_value_heads=4),
    "tied, one key-value head": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "biases and odd heads": dict(attention_bias=True, mlp_bias=True, head_dim=12),
    "another base": dict(rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
    "llama3 angles": dict(
        rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "yarn angles": dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}),
}  # fmt: skip


@check
def llama_logits_are_transformers(m):
    for name, more in LLAMAS.items():
        theirs = lively_llama(LlamaConfig(**llama_config().to_dict() | more))
        ours = m.Llama.from_transformers(theirs)
        ids = torch.randint(67, (2, 30), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = theirs(ids).logits
            try:
                close(ours(ids), expected, atol=1e-4)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            close(ours(ids, last_only=True), expected[:, -1:], atol=1e-4)


@check
def llama_text_is_transformers(m):
    theirs = lively_llama(llama_config())
    ours = m.Llama.from_transformers(theirs)
    for seed in range(3):
        ids = torch.randint(67, (1, 9), generator=torch.Generator().manual_seed(seed))
        settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = theirs.generate(ids, max_new_tokens=20, **settings)[0, 9:].tolist()
        assert ours.generate(ids, 20) == expected
        assert ours.generate(ids, 20, use_cache=False) == expected
        stop = expected[4]
        assert ours.generate(ids, 20, eos_token_ids=[stop]) == expected[: expected.index(stop) + 1]


@check
def cache_changes_nothing(m):
    ours = m.Llama.from_transformers(lively_llama(llama_config()))
    ids = torch.randint(67, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = ours(ids)
        for pieces in ([12], [5, 7], [1] * 12, [4, 1, 6, 1]):
            cache, parts = m.KeyValueCache(), []
            for piece in ids.split(pieces, 1):
                parts.append(ours(piece, cache))
                assert cache.length == sum(part.shape[1] for part in parts)
            close(torch.cat(parts, 1), whole, atol=1e-4)
    keys, values = cache.layers[0]
    assert len(cache.layers) == 2
    assert keys.shape == values.shape == (2, 2, 12, 8)


@check
def llama_shares_its_weights(m):
    theirs = lively_llama(LlamaConfig(**llama_config().to_dict() | dict(tie_word_embeddings=True)))
    ours = m.Llama.from_transformers(theirs)
    assert ours.layers[1].mlp.up_proj.weight.data_ptr() == theirs.model.layers[1].mlp.up_proj.weight.data_ptr()
    assert ours.lm_head.weight is ours.embed_tokens.weight
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    fresh = m.Llama(theirs.config)
    assert fresh.lm_head.weight is fresh.embed_tokens.weight


@check
def maps_are_the_weights_of_the_model(m):
    theirs = lively_llama(llama_config())
    ids = [3, 1, 4, 1, 5]
    theirs.set_attn_implementation("sdpa")
    maps = m.attention_maps(theirs, ids)
    assert theirs.config._attn_implementation == "sdpa"
    assert maps.shape == (2, 4, 5, 5)
    close(maps.sum(-1), torch.ones(2, 4, 5))
    assert (maps[..., ~m.causal_mask(5)] == 0).all()
    ours = m.Llama.from_transformers(theirs)
    seen = []
    for layer in ours.layers:
        layer.self_attn.register_forward_hook(lambda *call: seen.append(call[2][1]))
    with torch.no_grad():
        ours(torch.tensor([ids]))
    close(maps, torch.cat(seen), atol=1e-5)


@check
def patterns_point_where_they_say(m):
    patterns = m.head_patterns([7, 8, 9, 7, 8])
    points = {name: set(map(tuple, pattern.nonzero().tolist())) for name, pattern in patterns.items()}
    assert points == {
        "the first token": {(1, 0), (2, 0), (3, 0), (4, 0)},
        "the token before": {(1, 0), (2, 1), (3, 2), (4, 3)},
        "itself": {(1, 1), (2, 2), (3, 3), (4, 4)},
        "the same token, earlier": {(3, 0), (4, 1)},
        "what followed the same token": {(3, 1), (4, 2)},
    }


# --- on paper ----------------------------------------------------------------------------------------------------


@check
def counts_are_the_published_ones(m):
    for published in m.PUBLISHED.values():
        count = m.build_on_meta(published).num_parameters()
        assert abs(count / published.parameters - 1) < 0.02, f"{published.name}: {count:,}"
        assert published.source, published.name
        assert published.run_source or not (published.tokens or published.gpu_hours or published.flops), published.name


@check
def operations_are_as_torch_counts_them(m):
    assert m.flops_per_token(5, training=True) == 3 * m.flops_per_token(5)
    for name in ("FLAN-T5-XXL", "LLaMA-7B"):
        model, share = m.build_on_meta(m.PUBLISHED[name]), m.PUBLISHED[name].active_share
        assert 0.95 < m.counted_flops(model, 256) / m.flops_per_token(model.num_parameters(), share) < 1.05, name


@check
def published_operations_follow_the_rule(m):
    for name in ("GPT-3 175B", "T5-11B", "Chinchilla-70B"):
        published = m.PUBLISHED[name]
        run = m.training_run(published.parameters, published.tokens, active_share=published.active_share)
        assert abs(run.flops / published.flops - 1) < 0.05, name
    run = m.training_run(1e9, 2e10, peak_flops=1e14, utilisation=0.5, price_per_hour=3.0)
    assert run.gpu_hours == pytest.approx(6 * 1e9 * 2e10 / 5e13 / 3600)
    assert run.cost == pytest.approx(3 * run.gpu_hours)


@check
def training_bytes_are_those_of_torch(m):
    model = lively_llama(llama_config())
    count = model.num_parameters()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    measured = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "Adam's moments": sum(moment.nbytes for moment in moments),
    }
    assert m.training_bytes(count, "fp32") == measured
    assert sum(m.training_bytes(100, "bf16").values()) == 1600  # Rajbhandari et al. 2020, section 3.1
    assert sum(m.training_bytes(100, "int8").values()) == 1000
    assert sum(m.training_bytes(100, "4 bit", adapter_share=0.01).values()) == 66


@check
def cache_bytes_are_those_of_the_cache(m):
    config = llama_config()
    cache = m.KeyValueCache()
    with torch.no_grad():
        m.Llama.from_transformers(lively_llama(config))(torch.ones(3, 11, dtype=torch.long), cache)
    measured = sum(tensor.nbytes for pair in cache.layers for tensor in pair)
    assert m.cache_bytes(config, 11, batch=3, bytes_each=4) == measured


# --- 8 and 4 bits ------------------------------------------------------------------------------------------------


@check
def packed_weights_multiply_as_written_out(m):
    weight, bias = random(32, 128, scale=0.1), random(32, seed=1)
    weight[3] = 0  # a row without any scale
    x = random(2, 3, 128, seed=2)
    exact = F.linear(x, weight, bias)
    for bits, steps in ((8, 127), (4, 7.5)):
        step = weight.abs().amax() / steps
        layer = m.QuantizedLinear(weight, bias, bits)
        written_out = (layer(torch.eye(128)) - bias).T
        assert (written_out - weight).abs().max() <= 0.51 * step, bits
        close(layer(x), F.linear(x, written_out, bias), atol=1e-4)
        assert 0 < (layer(x) - exact).abs().max() < 40 * step
        assert m.model_bytes(layer) < weight.nbytes * bits / 32 * 1.3 + bias.nbytes
        assert layer(x.bfloat16()).dtype == torch.bfloat16 if layer.scale.dtype == torch.bfloat16 else True


@check
def quantize_replaces_the_linear_layers(m):
    for bits in (8, 4):
        model = lively_llama(
            LlamaConfig(
                **llama_config().to_dict() | dict(vocab_size=96, hidden_size=64, intermediate_size=128, head_dim=16)
            )
        )
        exact, ids = copy.deepcopy(model), torch.randint(67, (1, 6), generator=torch.Generator().manual_seed(0))
        assert m.quantize(model, bits) is model
        kinds = {type(module).__name__ for name, module in model.named_modules() if "proj" in name}
        assert kinds == {"QuantizedLinear"}
        assert isinstance(model.lm_head, nn.Linear)
        assert m.model_bytes(model) < m.model_bytes(exact) / 2
        with torch.no_grad():
            agree = torch.corrcoef(torch.stack([model(ids).logits.flatten(), exact(ids).logits.flatten()]))[0, 1]
        assert agree > (0.999 if bits == 8 else 0.7), (bits, agree)


# --- the checks run on the module itself -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_the_module_passes(name):
    CHECKS[name](architectures)


# --- and on copies with one thing broken -------------------------------------------------------------------------

MUTATIONS = [
    ("causal mask transposed", ".tril(diagonal=past)", ".triu(diagonal=past)", "masks"),
    ("causal mask forgets the past", ".tril(diagonal=past)", ".tril()", "masks"),
    ("causal mask hides the position itself", ".tril(diagonal=past)", ".tril(diagonal=past - 1)", "masks"),
    ("prefix sees only its past", "causal_mask(length) | sees_prefix[..., None, :]", "causal_mask(length)", "masks"),
    ("prefix sees what follows it", "sees_prefix[..., None, :]", "sees_prefix[..., :, None]", "masks"),
    ("prefix one too long", "torch.arange(length) < prefix", "torch.arange(length) <= prefix", "masks"),
    ("only the prefix is seen", "causal_mask(length) | sees_prefix", "causal_mask(length) & sees_prefix", "masks"),
    ("prefix sees what follows it, in a batch", "sees_prefix[..., None, :]", "sees_prefix[..., :, None]", "prefix_masks_of_a_batch"),
    ("the longest prefix for all", "< prefix[..., None]", "< prefix.max().expand(prefix.shape)[..., None]", "prefix_masks_of_a_batch"),
    ("the batch's masks in the wrong order", "< prefix[..., None]", "< prefix.flatten().flip(0).view(prefix.shape)[..., None]", "prefix_masks_of_a_batch"),
    ("source sees the target", "mask[source:, :source] = True", "mask[:source, source:] = True", "masks"),
    ("no scale", " / math.sqrt(query.shape[-1])", "", "attention_is_torchs"),
    ("scale without the root", "math.sqrt(query.shape[-1])", "query.shape[-1]", "attention_is_torchs"),
    ("mask turned round", "masked_fill(~mask,", "masked_fill(mask,", "attention_is_torchs"),
    ("masked scores 0", 'float("-inf"))\n    weights', "0.0)\n    weights", "attention_is_torchs"),
    ("bias subtracted", "scores = scores + bias", "scores = scores - bias", "attention_is_torchs"),
    ("softmax over queries", "torch.softmax(scores, dim=-1", "torch.softmax(scores, dim=-2", "attention_is_torchs"),
    ("weights left in fp32", "dtype=torch.float32).to(value.dtype)", "dtype=torch.float32)", "attention_keeps_bf16"),
    ("values returned unweighted", "return weights @ value, weights", "return weights.mean(-2, True) @ value, weights", "attention_is_torchs"),
    ("heads not separated", ".transpose(1, 2)  # (batch", "  # (batch", "heads_are_torchs_multihead_attention"),
    ("heads joined in the wrong order", "output.transpose(1, 2).flatten(2)", "output.reshape(*x.shape[:2], -1)", "heads_are_torchs_multihead_attention"),
    ("query and key swapped", "(self.q_proj, self.k_proj, self.v_proj)", "(self.k_proj, self.q_proj, self.v_proj)", "heads_are_torchs_multihead_attention"),
    ("groups dealt out like cards", "key.repeat_interleave(self.groups, 1), value.repeat_interleave(self.groups, 1)", "key.repeat(1, self.groups, 1, 1), value.repeat(1, self.groups, 1, 1)", "groups_are_transformers"),
    ("keys not turned", "apply_rotary(query, *rotary), apply_rotary(key, *rotary)", "apply_rotary(query, *rotary), key", "groups_are_transformers"),
    ("sine and cosine swapped", "[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]", "sinusoids_are_transformers"),
    ("sinusoids at the wrong speed", "dtype=torch.float64) / width)", "dtype=torch.float64) / width / 2)", "sinusoids_are_transformers"),
    ("rotated half swapped", "torch.cat([-second, first], dim=-1)", "torch.cat([second, -first], dim=-1)", "rotary_is_transformers"),
    ("no minus in the rotation", "torch.cat([-second, first], dim=-1)", "torch.cat([second, first], dim=-1)", "rotary_scores_depend_on_distance"),
    ("rotation not mixed in", "x * cos.to(x.dtype) + rotate_half(x)", "x * cos.to(x.dtype) + x", "rotary_is_transformers"),
    ("rotary neighbours paired", "torch.cat([angles, angles], dim=-1)", "angles.repeat_interleave(2, -1)", "rotary_is_transformers"),
    ("rotary base ignored", "1.0 / base **", "1.0 / 10_000.0 **", "rotary_is_transformers"),
    ("rotary speeds upside down", "1.0 / base **", "base **", "rotary_is_transformers"),
    ("ALiBi rewards distance", "-alibi_slopes(heads)", "alibi_slopes(heads)", "alibi_is_blooms"),
    ("ALiBi slopes too steep", "2 ** (-8 * (i + 1) / power)", "2 ** (-4 * (i + 1) / power)", "alibi_is_blooms"),
    ("ALiBi's further heads", "2 ** (-4 * (2 * i + 1) / power)", "2 ** (-4 * (2 * i + 2) / power)", "alibi_is_blooms"),
    ("T5 directions swapped", "(distance < 0) * buckets", "(distance > 0) * buckets", "t5_buckets_are_transformers"),
    ("T5 both ways halved", "        buckets //= 2\n", "", "t5_buckets_are_transformers"),
    ("T5 without a last bucket", ".long()).clamp(max=buckets - 1)", ".long())", "t5_buckets_are_transformers"),
    ("T5 far distances off by one", "torch.where(distance < exact,", "torch.where(distance <= exact + 1,", "t5_buckets_are_transformers"),
    ("norm without epsilon", "keepdim=True) + self.eps", "keepdim=True)", "norm_is_transformers"),
    ("norm subtracts the mean", "x32 = x.float()", "x32 = x.float() - x.float().mean(-1, keepdim=True)", "norm_is_transformers"),
    ("norm in bf16", "x32 = x.float()", "x32 = x", "norm_is_transformers"),
    ("gate and up swapped", "F.silu(self.gate_proj(x)) * self.up_proj(x)", "F.silu(self.up_proj(x)) * self.gate_proj(x)", "swiglu_is_transformers"),
    ("gate opened by a ReLU", "F.silu(self.gate_proj(x))", "F.relu(self.gate_proj(x))", "swiglu_is_transformers"),
    ("attention not added to the stream", "x = x + self.self_attn(", "x = self.self_attn(", "llama_logits_are_transformers"),
    ("network not added to the stream", "return x + self.mlp(", "return self.mlp(", "llama_logits_are_transformers"),
    ("norms of a block swapped", "self.mlp(self.post_attention_layernorm(x))", "self.mlp(self.input_layernorm(x))", "llama_logits_are_transformers"),
    ("no final norm", "self.lm_head(self.norm(x[:, -1:] if last_only else x))", "self.lm_head(x[:, -1:] if last_only else x)", "llama_logits_are_transformers"),
    ("first position instead of last", "x[:, -1:] if last_only", "x[:, :1] if last_only", "llama_logits_are_transformers"),
    ("scaled angles ignored", 'fixed if kind == "default" else rotary.inv_freq.detach()', "fixed", "llama_logits_are_transformers"),
    ("rotary scale ignored", "llama.rotary_scale = rotary.attention_scaling", "pass", "llama_logits_are_transformers"),
    ("positions start again after the cache", "torch.arange(past, past + n,", "torch.arange(n,", "cache_changes_nothing"),
    ("mask forgets what was read", "mask = causal_mask(n, past)", "mask = causal_mask(n + past)[:n]", "cache_changes_nothing"),
    ("cache the wrong way round", "torch.cat([old_key, key], 2)", "torch.cat([key, old_key], 2)", "cache_changes_nothing"),
    ("cache takes the layer's input", "key, value = cache.append(layer, key, value)", "cache.append(layer, key, value)", "cache_changes_nothing"),
    ("likeliest becomes unlikeliest", "[0, -1].argmax()", "[0, -1].argmin()", "llama_text_is_transformers"),
    ("EOS ignored", "written[-1] in eos_token_ids", "False", "llama_text_is_transformers"),
    ("uncached text forgets the prompt", "else torch.cat([input_ids, new], 1)", "else new", "llama_text_is_transformers"),
    ("tied weights come apart", "            llama.lm_head.weight = llama.embed_tokens.weight\n", "            pass\n", "llama_shares_its_weights"),
    ("weights copied", "load_state_dict(weights, assign=True)", "to_empty(device='cpu').load_state_dict(weights)", "llama_shares_its_weights"),
    ("attention left eager", "model.set_attn_implementation(used)", "pass", "maps_are_the_weights_of_the_model"),
    ("induction looks at the copy", "earlier_copy.roll(1, dims=1) &", "earlier_copy &", "patterns_point_where_they_say"),
    ("induction looks one too far back", "earlier_copy.roll(1, dims=1)", "earlier_copy.roll(-1, dims=1)", "patterns_point_where_they_say"),
    ("a fifth of Chinchilla's layer missing", '"Chinchilla-70B", "xlnet", dict(vocab_size=32000, d_model=8192, n_layer=80, n_head=64, d_inner=32768)', '"Chinchilla-70B", "gpt2", dict(vocab_size=32000, n_embd=8192, n_layer=80, n_head=64)', "counts_are_the_published_ones"),
    ("LLaMA-13B with 32 layers", "5120, 13824, 40, 40,", "5120, 13824, 32, 40,", "counts_are_the_published_ones"),
    ("encoder-decoder meets all weights", 'return 0.5 if self.kind == "t5" else 1.0', "return 1.0", "operations_are_as_torch_counts_them"),
    ("training costs as much as reading", "(6 if training else 2)", "(2 if training else 2)", "operations_are_as_torch_counts_them"),
    ("utilisation multiplied", "(peak_flops * utilisation)", "peak_flops * utilisation", "published_operations_follow_the_rule"),
    ("one moment only", '"fp32": {"weights": 4.0, "gradients": 4.0, "Adam\'s moments": 8.0}', '"fp32": {"weights": 4.0, "gradients": 4.0, "Adam\'s moments": 4.0}', "training_bytes_are_those_of_torch"),
    ("no fp32 copy in bf16", '"bf16": {"weights": 2.0, "gradients": 2.0, "fp32 copy": 4.0,', '"bf16": {"weights": 2.0, "gradients": 2.0,', "training_bytes_are_those_of_torch"),
    ("cache holds keys only", "return 2 * config.num_hidden_layers", "return config.num_hidden_layers", "cache_bytes_are_those_of_the_cache"),
    ("cache counted with all heads", "config.num_key_value_heads * config.head_dim * length", "config.num_attention_heads * config.head_dim * length", "cache_bytes_are_those_of_the_cache"),
    ("7 bits for 8", ".clamp(min=1e-9) / 127", ".clamp(min=1e-9) / 63", "packed_weights_multiply_as_written_out"),
    ("4 bits centred wrongly", "zero = low + 8 * scale", "zero = low + 7 * scale", "packed_weights_multiply_as_written_out"),
    ("quantised bias lost", "return output if self.bias is None else output + self.bias", "return output", "packed_weights_multiply_as_written_out"),
    ("output layer quantised", " or layer is output", "", "quantize_replaces_the_linear_layers"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "old", "new", "caught_by"), MUTATIONS, ids=[row[0] for row in MUTATIONS])
def test_a_broken_module_is_caught(what, old, new, caught_by):
    module = broken_copy(architectures, old, new)
    with pytest.raises(Exception):  # noqa: B017, PT011 - broken code may fail in any way
        CHECKS[caught_by](module)


def test_every_check_catches_a_mutation():
    assert {row[3] for row in MUTATIONS} == set(CHECKS)


# --- the embedded model, errors ----------------------------------------------------------------------------------


def test_the_embedded_model_writes_the_same_text_in_this_code():
    model, tokenizer = load_model("smollm2-135m-instruct", dtype=torch.float32, device="cpu")
    ids = tokenizer("The three primary colours are", return_tensors="pt").input_ids
    ours = architectures.Llama.from_transformers(model)
    with torch.no_grad():
        close(ours(ids), model(ids).logits, atol=1e-3)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert ours.generate(ids, 12) == expected
    published = architectures.PUBLISHED["SmolLM2-135M (embedded)"]
    config = AutoConfig.for_model(published.kind, **published.config)
    for name in (*published.config, "num_key_value_heads", "head_dim"):
        assert getattr(config, name) == getattr(model.config, name), name
    assert sum(p.numel() for p in ours.parameters()) == model.num_parameters()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_maps_and_packed_weights_work_for_every_kind(kind, tiny_folders):
    model, _ = load_model(tiny_folders[kind], dtype=torch.float32, device="cpu")
    maps = architectures.attention_maps(model, [5, 6, 7, 8])
    assert maps.shape == (2, 4, 4, 4)
    close(maps.sum(-1), torch.ones(2, 4, 4))
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])} | (
        {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
    )
    before = model(**inputs).logits
    architectures.QuantizedLinear.GROUP, group = 32, architectures.QuantizedLinear.GROUP  # the tiny models are 32 wide
    try:
        for bits in (8, 4):
            packed = architectures.quantize(copy.deepcopy(model), bits)
            after = packed(**inputs).logits
            assert after.isfinite().all()
            assert 0 < (after - before).abs().max() < before.abs().max()
    finally:
        architectures.QuantizedLinear.GROUP = group


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: architectures.prefix_mask(4, 3), ["prefix=4", "length=3"]),
        (lambda: architectures.prefix_mask(-1, 3), ["prefix=-1", "length=3"]),
        (lambda: architectures.prefix_mask(torch.tensor([1, 5]), 3), ["prefix=[1, 5]", "length=3"]),
        (lambda: architectures.attention(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 4)), ["(2, 3)", "(2, 4)"]),
        (lambda: architectures.attention(torch.ones(2, 3), torch.ones(2, 3), torch.ones(5, 4)), ["(5, 4)"]),
        (lambda: architectures.sinusoidal_positions(4, 5), ["width=5"]),
        (lambda: architectures.rotary_frequencies(7), ["head_dim=7"]),
        (lambda: architectures.GroupedQueryAttention(32, 4, 3), ["heads=4", "kv_heads=3"]),
        (lambda: architectures.GroupedQueryAttention(30, 4, 2), ["width=30"]),
        (lambda: architectures.Llama.from_transformers(nn.Linear(1, 1)), ["Linear", "LlamaForCausalLM"]),
        (lambda: architectures.Llama.from_transformers(LlamaForCausalLM(LlamaConfig(**llama_config().to_dict() | {"hidden_act": "gelu"}))), ["'gelu'"]),
        (lambda: architectures.training_bytes(1, "fp8"), ["'fp8'", "bf16"]),
        (lambda: architectures.training_run(1, 1, utilisation=40), ["utilisation=40"]),
        (lambda: architectures.quantize(lively_llama(llama_config()), 3), ["bits=3"]),
        (lambda: architectures.quantize(lively_llama(llama_config()), 4), ["LlamaForCausalLM", "4-bit"]),
    ],
)  # fmt: skip
def test_errors_name_the_value_and_the_remedy(call, words):
    with pytest.raises(architectures.ArchitectureError) as caught:
        call()
    assert isinstance(caught.value, LabError)
    for word in words:
        assert word in str(caught.value)


def test_the_llama_fits_in_about_a_hundred_lines():
    parts = ("RMSNorm", "SwiGLU", "KeyValueCache", "GroupedQueryAttention", "LlamaBlock", "Llama")
    lines = [line for part in parts for line in code_lines(getattr(architectures, part))]
    assert len(lines) <= 110


def code_lines(thing):
    """Source lines without docstrings, comments and empty ones."""
    import ast

    tree = ast.parse(inspect.getsource(thing))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return [line for line in ast.unparse(tree).splitlines() if line.strip()]
