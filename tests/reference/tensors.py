"""Safetensors files with nothing but numpy; BF16 comes as float32, E4M3 as raw bytes (uint8)."""

import json
import pathlib

import numpy as np

_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I32": np.int32,
          "I64": np.int64, "F8_E4M3": np.uint8}


def read_file(path):
    """name → array."""
    data = pathlib.Path(path).read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + header_bytes])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            bits = np.frombuffer(data[begin:end], dtype=np.uint16).astype(np.uint32) << 16
            flat = bits.view(np.float32)
        else:
            flat = np.frombuffer(data[begin:end], dtype=_TYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def read_checkpoint(folder):
    """All tensors of model.safetensors or of the files its index names."""
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {name: read_file(folder / name) for name in set(weight_map.values())}
    return {tensor: files[name][tensor] for tensor, name in weight_map.items()}


def write_file(path, tensors):
    """name → (dtype name, array whose bytes are written). Data starts at a multiple of 8."""
    header, offset = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape),
                        "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            out.write(np.ascontiguousarray(array).tobytes())


def bf16_bits(values):
    """float32 to BF16's 16 bits, to nearest even; finite values only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
