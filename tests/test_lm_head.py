"""Log-probabilities straight from hidden states: equal to the plain way, and nothing of N x V kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmft.functional.lm_head as lm_head
from mmft.functional.lm_head import Forbidden, LogitTransform, head_logprobs

N, D, V = 11, 6, 23
NONE = torch.tensor([], dtype=torch.long)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows at a time, and a last chunk of three."""
    monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", 4 * V)


def made(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(False)
    states = torch.randn(N, D, dtype=dtype, requires_grad=True)
    return head, states, torch.randint(3, V, (N,))


def naive(
    head: nn.Linear, states: Tensor, tokens: Tensor, forbidden: Forbidden, temperature: float, transform: Any
) -> Any:
    """Whole logits, from the definition."""
    z = transform(head(states)) / temperature
    banned = torch.zeros(N, V, dtype=torch.bool)
    banned[:, forbidden.always] = True
    if forbidden.is_early_N is not None:
        banned[:, forbidden.early] |= forbidden.is_early_N[:, None]
    logp = z.masked_fill(banned, float("-inf")).log_softmax(-1)
    p = logp.exp()
    return logp.gather(1, tokens[:, None])[:, 0], -(p * logp.masked_fill(banned, 0.0)).sum(-1)


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "banned": {"forbidden": Forbidden(torch.tensor([0, 2]), NONE)},
    "early stops": {"forbidden": Forbidden(NONE, torch.tensor([1, 2]), torch.arange(N) < 5)},
    "soft cap": {"transform": LogitTransform(cap=0.8), "temperature": 1.3},
    "scale": {"transform": LogitTransform(scale=0.25)},
    "all": {
        "transform": LogitTransform(scale=2.0, cap=1.5), "temperature": 0.9,
        "forbidden": Forbidden(torch.tensor([0]), torch.tensor([1]), torch.arange(N) % 2 == 0),
    },
}  # fmt: skip


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "bias"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_definition(case: dict[str, Any], bias: bool, trained: bool) -> None:
    head, states, tokens = made(bias)
    head.requires_grad_(trained)
    options = {"forbidden": Forbidden(NONE, NONE), "temperature": 1.0, "transform": LogitTransform()} | case
    logp, entropy = head_logprobs(head, states, tokens, entropy_grad=True, **options)
    expected_logp, expected_entropy = naive(head, states, tokens, **options)
    torch.testing.assert_close(logp, expected_logp)
    torch.testing.assert_close(entropy, expected_entropy)
    weights = torch.randn(2, N, dtype=torch.float64)
    leaves = [states, *(p for p in head.parameters() if trained)]
    ours = torch.autograd.grad((weights[0] * logp + weights[1] * entropy).sum(), leaves)
    plain = torch.autograd.grad((weights[0] * expected_logp + weights[1] * expected_entropy).sum(), leaves)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradients_are_those_of_finite_differences(entropy_grad: bool) -> None:
    head, states, tokens = made()

    def scores(x: Tensor) -> Any:
        logp, entropy = head_logprobs(head, x, tokens, Forbidden(NONE, NONE), 0.8, entropy_grad=entropy_grad)
        return (logp, entropy) if entropy_grad else logp

    assert torch.autograd.gradcheck(scores, (states,))


def test_an_entropy_that_is_only_measured_has_no_gradient() -> None:
    head, states, tokens = made()
    logp, entropy = head_logprobs(head, states, tokens, Forbidden(NONE, NONE))
    assert logp.requires_grad and not entropy.requires_grad
    assert head_logprobs(head, states, tokens, Forbidden(NONE, NONE), with_entropy=False)[1] is None


