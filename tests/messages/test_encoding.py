"""Encodings of tensors: rounding, sizes, and what a damaged message gives."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from droppeft.messages.encoding import BLOCK, decode, encode, encoded_bytes

FLOATS = arrays.arrays(
    np.float32,
    arrays.array_shapes(max_dims=3, max_side=20),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(FLOATS)
def test_bf16_rounds_as_torch_does(values: np.ndarray) -> None:
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert np.array_equal(decode(encode(values, "bf16"), "bf16", values.shape), expected)


@given(FLOATS)
def test_int8_errs_by_at_most_half_a_step_of_its_block(values: np.ndarray) -> None:
    decoded = decode(encode(values, "int8"), "int8", values.shape)
    for start in range(0, values.size, BLOCK):
        block = values.reshape(-1)[start : start + BLOCK].astype(np.float64)
        step = np.abs(block).max() / 127
        errors = np.abs(block - decoded.reshape(-1)[start : start + BLOCK])
        assert errors.max() <= step * 0.5001 + 1e-44


@pytest.mark.parametrize("encoding", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (256,), (257,), (16, 384)])
def test_encoded_bytes_is_the_size_of_an_encoded_tensor(encoding, shape) -> None:
    values = np.ones(shape, np.float32)
    encoded = encode(values, encoding)
    assert encoded.nbytes == encoded_bytes(values.size, encoding)
    assert np.allclose(decode(encoded, encoding, shape), values)


def test_values_that_are_not_finite_stay_so() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 3.4e38], np.float32)
    assert list(np.isfinite(decode(encode(values, "bf16"), "bf16", (4,)))) == [False] * 4
    assert not np.isfinite(decode(encode(values, "int8"), "int8", (4,))).any()


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_another_shape_or_type_is_refused(encoding) -> None:
    encoded = encode(np.ones((4, 4), np.float32), encoding)
    for wrong in (encoded[:-1], encoded.astype(np.float32)):
        with pytest.raises(ValueError, match="is no"):
            decode(wrong, encoding, (4, 4))
