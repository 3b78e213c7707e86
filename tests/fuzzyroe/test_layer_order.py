"""Promises of the criteria that order layers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fuzzyroe.attach import attach, find_decoder_layers
from fuzzyroe.layer_order import attention_rank, block_influence, order_by, perplexity_order
from fuzzyroe.plan_search import losses_under
from labelled_batches import labelled


def silence(layer):
    """Make a layer the identity."""
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def rows_alone(inputs):
    """Each prompt alone, without its padding, as a batch of one."""
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        yield labelled({"input_ids": ids[mask].unsqueeze(0), "attention_mask": torch.ones(1, int(mask.sum()))})


@pytest.mark.parametrize("is_attached", [False, True])
def test_block_influence_is_one_minus_the_cosine_over_tokens(tiny_decoder, padded_prompts, is_attached):
    silence(find_decoder_layers(tiny_decoder)[2])
    alone = list(rows_alone(padded_prompts))
    changes = []
    with torch.no_grad():
        for batch in alone:
            states = tiny_decoder(**batch.inputs, output_hidden_states=True).hidden_states[:4]  # the last is normed
            pairs = zip(states[:-1], states[1:], strict=True)
            changes.append(torch.stack([1 - F.cosine_similarity(a[0], b[0], dim=-1) for a, b in pairs]))
    expected = torch.cat(changes, dim=1).mean(dim=1)
    if is_attached:
        attach(tiny_decoder, 4, "xavier")
    found = torch.from_numpy(block_influence(tiny_decoder, [labelled(padded_prompts)]))
    assert found.shape == (4,)
    torch.testing.assert_close(found[:3].float(), expected, atol=1e-4, rtol=1e-3)
    assert order_by(found)[0] == 2 and found[2].abs() < 1e-6
    torch.testing.assert_close(torch.from_numpy(block_influence(tiny_decoder, alone)), found, atol=1e-4, rtol=1e-3)
    hooks = [len(layer._forward_hooks) for layer in find_decoder_layers(tiny_decoder)]
    block_influence(tiny_decoder, alone)
    assert [len(layer._forward_hooks) for layer in find_decoder_layers(tiny_decoder)] == hooks


def test_the_order_leaves_the_first_layer_out_unless_it_is_asked_for():
    assert order_by([0.0, 0.3, 0.1, 0.2]) == [2, 3, 1]
    assert order_by([0.0, 0.3, 0.1, 0.2], [0, 1]) == [0, 1]


@torch.no_grad()
def test_attention_rank_is_the_rank_of_the_maps_without_padding(tiny_decoder, padded_prompts):
    tiny_decoder.set_attn_implementation("eager")
    expected = []
    for batch in rows_alone(padded_prompts):
        maps = tiny_decoder(**batch.inputs, output_attentions=True).attentions
        ranks = [torch.linalg.matrix_rank(layer[0], rtol=0.1).float().mean() / layer.shape[-1] for layer in maps]
        expected.append(torch.stack(ranks))
    found = torch.from_numpy(attention_rank(tiny_decoder, [labelled(padded_prompts)], tolerance=0.1))
    torch.testing.assert_close(found.float(), torch.stack(expected).mean(dim=0))
    assert 0 < found.min() < found.max() <= 1


def test_attention_rank_needs_maps(tiny_llama, padded_prompts):
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        attention_rank(tiny_llama, [labelled(padded_prompts)])


def test_the_perplexity_order_takes_the_layer_that_costs_least_at_each_step(tiny_llama, padded_prompts):
    attach(tiny_llama, 4, "xavier")
    batch = labelled(padded_prompts)
    order = perplexity_order(tiny_llama, [batch], 3)
    assert sorted(order) == [1, 2, 3]

    def loss_without(*layers):
        keep = torch.ones(4, 4, dtype=torch.bool)
        keep[:, list(layers)] = False
        return float(losses_under(tiny_llama, batch, keep).mean())

    assert loss_without(order[0]) < min(map(loss_without, order[1:]))
    assert loss_without(*order[:2]) < loss_without(order[0], order[2])
    assert perplexity_order(tiny_llama, [batch], 1, candidates=[0, 2])[0] in (0, 2)
