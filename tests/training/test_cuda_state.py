"""The state of a run on a GPU, with ``torch.cuda``'s generator played by one of the CPU's."""

from types import SimpleNamespace

import pytest
import torch

from fastadapter.checkpoints import CheckpointError
from fastadapter.checkpoints.files import read_tensors, write_tensors
from fastadapter.training import state

CUDA = SimpleNamespace(type="cuda")
ACCELERATOR = SimpleNamespace(
    device=CUDA, num_processes=1, process_index=0, is_main_process=True, wait_for_everyone=lambda: None
)


@pytest.fixture
def generator(monkeypatch):
    """As picky as the real one: its state is a ByteTensor of the CPU."""
    played = torch.Generator().manual_seed(3)

    def restore(new, device):
        assert device is CUDA and type(new) is torch.Tensor
        assert new.device.type == "cpu" and new.dtype == torch.uint8 and new.is_contiguous()
        assert new.storage_offset() == 0 and new.untyped_storage().nbytes() == new.numel()
        played.set_state(new)

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: played.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", restore)
    return played


def make_run(seed):
    torch.manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return [("gate", parameter)], optimizer


def test_the_devices_generator_goes_on_where_it_was(generator, tmp_path):
    """Whatever was drawn from it between the save and the resumption, and the CPU's too."""
    path = tmp_path / "state.safetensors"
    parameters, optimizer = make_run(0)
    state.save_state(path, parameters, optimizer, state.Progress(step=1, losses=[1.0]), {}, ACCELERATOR)
    expected = torch.rand(4), torch.rand(4, generator=generator)
    others, other_optimizer = make_run(1)
    found = state.load_state(path, others, other_optimizer, {}, ACCELERATOR)
    assert found.step == 1
    drawn = torch.rand(4), torch.rand(4, generator=generator)
    assert all(torch.equal(mine, right) for mine, right in zip(drawn, expected, strict=True))
    assert torch.equal(others[0][1], parameters[0][1])


def test_a_state_from_a_cpu_is_no_state_for_a_gpu(generator, tmp_path):
    path = tmp_path / "state.safetensors"
    parameters, optimizer = make_run(0)
    state.save_state(path, parameters, optimizer, state.Progress(step=1, losses=[1.0]), {}, ACCELERATOR)
    tensors, metadata = read_tensors(path)
    del tensors["generator.cuda"]
    write_tensors(path, tensors, metadata)
    before = generator.get_state()
    with pytest.raises(CheckpointError, match=r"generator\.cuda"):
        state.load_state(path, parameters, optimizer, {}, ACCELERATOR)
    assert torch.equal(generator.get_state(), before)
