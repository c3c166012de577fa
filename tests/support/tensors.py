"""Comparison of tensors by their names."""

import torch


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name} {text}"
        )
