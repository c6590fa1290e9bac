"""Fusions against hand arithmetic and torch's own attention, and padding that must not leak."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention
from torch.testing import assert_close

from mmft.nn.dropout import sampling_dropout
from mmft.nn.fusion import FUSIONS, build_fusion, masked_mean_pool
from mmft.types import UserError

NAN = float("nan")
LN3 = math.log(3)
DIMS = {"image": 6, "text": 5, "audio": 3}


def batch(rows=4):
    """Three modalities; the last row has no audio, and every row but the first has padding in the text."""
    embeddings = {"image": torch.randn(rows, 4, 6), "text": torch.randn(rows, 7, 5), "audio": torch.randn(rows, 2, 3)}
    masks = {name: torch.ones(x.shape[:2], dtype=torch.bool) for name, x in embeddings.items()}
    masks["text"][1:, 5:] = False
    masks["text"][2, 0] = False
    masks["audio"][-1] = False
    return embeddings, masks


def make(kind, **options):
    return build_fusion(kind, DIMS, hidden=8, heads=2, **options).eval()


# By hand. Row 0: image tokens [1, 3], [3, 5] and padding -> mean [2, 4]; text [10, 20]. Row 1: the same, no image.
IMAGE = torch.tensor([[[1.0, 3.0], [3.0, 5.0], [NAN, NAN]]] * 2)
TEXT = torch.tensor([[[10.0, 20.0]]] * 2)
MASKS = {
    "image": torch.tensor([[True, True, False], [False, False, False]]),
    "text": torch.tensor([[True], [True]]),
}


def by_hand(kind, heads=1):
    """A fusion of two modalities whose projections are the identity, without norms and without MLPs."""
    fusion = build_fusion(kind, {"image": 2, "text": 2}, hidden=2, layers=0, heads=heads).eval()
    for name, module in fusion.named_modules():
        if isinstance(module, nn.Linear) and "project" in name:
            nn.init.eye_(module.weight)
            nn.init.zeros_(module.bias)
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, child_name, nn.Identity())
    return fusion


def run_by_hand(fusion):
    with torch.no_grad():
        return fusion({"image": IMAGE, "text": TEXT}, MASKS)


def test_masked_mean_pool_by_hand():
    assert masked_mean_pool(IMAGE, MASKS["image"]).tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_sum_by_hand():
    # E03: W_image = 2 I, b_image = [1, 0], W_text = I, b_text = [0, -1]
    #   2 [2, 4] + [1, 0] + [10, 20] + [0, -1] = [15, 27]; without an image, and without its b: [10, 19]
    fusion = by_hand("sum")
    with torch.no_grad():
        fusion.project["image"].weight.mul_(2.0)
        fusion.project["image"].bias.copy_(torch.tensor([1.0, 0.0]))
        fusion.project["text"].bias.copy_(torch.tensor([0.0, -1.0]))
    assert run_by_hand(fusion).tolist() == [[15.0, 27.0], [10.0, 19.0]]


def test_weighted_sum_by_hand():
    # E24: w = softmax([ln 3, 0]) = [3/4, 1/4]: 3/4 [2, 4] + 1/4 [10, 20] = [4, 8]; without an image 1/4 [10, 20]
    fusion = by_hand("weighted_sum")
    assert fusion.weights().tolist() == [0.5, 0.5]
    with torch.no_grad():
        fusion.weight_logits.copy_(torch.tensor([LN3, 0.0]))
    assert_close(fusion.weights(), torch.tensor([0.75, 0.25]))
    assert_close(run_by_hand(fusion), torch.tensor([[4.0, 8.0], [2.5, 5.0]]))


def test_attention_fusion_by_hand():
    # E23: [E_1; E_2] = [2, 4, 10, 20], the rows of W_a give ln 3 / 2 x 2 and 0: alpha [3/4, 1/4], H = [4, 8].
    # Without an image alpha = [0, 1].
    fusion = by_hand("attention")
    with torch.no_grad():
        fusion.score.weight.copy_(torch.tensor([[LN3 / 2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert_close(run_by_hand(fusion), torch.tensor([[4.0, 8.0], [10.0, 20.0]]))


def test_coupled_by_hand():
    # E20: W_f [2, 4, 10, 20] + b_f = [2 + 10 + 1/2, 4 - 20]; H_image = 0 without an image
    fusion = by_hand("coupled")
    with torch.no_grad():
        fusion.couple.weight.copy_(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, -1.0]]))
        fusion.couple.bias.copy_(torch.tensor([0.5, 0.0]))
    assert run_by_hand(fusion).tolist() == [[12.5, -16.0], [10.5, -20.0]]


def test_cross_attention_by_hand():
    # E11 with W_q = 0: every token looks at all kept ones alike. Row 0: ([1, 3] + [3, 5] + [10, 20]) / 3 = [14, 28] / 3
    #   from either modality; W_image = I, W_text = 2 I -> 3 x [14, 28] / 3 = [14, 28].
    # Row 1: text alone, [10, 20] x 2.
    fusion = by_hand("cross_attention")
    with torch.no_grad():
        fusion.sequence.modality.zero_()
        nn.init.eye_(fusion.readout.key.weight)
        nn.init.eye_(fusion.readout.value.weight)
        for group, factor in enumerate((1.0, 2.0)):
            nn.init.zeros_(fusion.readout.query[group].weight)
            nn.init.eye_(fusion.readout.out[group].weight).mul_(factor)
    assert_close(run_by_hand(fusion), torch.tensor([[14.0, 28.0], [20.0, 40.0]]))


def torch_attention(module, x, mask, sizes=None):
    """Heads of torch's attention with the module's projections, before W_o."""
    queries = zip(x.split(sizes or [x.shape[1]], 1), module.query, strict=True)
    query = torch.cat([part @ linear.weight.T for part, linear in queries], 1)
    q, k, v = (
        z.view(*z.shape[:2], module.heads, -1).transpose(1, 2)
        for z in (query, x @ module.key.weight.T, x @ module.value.weight.T)
    )
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    return attended.transpose(1, 2).reshape(x.shape)


def torch_mlp(module, x):
    up, _, down = module.mlp
    return x + gelu(layer_norm(x, (8,)) @ up.weight.T + up.bias) @ down.weight.T + down.bias


def torch_sequence(fusion, embeddings, masks):
    parts = []
    for index, name in enumerate(DIMS):
        linear = fusion.sequence.project[name][0]
        projected = embeddings[name] @ linear.weight.T + linear.bias
        parts.append(layer_norm(projected, (8,)) + fusion.sequence.modality[index])
    return torch.cat(parts, 1), torch.cat(list(masks.values()), 1)


def test_cross_attention_is_torchs():
    fusion, (embeddings, masks) = make("cross_attention", layers=1), batch()
    sizes = [4, 7, 2]
    x, mask = torch_sequence(fusion, embeddings, masks)
    block = fusion.blocks[0]
    attended = torch_attention(block.attention, layer_norm(x, (8,)), mask, sizes).split(sizes, 1)
    outs = zip(attended, block.attention.out, strict=True)
    x = torch_mlp(block.mlp, x + torch.cat([part @ linear.weight.T for part, linear in outs], 1))
    # E11: Attention(Q_m, K_all, V_all), averaged over the tokens of m, times W_m, summed over m.
    attended = torch_attention(fusion.readout, layer_norm(x, (8,)), mask, sizes).split(sizes, 1)
    expected = torch.zeros(4, 8)
    for part, kept, linear in zip(attended, masks.values(), fusion.readout.out, strict=True):
        count = kept.sum(1, keepdim=True)
        expected += (part * kept[..., None]).sum(1) / count.clamp(min=1) @ linear.weight.T
    assert_close(fusion(embeddings, masks), expected)


def test_shared_attention_is_torchs():
    fusion, (embeddings, masks) = make("shared_attention", layers=1), batch()
    x, mask = torch_sequence(fusion, embeddings, masks)
    block = fusion.blocks[0]
    attended = torch_attention(block.attention, layer_norm(x, (8,)), mask)
    x = torch_mlp(block.mlp, x + attended @ block.attention.out[0].weight.T)
    assert_close(fusion(embeddings, masks), (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", ["sum", "weighted_sum", "attention"])
def test_the_equation_is_followed_by_mlps(kind):
    fusion, (embeddings, masks) = make(kind, layers=2), batch()
    full = fusion(embeddings, masks)
    norm, first, second = fusion.after
    fusion.after = nn.Identity()
    equation = fusion(embeddings, masks)
    assert_close(full, torch_mlp(second, torch_mlp(first, norm(equation))))


def test_coupled_encoders_meet_only_at_the_end():
    # f(a, b) = g(a) + h(b): the effect of the image is the same whatever the text says. In shared attention it is not.
    embeddings, masks = batch()
    other_image = {**embeddings, "image": torch.randn(4, 4, 6)}
    other_text = {**embeddings, "text": torch.randn(4, 7, 5)}
    both = {**other_image, "text": other_text["text"]}

    def interaction(kind):
        f = make(kind)
        return f(embeddings, masks) + f(both, masks) - f(other_image, masks) - f(other_text, masks)

    assert_close(interaction("coupled"), torch.zeros(4, 8))
    assert interaction("shared_attention").abs().max() > 0.01


def test_attention_weights_depend_on_the_row_and_sum_to_one():
    fusion, (embeddings, masks) = make("attention"), batch()
    tokens = [embeddings[name] for name in DIMS]
    pooled = [masked_mean_pool(x, masks[name]) for x, name in zip(tokens, DIMS, strict=True)]
    present = torch.stack([mask.any(1) for mask in masks.values()], 1)
    alpha = fusion.weights(fusion.projected(pooled, present), present)
    assert_close(alpha.sum(1), torch.ones(4))
    assert alpha[-1, 2].item() == 0.0
    assert not torch.isclose(alpha[0], alpha[1]).any()


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize("padding", [1e6, NAN])
def test_padding_changes_no_bit(kind, padding):
    fusion, (embeddings, masks) = make(kind), batch()
    before = fusion(embeddings, masks)
    assert torch.equal(fusion(embeddings, masks), before)
    for name, x in embeddings.items():
        changed = {**embeddings, name: x.masked_fill(~masks[name].unsqueeze(-1), padding)}
        assert torch.equal(fusion(changed, masks), before), name
    fusion(changed, masks).sum().backward()
    assert all(p.grad.isfinite().all() for p in fusion.parameters())


@pytest.mark.parametrize("kind", FUSIONS)
def test_more_padding_changes_nothing(kind):
    fusion, (embeddings, masks) = make(kind), batch()
    before = fusion(embeddings, masks)
    for name, x in embeddings.items():
        longer = {**embeddings, name: torch.cat([x, torch.randn(4, 9, x.shape[2])], 1)}
        longer_masks = {**masks, name: torch.cat([masks[name], torch.zeros(4, 9, dtype=torch.bool)], 1)}
        assert_close(fusion(longer, longer_masks), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FUSIONS)
def test_rows_do_not_see_each_other(kind):
    fusion, (embeddings, masks) = make(kind), batch()
    whole = fusion(embeddings, masks)
    for row in range(4):
        alone = fusion({n: x[[row]] for n, x in embeddings.items()}, {n: mask[[row]] for n, mask in masks.items()})
        assert_close(alone, whole[[row]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_modality_may_be_absent(kind):
    fusion, (embeddings, masks) = make(kind), batch()
    masked = fusion(embeddings, {**masks, "audio": torch.zeros(4, 2, dtype=torch.bool)})
    empty = {**embeddings, "audio": torch.randn(4, 0, 3)}
    nothing = fusion(empty, {**masks, "audio": torch.zeros(4, 0, dtype=torch.bool)})
    assert_close(nothing, masked, rtol=1e-6, atol=1e-6)
    present = fusion(embeddings, masks)
    assert_close(present[-1], masked[-1], rtol=1e-6, atol=1e-6)
    assert not torch.isclose(present[:-1], masked[:-1], atol=1e-5).all()
    all_absent = fusion(embeddings, {name: torch.zeros_like(mask) for name, mask in masks.items()})
    assert all_absent.isfinite().all()


@pytest.mark.parametrize("kind", FUSIONS)
def test_every_parameter_learns_and_every_modality_counts(kind):
    fusion, (embeddings, masks) = make(kind), batch()
    leaves = {name: x.requires_grad_() for name, x in embeddings.items()}
    # Not the plain sum: every LayerNorm's output sums to 0.
    (fusion(leaves, masks) @ torch.randn(8)).square().sum().backward()
    silent = [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    for name, x in leaves.items():
        assert torch.equal(x.grad.ne(0).any(-1), masks[name]), name


@pytest.mark.parametrize("kind", FUSIONS)
def test_order_of_the_mapping_and_type_of_the_tower(kind):
    fusion, (embeddings, masks) = make(kind), batch()
    expected = fusion(embeddings, masks)
    assert expected.shape == (4, 8)
    assert torch.equal(fusion(dict(reversed(embeddings.items())), dict(reversed(masks.items()))), expected)
    halves = {name: x.bfloat16() for name, x in embeddings.items()}
    assert torch.equal(fusion(halves, masks), fusion({n: x.float() for n, x in halves.items()}, masks))


@pytest.mark.parametrize("kind", FUSIONS)
def test_dropout_can_be_sampled_in_every_fusion(kind):
    fusion, (embeddings, masks) = make(kind, dropout=0.2), batch()
    plain = fusion(embeddings, masks)
    with sampling_dropout(fusion, 0):
        first, second = fusion(embeddings, masks), fusion(embeddings, masks)
    with sampling_dropout(fusion, 0):
        again = fusion(embeddings, masks)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(fusion(embeddings, masks), plain)


def test_fusion_refuses_what_does_not_fit():
    fusion, (embeddings, masks) = make("sum"), batch()
    without_audio = {name: x for name, x in embeddings.items() if name != "audio"}
    with pytest.raises(ValueError, match=r"modalities are \['audio', 'image', 'text'\], got embeddings of \['image'"):
        fusion(without_audio, masks)
    with pytest.raises(ValueError, match=r"image: embeddings must be B x N x 6"):
        fusion({**embeddings, "image": torch.randn(4, 4, 7)}, masks)
    with pytest.raises(ValueError, match=r"text: .*\(4, 6\)"):
        fusion(embeddings, {**masks, "text": torch.ones(4, 6, dtype=torch.bool)})


def test_build_fusion_refuses_what_it_cannot_build():
    with pytest.raises(UserError, match="unknown fusion 'mean': use one of sum, weighted_sum, attention"):
        build_fusion("mean", DIMS, 8)
    with pytest.raises(UserError, match="hidden 8 must be divisible by heads 3"):
        build_fusion("cross_attention", DIMS, 8, heads=3)
    with pytest.raises(ValueError, match="at least one modality"):
        build_fusion("sum", {}, 8)
