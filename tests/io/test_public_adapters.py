"""Every public adapter at hand is loaded, converted, or refused with a reason."""

from collections import Counter

from safetensors.torch import load_file

from lora_fused.io import find_adapters, read_adapter, write_adapter


def answers(folder):
    """Path -> an Adapter, or the error's text."""
    found = {}
    for path in find_adapters(folder):
        try:
            found[path] = read_adapter(path, allow_pickle=True)
        except ValueError as error:
            found[path] = str(error)
    return found


def test_every_adapter_gets_an_answer(data_dir, capsys):
    counts = Counter()
    for folder in ("adapters", "adapters_minilm"):
        for path, answer in answers(data_dir / folder).items():
            if isinstance(answer, str):
                assert answer.startswith("read_adapter: ") and str(path) in answer
                counts[answer.split(" must ")[1].split(",")[0]] += 1
            else:
                assert answer.modules
                counts[answer.metadata["layout"]] += 1
    with capsys.disabled():
        print(f"\npublic adapters: {dict(counts)}")
    assert counts["peft"] >= 50 and counts["kohya"] and counts["diffusers"]


def test_real_adapters_are_written_back_exactly(data_dir, tmp_path):
    folders = [
        p
        for p in find_adapters(data_dir / "adapters")
        if (p / "adapter_model.safetensors").exists()
    ]
    for number, path in enumerate(folders):
        try:
            adapter = read_adapter(path)
        except ValueError:
            continue
        write_adapter(adapter, tmp_path / str(number))
        before, after = (
            load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / str(number))
        )
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype and after[key].equal(tensor), (path, key)
        assert read_adapter(tmp_path / str(number)).metadata["config"] == adapter.metadata["config"]
