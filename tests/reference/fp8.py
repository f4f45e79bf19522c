"""E4M3 and the two block quantizations of the model, in numpy and float64.

Written from the format's definition (1 sign, 4 exponent, 3 mantissa bits, bias 7, no infinities,
NaN 0x7F and 0xFF), not through a library's float8 type, so that it can check one.
"""

import numpy as np

LARGEST = 448.0
WEIGHT_BLOCK = 128
TILE = 128
SMALLEST_AMAX = np.float32(1e-4)


def _table():
    values = np.empty(256)
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            value = np.nan
        elif exponent == 0:
            value = mantissa * 2.0**-9
        else:
            value = (8 + mantissa) * 2.0 ** (exponent - 10)
        values[code] = -value if code & 0x80 else value
    return values


VALUES = _table()


def decode(codes):
    """Bytes to float64."""
    return VALUES[codes]


def encode(values):
    """Any float array to bytes: round to nearest even, saturating at 448; no NaN may come in."""
    values = np.asarray(values, dtype=np.float64)
    assert not np.isnan(values).any()
    magnitude = np.minimum(np.abs(values), LARGEST)
    _, exponent = np.frexp(magnitude)  # magnitude = fraction * 2^exponent, fraction in [0.5, 1)
    step = np.exp2(np.maximum(exponent - 1, -6) - 3.0)
    rounded = np.rint(magnitude / step) * step  # rint takes ties to even
    codes = np.searchsorted(VALUES[:127], rounded).astype(np.uint8)  # 0x00 … 0x7E ascend
    assert (VALUES[codes] == rounded).all()
    return codes | (np.signbit(values).astype(np.uint8) << 7)


def distance_to_tie(values):
    """Smallest |v - midpoint| / |v| over all values between two neighbouring codes; how much a
    quotient may be off before a code changes."""
    magnitude = np.abs(np.asarray(values, dtype=np.float64)).ravel()
    magnitude = magnitude[(magnitude > 0) & (magnitude < LARGEST)]
    midpoints = (VALUES[:126] + VALUES[1:127]) / 2
    at = np.clip(np.searchsorted(midpoints, magnitude), 1, len(midpoints) - 1)
    gap = np.minimum(np.abs(magnitude - midpoints[at]), np.abs(magnitude - midpoints[at - 1]))
    return float((gap / magnitude).min())


def spread(scales, shape, block_rows, block_cols):
    """Scales per block to one per element; the last blocks may be short."""
    rows = np.arange(shape[0]) // block_rows
    cols = np.arange(shape[1]) // block_cols
    return scales[rows][:, cols]


def dequantize_weight(codes, scales, block=(WEIGHT_BLOCK, WEIGHT_BLOCK)):
    """[out, in] codes and [ceil(out/128), ceil(in/128)] multipliers to float64."""
    return decode(codes) * spread(scales.astype(np.float64), codes.shape, *block)


def quantize_weight(weight, power_of_two=False):
    """Codes and float32 scales per 128×128 block, amax / 448 or the power of two above it."""
    rows, cols = weight.shape
    scales = np.ones((-(-rows // WEIGHT_BLOCK), -(-cols // WEIGHT_BLOCK)), dtype=np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = weight[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128]
            amax = np.float32(np.abs(part).max())
            if amax > 0:
                scales[i, j] = _scale(amax, power_of_two)
    by_element = spread(scales, weight.shape, WEIGHT_BLOCK, WEIGHT_BLOCK)
    return encode(weight.astype(np.float32) / by_element), scales


def quantize_activations(x, power_of_two=False):
    """Rows [T, K] to codes, float32 scales [T, ceil(K/128)] and the quotients that were rounded
    (§5.5: amax at least 1e-4; a short last tile takes its own amax). The quotient is a float32
    division, as in the published kernel."""
    x = x.astype(np.float32)
    num_tiles = -(-x.shape[1] // TILE)
    scales = np.empty((x.shape[0], num_tiles), dtype=np.float32)
    for tile in range(num_tiles):
        amax = np.abs(x[:, tile * TILE:(tile + 1) * TILE]).max(axis=1)
        for t, a in enumerate(np.maximum(amax, SMALLEST_AMAX)):
            scales[t, tile] = _scale(a, power_of_two)
    quotients = x / spread(scales, x.shape, 1, TILE)
    return encode(quotients), scales, quotients


def _scale(amax, power_of_two):
    scale = np.float32(amax) / np.float32(LARGEST)
    if not power_of_two:
        return scale
    fraction, exponent = np.frexp(scale)
    return np.float32(np.exp2(float(exponent - 1 if fraction == 0.5 else exponent)))


def linear_w8a8(x_codes, x_scales, w_codes, w_scales):
    """y = Σ over K blocks of sx · sw · Σ xq wq, all sums in float64; [T, out]."""
    x, w = decode(x_codes), decode(w_codes)
    w_scales = w_scales.astype(np.float64)[np.arange(w.shape[0]) // WEIGHT_BLOCK]
    y = np.zeros((x.shape[0], w.shape[0]))
    for tile in range(x_scales.shape[1]):
        span = slice(tile * TILE, (tile + 1) * TILE)
        y += (x[:, span] @ w[:, span].T) * np.outer(x_scales[:, tile].astype(np.float64),
                                                    w_scales[:, tile])
    return y
