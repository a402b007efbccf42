"""The backend in torch: on a GPU where there is one, else on a CPU, by the same assertions."""

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_report_header():
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none: on the CPU instead"
    return f"tests/gpu: GPU {name}"


@pytest.fixture(scope="session")
def device():
    return DEVICE
