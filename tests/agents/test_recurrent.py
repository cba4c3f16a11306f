"""The recurrent core: step by step, in one go, and over the beginnings of episodes."""

import pytest
import torch

from agents.networks import Recurrent, mlp
from rlfeed.nest import leaves


def core(kind, layers):
    return Recurrent(3, 5, torch.Generator().manual_seed(0), kind=kind, layers=layers)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_over_sequences_equals_step_by_step_with_resets_anywhere(kind, layers):
    """B26, B31, B34: what acts and what learns agree, whichever rows begin anew, with any number of layers."""
    recurrent, generator = core(kind, layers), torch.Generator().manual_seed(1)
    features = torch.randn(4, 9, 3, generator=generator)
    is_first = torch.rand(4, 9, generator=generator) < 0.3
    begin = recurrent.initial_carry(4)
    begin = tuple(leaf + 0.5 for leaf in begin) if kind == "lstm" else begin + 0.5
    outputs, after = recurrent(features, begin, is_first)

    carry, stepped = begin, []
    for t in range(9):
        keep = (~is_first[:, t]).float()[:, None, None]
        carry = tuple(leaf * keep for leaf in carry) if kind == "lstm" else carry * keep
        output, carry = recurrent.step(features[:, t], carry)
        stepped.append(output)
    torch.testing.assert_close(outputs, torch.stack(stepped, dim=1), rtol=0, atol=1e-6)
    for (_, one), (_, other) in zip(leaves(after), leaves(carry), strict=True):
        assert one.shape == (4, layers, 5)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_recurrent_after_a_reset_knows_nothing_of_before():
    recurrent = core("lstm", 1)
    features = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(2))
    other = features.clone()
    other[:, :2] += 1.0
    is_first = torch.tensor([[False, False, True, False]])
    one, _ = recurrent(features, recurrent.initial_carry(1), is_first)
    two, _ = recurrent(other, recurrent.initial_carry(1), is_first)
    assert not torch.equal(one[:, :2], two[:, :2])
    assert torch.equal(one[:, 2:], two[:, 2:])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_carry_lies_in_its_space(kind):
    recurrent = core(kind, 2)
    carry = recurrent.initial_carry(1)
    carry = tuple(leaf[0].numpy() for leaf in carry) if kind == "lstm" else carry[0].numpy()
    assert recurrent.carry_space.contains(carry)


def test_mlp_with_layer_norm_gives_rows_of_mean_zero_before_the_activation():
    network = mlp(3, (8,), torch.Generator().manual_seed(0), activation=torch.nn.Identity, layer_norm=True)
    out = network(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(out.mean(dim=1), torch.zeros(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.var(dim=1, unbiased=False), torch.ones(6), rtol=0, atol=1e-2)
