import json
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch

from rlfeed import codec
from rlfeed.errors import CheckpointError, FieldError


def join(state):
    return np.frombuffer(bytearray(b"".join(codec.encode(state))), np.uint8)


def with_header(header, data=b""):
    text = json.dumps(header).encode()
    body = codec.MAGIC + len(text).to_bytes(8, "little") + text + data
    return np.frombuffer(bytearray(body + zlib.crc32(body).to_bytes(8, "little")), np.uint8)


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 2**63, -(2**64), 2**200, 0.1, -0.0, 1e-320, float("inf"), float("-inf"),
        "", "é\n\0", "\ud800", b"", b"\0\xff",
        [], (), {}, [1, [2, (3,)]], (1, "a", b"b", None), {1: {"1": 2}, "1": (1,)},
    ],
    ids=ascii,
)  # fmt: skip
def test_decode_of_encode_plain_value_gives_equal_value_of_equal_type(value):
    back = codec.decode(join(value))

    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_decode_of_encode_int_of_any_size_gives_it_back():
    value = -(10**5000)  # beyond what Python prints in decimal

    assert codec.decode(join(value)) == value


def test_decode_nan_gives_nan():
    assert np.isnan(codec.decode(join(float("nan"))))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(10)[::-3],
        np.array(3.5, np.float32),
        np.zeros((0, 4), np.uint8),
        np.array([True, False]),
        np.array([1 + 2j], np.complex64),
        np.array([1, 256], ">i2"),
        np.array(["a", "bcd"]),
        np.array(["2020-01-01"], "M8[D]"),
        np.array([1.5, np.nan, np.inf], np.float16),
    ],
)
def test_decode_of_encode_array_keeps_dtype_shape_and_bytes(array):
    back = codec.decode(join({"a": array}))["a"]

    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable


@pytest.mark.parametrize("scalar", [np.float32(0.1), np.float64(0.1), np.int8(-3), np.bool_(True), np.str_("hé")])
def test_decode_of_encode_numpy_scalar_keeps_its_type(scalar):
    back = codec.decode(join(scalar))

    assert type(back) is type(scalar)
    assert back == scalar


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor([1.5, -2.0, float("inf")]).bfloat16(),
        torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
        torch.tensor(7),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]).conj(),
        torch.ones(2, requires_grad=True),
    ],
)
def test_decode_of_encode_tensor_keeps_dtype_shape_and_values(tensor):
    back = codec.decode(join([tensor]))[0]

    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert back.tolist() == tensor.tolist()


def test_decode_optimizer_state_continues_bit_equal():
    def trained(updates, model, optimizer):
        for update in range(updates):
            optimizer.zero_grad()
            model(torch.full((4, 3), float(update + 1))).pow(2).sum().backward()
            optimizer.step()
        return model.weight.detach().clone()

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    trained(3, model, optimizer)
    saved = codec.decode(join({"model": model.state_dict(), "optimizer": optimizer.state_dict()}).copy())
    expected = trained(2, model, optimizer)
    other = torch.nn.Linear(3, 2)
    resumed = torch.optim.Adam(other.parameters(), lr=0.5)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])

    assert torch.equal(trained(2, other, resumed), expected)


def test_encode_large_array_gives_a_view_of_it():
    array = np.zeros(1000, np.int64)
    parts = codec.encode(array)

    assert any(isinstance(p, memoryview) and np.shares_memory(np.frombuffer(p, np.uint8), array) for p in parts)


def test_encode_arrays_lie_at_multiples_of_64():
    block = join([np.full(3, 7, np.uint8), np.full(5, 9, np.uint8)])
    raw = block.tobytes()

    assert raw.index(b"\7\7\7") % 64 == 0
    assert raw.index(b"\t\t\t\t\t") % 64 == 0


def test_encode_ordered_dict_comes_back_as_dict_in_order():
    back = codec.decode(join(OrderedDict(b=1, a=2)))

    assert type(back) is dict
    assert list(back) == ["b", "a"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": {1}}}, r'state\["a"\]\["b"\]: is a builtins.set; expected None'),
        ([1, object()], r"state\[1\]: is a builtins.object"),
        ({"x": np.array([None])}, r'state\["x"\]: has dtype object'),
        ({"x": np.zeros(2, [("a", "i4")])}, r'state\["x"\]: has dtype \[\(.*records'),
        ({(1, 2): 0}, r"state: has the key \(1, 2\); expected keys that are str or int"),
        ({True: 0}, r"state: has the key True"),
        (torch.Size([1]), r"state: is a torch.Size"),
        (torch.eye(2).to_sparse(), r"state: is a torch.Tensor; expected .*dense"),
    ],
)
def test_encode_unsupported_value_is_an_error_that_names_it(state, message):
    with pytest.raises(FieldError, match=message):
        codec.encode(state)


def test_decode_any_changed_byte_is_an_error():
    block = join({"a": np.arange(5, dtype=np.int32), "b": (1, "x"), "c": torch.ones(2)})
    for position in range(len(block)):
        damaged = block.copy()
        damaged[position] ^= 0x41
        with pytest.raises(CheckpointError, match="here: "):
            codec.decode(damaged, "here")


def test_decode_cut_anywhere_is_an_error():
    block = join({"a": np.arange(5, dtype=np.int32), "b": (1, "x")})
    for length in range(len(block)):
        with pytest.raises(CheckpointError):
            codec.decode(block[:length])


@pytest.mark.parametrize(
    "tree",
    [
        {"array": ["<i4", [2**62], 0]},
        {"array": ["<i4", [-1, -1], 0]},
        {"array": ["<i4", [1], -64]},
        {"array": ["O", [1], 0]},
        {"array": ["<i4", [1], 62]},
        {"array": ["V4", [1], 0]},
        {"tensor": ["load", [1], 0]},
        {"tensor": ["float32", [1 << 40], 0]},
        {"bytes": [0, 65]},
        {"pickle": "x"},
        {"array": [], "dict": []},
        {"dict": [[{"dict": []}, 1]]},
        {"dict": 3},
        {},
    ],
)
def test_decode_hostile_header_is_an_error(tree):
    with pytest.raises(CheckpointError, match="its header cannot be read"):
        codec.decode(with_header({"schema": 1, "data_bytes": 64, "tree": tree}, bytes(64)))


def test_decode_deeply_nested_header_is_an_error():
    text = b'{"schema": 1, "data_bytes": 0, "tree": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    body = codec.MAGIC + len(text).to_bytes(8, "little") + text
    block = np.frombuffer(body + zlib.crc32(body).to_bytes(8, "little"), np.uint8)

    with pytest.raises(CheckpointError, match="RecursionError"):
        codec.decode(block)


def test_decode_newer_schema_is_an_error():
    with pytest.raises(CheckpointError, match="has schema 2; expected 1"):
        codec.decode(with_header({"schema": 2, "data_bytes": 0, "tree": None}))
