"""Tests share two cores: one thread each, no network, no accelerator unless `--device` names one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where models that tests load lie, such as cuda")


def pytest_configure(config: pytest.Config) -> None:
    if (device := str(config.getoption("--device"))) != "cpu":
        from tests import on_device

        on_device.use(device)
        config.pluginmanager.register(on_device)
