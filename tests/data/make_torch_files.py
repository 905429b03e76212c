"""Writes the ``torch-*`` files of this folder; run by hand where PyTorch and OmegaConf are installed (2.13.0, 2.4.0).

The expected values are PyTorch's own, through ``Tensor.numpy()``; bfloat16 is stored as float32, which holds it.
"""

import collections
import io
import pathlib

import numpy as np
import torch
from omegaconf import OmegaConf

FOLDER = pathlib.Path(__file__).parent


def tensors() -> dict[str, torch.Tensor]:
    """One tensor for each way in which a storage can be looked at, and for each element type."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64]
    named = {
        str(kind).removeprefix("torch."): (100 * torch.randn(3, 2)).abs().to(torch.int64).to(kind) for kind in kinds
    }
    return named | {
        "base": base,
        "shares_base": base[1:, 2:5],
        "transposed": base.T,
        "every_second": base[:, ::2],
        "column": base[:, 3],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "scalar": torch.tensor(-1.5),
        "scalar_of_shared": base[2, 3],
        "empty": torch.zeros(0, 5),
        "empty_inside": torch.zeros(2, 0, 3),
        "one": torch.zeros(1, 1, 1),
        "parameter": torch.nn.Parameter(torch.randn(2, 2, dtype=torch.bfloat16)),
    }


def main() -> None:
    """Write the files."""
    values = tensors()
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    others = {
        "state_dict": layer.state_dict(),
        "nested": {"list": [values["base"], (1, 2.5, None, True, "häß", b"bytes")], 7: collections.OrderedDict(a=-1)},
        "size": torch.Size([5, 2]),
        "device": torch.device("cuda", 1),
        "meta": torch.empty(2, 3, device="meta"),
        "dtype": torch.float32,
        "array": np.arange(6.0).reshape(2, 3),
        "set": {1, 2},
    }
    torch.save({"tensors": values, **others}, FOLDER / "torch-tensors.pt")
    expected = {**values, **{f"state_dict.{name}": value for name, value in layer.state_dict().items()}}
    plain = {
        name: value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        for name, value in expected.items()
    }
    np.savez_compressed(FOLDER / "torch-tensors.npz", **{name: value.numpy() for name, value in plain.items()})

    config = OmegaConf.create({"task": "mt30", "dims": [1, 2], "nested": {"lr": 3e-4}, "none": None})
    model = {"weight": values["float32"]}
    torch.save({"model": model, "cfg": config, "work_dir": pathlib.PosixPath("/logs/1")}, FOLDER / "torch-omegaconf.pt")
    torch.save(model, FOLDER / "torch-legacy.pt", _use_new_zipfile_serialization=False)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), buffer)
    (FOLDER / "torch-script.pt").write_bytes(buffer.getvalue())
    torch.save(layer, FOLDER / "torch-module.pt")


if __name__ == "__main__":
    main()
