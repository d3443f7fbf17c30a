"""`pytest benchmarks/` times the bench_*.py files; compare commits with --benchmark-autosave and
--benchmark-compare (pytest-benchmark)."""

import pytest
import torch

from benchmarks import machine


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # The project's addopts switch timing off for the tests; here it is the purpose.
    if "--benchmark-disable" not in config.invocation_params.args:
        config.option.benchmark_disable = False


def pytest_collect_file(file_path, parent):
    named_directly = parent.session.isinitpath(file_path)
    if file_path.suffix == ".py" and file_path.name.startswith("bench_") and not named_directly:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(
        cpu_model=machine.cpu_model(),
        torch=torch.__version__,
        torch_isa=machine.torch_isa(),
        native_isa=machine.native_isa(),
        threads=1,
    )