def test_a_forbidden_token_is_impossible_and_harmless() -> None:
    head, states, tokens = made()
    tokens[0] = 2
    logp, entropy = head_logprobs(head, states, tokens, Forbidden(torch.tensor([2]), NONE), entropy_grad=True)
    assert logp[0] == float("-inf") and torch.isfinite(logp[1:]).all() and torch.isfinite(entropy).all()
    (grad,) = torch.autograd.grad(logp[1:].sum() + entropy.sum(), states)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_a_forbidden_token_behind_the_end_changes_no_gradient(cap: float | None, trained: bool) -> None:
    """What fills a short row may be forbidden; the loss leaves it out, and 0 times its gradient must be 0."""
    head, states, tokens = made()
    head.requires_grad_(trained)
    tokens[0], keep = 2, torch.arange(N) > 0
    logp, _ = head_logprobs(
        head, states, tokens, Forbidden(torch.tensor([2]), NONE), transform=LogitTransform(cap=cap)
    )  # fmt: skip
    (grad,) = torch.autograd.grad(logp.masked_fill(~keep, 0.0).sum(), states)
    assert torch.equal(grad[0], torch.zeros_like(grad[0])) and torch.isfinite(grad).all() and grad[1:].any(1).all()


def test_every_size_of_chunk_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time, chunks that end with the last row and before it, and all rows at once."""
    head, states, tokens = made()
    forbidden = Forbidden(torch.tensor([0]), torch.tensor([1]), torch.arange(N) % 3 == 0)
    found = []
    for rows in (1, 2, 5, N, 2 * N):
        monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", rows * V)
        logp, entropy = head_logprobs(head, states, tokens, forbidden, 0.7, entropy_grad=True)
        found.append(torch.stack([logp, entropy, torch.autograd.grad((logp + entropy).sum(), states)[0].sum(1)]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_a_frozen_head_of_its_own_kind_gets_no_gradient() -> None:
    """A subclass may compute otherwise than `nn.Linear`: it takes the general way, and stays frozen there."""

    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1 * torch.arange(V)

    head, states, tokens = made()
    shifted = Shifted(D, V, dtype=torch.float64).requires_grad_(False)
    shifted.load_state_dict(head.state_dict())
    for layer in (head, shifted):
        logp, _ = head_logprobs(layer, states, tokens, Forbidden(NONE, NONE))
        states.grad = None
        logp.sum().backward()
        assert states.grad is not None and layer.weight.grad is None and layer.bias.grad is None
        expected, _ = naive(layer, states, tokens, Forbidden(NONE, NONE), 1.0, LogitTransform())
        torch.testing.assert_close(logp, expected)


def test_bf16_weights_give_fp32_scores() -> None:
    head, states, tokens = made(dtype=torch.bfloat16)
    logp, entropy = head_logprobs(head, states, tokens, Forbidden(NONE, NONE))
    assert logp.dtype == entropy.dtype == torch.float32
    exact, _ = naive(head, states, tokens, Forbidden(NONE, NONE), 1.0, lambda z: z.float())
    torch.testing.assert_close(logp, exact)
    (grad,) = torch.autograd.grad(logp.sum(), states)
    (exact_grad,) = torch.autograd.grad(exact.sum(), states)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, exact_grad, atol=4e-3, rtol=1.6e-2)  # two roundings to 8 bits


def saved_for(head: nn.Module, states: int, **options: Any) -> list[int]:
    """Elements of each tensor kept for the backward pass, the head's own weights left out."""
    x, tokens = torch.randn(states, D, requires_grad=True), torch.zeros(states, dtype=torch.long)
    own, sizes = {p.data_ptr() for p in head.parameters()}, []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head_logprobs(head, x, tokens, Forbidden(NONE, NONE), **options)[0].sum()
    return sizes


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_nothing_of_states_by_vocabulary_is_kept(trained: bool) -> None:
    """D numbers a state for the log-probability, D more for a trained entropy, and not V: twice V adds nothing."""
    few, many = (saved_for(nn.Linear(D, v).requires_grad_(trained), 64, entropy_grad=True) for v in (500, 1000))
    assert few == many and max(many) <= 64 * D and sum(many) <= 3 * 64 * D


def test_a_trained_heads_logits_are_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that computing them again would cost more than it saves; with one state more, none."""
    head = nn.Linear(D, V)
    bound = lm_head._KEPT_CHUNKS * 4
    assert max(saved_for(head, bound)) == 4 * V
    assert max(saved_for(head, bound + 1)) <= (bound + 1) * D
