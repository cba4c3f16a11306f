import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.networks import Encoder, QNetwork, flatten_parameters, mlp
from rlfeed.errors import SpaceError


def encoder(space):
    return Encoder(space, torch.Generator().manual_seed(0))


def sample(space, rows, seed=0):
    space.seed(seed)
    drawn = [space.sample() for _ in range(rows)]
    if isinstance(space, spaces.Dict):
        return {key: torch.from_numpy(np.stack([d[key] for d in drawn])) for key in space.spaces}
    return torch.from_numpy(np.stack(drawn))


def test_encoder_of_discrete_is_one_hot_from_its_start():
    out = encoder(spaces.Discrete(3, start=5))(torch.tensor([5, 7]))
    assert out.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_encoder_of_multidiscrete_is_one_hot_of_each_entry():
    out = encoder(spaces.MultiDiscrete([2, 3], start=[0, 10]))(torch.tensor([[0, 12], [1, 10]]))
    assert out.tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]


def test_encoder_of_numbers_flattens_them():
    out = encoder(spaces.Box(-9, 9, (2, 2), np.float64))(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64))
    assert out.dtype == torch.float32
    assert out.tolist() == [[1, 2, 3, 4]]


def test_encoder_of_a_uint8_vector_scales_it_by_its_bound():
    assert encoder(spaces.Box(0, 4, (2,), np.uint8))(torch.tensor([[4, 1]], dtype=torch.uint8)).tolist() == [[1, 0.25]]


@pytest.mark.parametrize(
    ("space", "features"),
    [(spaces.Discrete(3), 3), (spaces.MultiDiscrete([2, 3]), 5), (spaces.Box(-1, 1, (2, 2)), 4)],
)
def test_encoder_of_no_rows_gives_no_rows(space, features):
    """A block in which no episode ends has no final observations."""
    assert encoder(space)(sample(space, 1)[:0]).shape == (0, features)


def test_encoder_of_dict_takes_leaves_by_name_in_any_order():
    pair = spaces.Tuple([spaces.Box(0, 1, (1,)), spaces.MultiBinary(2)])
    net = encoder(spaces.Dict({"a": spaces.Discrete(2), "b": pair}))
    b = (torch.tensor([[0.5]]), torch.tensor([[1, 0]], dtype=torch.int8))
    out = net({"b": b, "a": torch.tensor([1])})
    assert out.tolist() == [[0, 1, 0.5, 1, 0]]


@pytest.mark.parametrize(
    "shape", [(84, 84, 1), (84, 84, 3), (4, 84, 84), (8, 8, 1), (3, 5, 5), (2, 2, 2), (210, 160, 3), (84, 84), (1, 1)]
)
def test_encoder_of_images_of_any_size_gives_the_features_it_announces(shape):
    space = spaces.Box(0, 255, shape, np.uint8)
    net = encoder(space)
    out = net(sample(space, 3))
    assert out.shape == (3, net.features)
    assert net.features <= 6 * 64 * (6 * 210 // 160 + 1)


def test_encoder_of_images_channels_first_and_last_agree():
    last, first = (encoder(spaces.Box(0, 255, shape, np.uint8)) for shape in ((12, 12, 3), (3, 12, 12)))
    image = sample(spaces.Box(0, 255, (12, 12, 3), np.uint8), 4)
    assert torch.equal(last(image), first(image.permute(0, 3, 1, 2).contiguous()))


def test_encoder_of_a_bool_grid_with_channels_sees_what_it_sees_in_uint8():
    grid, bits = (encoder(spaces.Box(0, 1, (10, 10, 4), dtype)) for dtype in (np.bool_, np.uint8))
    assert len(grid.state_dict()) == len(bits.state_dict()) == 2
    shown = torch.rand(3, 10, 10, 4, generator=torch.Generator().manual_seed(5)) < 0.3
    torch.testing.assert_close(grid(shown), bits(shown.to(torch.uint8)))


def test_encoder_of_images_sees_where_a_pixel_is():
    net = encoder(spaces.Box(0, 1, (10, 10, 1), np.uint8))
    images = torch.zeros(2, 10, 10, 1, dtype=torch.uint8)
    images[0, 2, 3], images[1, 3, 2] = 1, 1
    a, b = net(images)
    assert not torch.allclose(a, b)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Dict({"ok": spaces.Discrete(2), "says": spaces.Text(4)}), r'observation_space\["says"\]: is Text'),
        (spaces.Tuple([spaces.Discrete(2), spaces.Box(0, 1, (0,))]), r"observation_space\[1\]: has shape \(0,\)"),
    ],
)
def test_encoder_of_an_unsupported_space_names_the_part(space, message):
    with pytest.raises(SpaceError, match=message):
        encoder(space)


def test_q_network_dueling_centres_advantages():
    net = QNetwork(spaces.Box(-1, 1, (3,)), 4, (8,), dueling=True, generator=torch.Generator().manual_seed(1))
    observation = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    value = net.value(net.trunk[0](net.encoder(observation)).relu())
    assert torch.allclose(net(observation).mean(dim=1), value.squeeze(1), atol=1e-6)


def test_q_network_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    space = spaces.Dict({"v": spaces.Box(-1, 1, (3,)), "i": spaces.Box(0, 255, (16, 16, 3), np.uint8)})
    nets = [QNetwork(space, 2, (8,), dueling=True, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_flatten_parameters_steps_and_gradients_are_those_of_each_layer():
    plain, flat = (mlp(3, (4, 2), torch.Generator().manual_seed(5)) for _ in range(2))
    weights, gradient = flatten_parameters(flat)
    optimizers = [torch.optim.Adam(plain.parameters(), lr=0.1), torch.optim.Adam([weights], lr=0.1)]
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(6))
    for _ in range(3):
        for net, optimizer in zip((plain, flat), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=net is plain)
            gradient.zero_()
            net(inputs).square().sum().backward()
            optimizer.step()
        assert torch.equal(gradient, torch.cat([p.grad.flatten() for p in plain.parameters()]))
        assert all(torch.allclose(a, b) for a, b in zip(plain.parameters(), flat.parameters(), strict=True))
    flat.load_state_dict({name: torch.zeros_like(value) for name, value in flat.state_dict().items()})
    assert not weights.any()
