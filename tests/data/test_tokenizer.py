"""Tokenizers: trained, loaded, saved for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from data.config import DataConfig, DataError, TokenizerConfig
from data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from tests.data.helpers import make_config, texts, tokenizer, write_jsonl

HARD = ["def f(x):\n\treturn  x # ümläut 漢字 🙂\n\n", "", " leading and trailing ", "a\r\nb\x00c"]


def test_any_text_survives_encoding_and_decoding():
    """A byte the training text did not have, lost or replaced."""
    for text in HARD:
        assert tokenizer().decode(tokenizer().encode(text)) == text
    assert tokenizer().encode_batch(HARD) == [tokenizer().encode(text) for text in HARD]


def test_training_is_deterministic_and_bounded():
    """Ranks, or a second run without the cache, that number their tokens differently."""
    first, second = (train_bpe(iter(texts(100)), 300) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert first.vocab_size == 300
    assert first.eos_id == first.bos_id == 0
    assert train_bpe(iter(texts(101)), 300).fingerprint() != train_bpe(iter(texts(20)), 300).fingerprint()


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
def test_transformers_loads_what_save_writes(model_type, tmp_path):
    """An exported model whose tokenizer gives other ids, because transformers rebuilt it for the model's family."""
    tokenizer().save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, *texts(20, seed=5)]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer().encode(text)
        assert theirs.decode(tokenizer().encode(text)) == text
    assert theirs.eos_token_id == tokenizer().eos_id
    again = Tokenizer.from_path(tmp_path)
    assert again.fingerprint() == tokenizer().fingerprint()
    assert (again.eos_token, again.bos_token) == (END_OF_TEXT, END_OF_TEXT)


def test_saving_keeps_the_settings_of_a_loaded_folder(tmp_path):
    """A chat template or a class lost on the way through training."""
    tokenizer().save(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.from_path(tmp_path / "a").save(tmp_path / "b")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs.model_max_length == 77
    assert theirs.chat_template == "{{ messages }}"
    Tokenizer.from_path(tmp_path / "b").save(tmp_path / "b")  # onto itself


def word_level(path: Path, vocabulary: dict[str, int]) -> Path:
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.save(str(path))
    return path


def test_the_end_of_a_document_comes_from_the_files_or_the_configuration(tmp_path):
    """Documents joined by the wrong token, or a model that never learns to stop."""
    file = word_level(tmp_path / "tokenizer.json", {"?": 0, "a": 1, "</s>": 5, "END": 9})
    assert Tokenizer.from_path(file).eos_id == 5  # well known
    assert Tokenizer.from_path(file, eos_token="END").eos_id == 9
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "a"}, "bos_token": "gone"}))
    assert Tokenizer.from_path(tmp_path).eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "END"}))
    loaded = Tokenizer.from_path(tmp_path)
    assert (loaded.eos_id, loaded.bos_id) == (9, None)
    with pytest.raises(DataError, match="'nope' is not in its vocabulary"):
        Tokenizer.from_path(tmp_path, eos_token="nope")


@pytest.mark.parametrize("said", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
def test_a_text_begins_as_transformers_begins_it(template, said, tmp_path):
    """A bos of tokenizer_config.json, which does not count beside a tokenizer.json; an eos behind a text that is to go
    on."""
    core = tokenizers.Tokenizer.from_str(tokenizer().to_json())
    core.add_special_tokens(["<s>", "</s>"])
    if template is not None:
        special = [(name, core.token_to_id(name)) for name in ("<s>", "</s>")]
        core.post_processor = tokenizers.processors.TemplateProcessing(template, None, special)
    Tokenizer(core, eos_token="</s>", bos_token="<s>").save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    ours, theirs = Tokenizer.from_path(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs("x = 1").input_ids
    assert [*ours.beginning, *ours.encode("x = 1")] == [token for token in expected if token != ours.eos_id]
    assert len(ours.encode("x = 1")) == len(theirs("x = 1", add_special_tokens=False).input_ids)
    assert tokenizer().beginning == ()


def test_the_vocabulary_reaches_to_its_largest_id(tmp_path):
    """A count of tokens in place of the largest id: an embedding too small for a vocabulary with gaps."""
    assert Tokenizer.from_path(word_level(tmp_path / "t.json", {"?": 0, "</s>": 41})).vocab_size == 42


def test_a_tokenizer_that_is_none_is_one_clear_error(tmp_path):
    """A traceback from inside a library for a wrong path or a damaged file."""
    with pytest.raises(DataError, match=r"tokenizer.json does not exist"):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        Tokenizer.from_path(tmp_path)
    with pytest.raises(DataError, match="does not say which token ends a document"):
        Tokenizer.from_path(word_level(tmp_path / "t.json", {"?": 0, "a": 1}))
    with pytest.raises(DataError, match="the source is empty"):
        train_bpe(iter([]), 300)
    with pytest.raises(DataError, match=r"data.tokenizer.path is missing"):
        load_tokenizer(DataConfig(source="tokens", path="x.npy"))


def test_a_tokenizer_is_trained_on_the_source_once(tmp_path, monkeypatch):
    """Seconds or minutes lost at every start; or an old tokenizer used for new text."""
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    config = make_config(
        tmp_path, source="text", path=str(tmp_path / "a.jsonl"), tokenizer=TokenizerConfig(vocab_size=290)
    )
    first = load_tokenizer(config)
    assert first.vocab_size == 290
    monkeypatch.setattr("data.tokenizer.train_bpe", None)
    assert load_tokenizer(config).fingerprint() == first.fingerprint()
    write_jsonl(tmp_path / "a.jsonl", texts(51))
    with pytest.raises(TypeError):
        load_tokenizer(config)


def test_bytes_of_tokens_are_the_bytes_of_the_text():
    """A character that lies across tokens shown as question marks; a blank that a decoder drops in front."""
    text = " one\n\u00e9t\u00e9 \u65e5\u672c <|x|>"
    byte_level = train_bpe(iter(["one two"]), 270)
    assert b"".join(map(byte_level.token_bytes, byte_level.encode(text))) == text.encode()
    assert byte_level.token_bytes(byte_level.eos_id) == END_OF_TEXT.encode()
    pieces = {"<end>": 0, "\u2581one": 1, "\u2581": 2, "x": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    core = tokenizers.Tokenizer(models.BPE(pieces, [], byte_fallback=True))
    core.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    sentences = Tokenizer(core, eos_token="<end>", bos_token=None)
    assert [sentences.token_bytes(i) for i in (1, 2, 3, 4 + 0xE9)] == [b" one", b" ", b"x", b"\xe9"]
    assert sentences.token_bytes(9999) == b""
