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
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_definition(case: dict[str, Any], trained: bool) -> None:
    head, states, tokens = made()
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


def test_bf16_weights_give_fp32_scores() -> None:
    head, states, tokens = made(dtype=torch.bfloat16)
    logp, entropy = head_logprobs(head, states, tokens, Forbidden(NONE, NONE))
    assert logp.dtype == entropy.dtype == torch.float32
    exact, _ = naive(head, states, tokens, Forbidden(NONE, NONE), 1.0, lambda z: z.float())
    torch.testing.assert_close(logp, exact)
    (grad,) = torch.autograd.grad(logp.sum(), states)
    assert grad.dtype == torch.bfloat16


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_of_states_by_vocabulary_is_kept(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest tensor saved for the backward pass: D numbers a state (or the weights), not V; twice V adds nothing."""
    monkeypatch.setattr(lm_head, "_KEPT_CHUNKS", 0)

    def largest(vocabulary: int) -> int:
        head = nn.Linear(D, vocabulary).requires_grad_(trained)
        states, sizes = torch.randn(64, D, requires_grad=True), [0]
        tokens = torch.zeros(64, dtype=torch.long)
        own = {head.weight.data_ptr()}
        keep = lambda t: (sizes.append(0 if t.data_ptr() in own else t.numel()), t)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            head_logprobs(head, states, tokens, Forbidden(NONE, NONE))[0].sum()
        return max(sizes)

    assert largest(500) == largest(1000) <= 64 * D
