"""Data files, whole and broken, into prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.schema import DatasetConfig
from megatron_tempo.data.dataset import load_labelled, load_unlabelled, question_keys
from megatron_tempo.data.rows import DataError
from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt

WORDS = "<unk> <system> <user> <assistant> find one two three . be brief"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'forbidden' %}{{ raise_exception('not this word') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(WORDS.split())}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=template)


TOKENIZER = make_tokenizer()


def labelled(path: Path, **changes: Any) -> DatasetConfig:
    values = {"answer_field": "answer", "verifier": Verifier.math, "chat_template": False}
    return DatasetConfig(path=str(path), **{**values, **changes})


def unlabelled(path: Path, **changes: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), **{"chat_template": False, **changes})


def write_jsonl(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_text_rows_become_prompts(tmp_path: Path) -> None:
    values = [{"prompt": "find one", "answer": 5}, {"prompt": "find two", "answer": "x"}]
    prompts = load_labelled(labelled(write_jsonl(tmp_path / "train.jsonl", values)), TOKENIZER, 8)
    assert prompts == [
        LabelledPrompt("train:0", "find one", (4, 5), "5", "math"),
        LabelledPrompt("train:1", "find two", (4, 6), "x", "math"),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (-3, "-3"),
        (0.5, "0.5"),
        (5.0, "5.0"),
        (1e-05, "0.00001"),
        ("\\frac12", "\\frac12"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_answers_become_text(tmp_path: Path, value: object, text: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "find one", "answer": value}])
    assert load_labelled(labelled(path), TOKENIZER, 8)[0].answer == text


def test_chat_template_system_and_suffix(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "find one"}])
    config = unlabelled(path, chat_template=True, system="be brief", suffix=" .")
    (prompt,) = load_unlabelled(config, TOKENIZER, 16)
    assert prompt.text == "<system> be brief <user> find one . <assistant>"
    assert prompt.token_ids == (1, 9, 10, 2, 4, 5, 8, 3)


def test_a_suffix_follows_the_last_message_once(tmp_path: Path) -> None:
    """A benchmark's instruction reaches the model whether its questions are text or messages."""
    asked = [message("system", "s"), message("user", "a"), message("assistant", "b"), message("user", "2 4 > 8 :")]
    has_it = [*asked[:3], message("user", "2 4 > 8 : 4 . 2")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": asked}, {"prompt": has_it}])
    plain, had = load_unlabelled(unlabelled(path, chat_template=True), TOKENIZER, 99)
    first, second = load_unlabelled(unlabelled(path, chat_template=True, suffix=" 4 ."), TOKENIZER, 99)
    assert first.text == plain.text.replace("2 4 > 8 :", "2 4 > 8 : 4 .")
    assert first.text.count("4 .") == 1
    assert second.text == had.text


def test_messages_go_through_the_template(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "find one"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "find two"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": messages}])
    for chat_template in (True, False):
        (prompt,) = load_unlabelled(unlabelled(path, chat_template=chat_template), TOKENIZER, 16)
        assert prompt.text == "<user> find one <assistant> one <user> find two <assistant>"


def test_parquet_gives_what_jsonl_gives(tmp_path: Path) -> None:
    values = [
        {"prompt": [{"role": "user", "content": f"find {word}"}], "answer": word, "key": f"k{number}"}
        for number, word in enumerate(["one", "two", "three"] * 700)
    ]
    write_jsonl(tmp_path / "a.jsonl", values)
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    for id_field in (None, "key"):
        loaded = [
            load_labelled(labelled(tmp_path / name, id_field=id_field), TOKENIZER, 8)
            for name in ("a.jsonl", "a.parquet")
        ]
        assert loaded[0] == loaded[1]
        assert len(loaded[0]) == 2100
    assert loaded[0][3].id == "k3"


def test_byte_order_mark_blank_lines_and_crlf_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n   \n{"prompt": "two"}')
    assert [prompt.id for prompt in load_unlabelled(unlabelled(path), TOKENIZER, 8)] == ["a:0", "a:1"]


def test_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\nbroken\n')
    assert len(load_unlabelled(unlabelled(path, limit=2), TOKENIZER, 8)) == 2


def line(prompt: object = "find one", answer: object = "5", **more: object) -> bytes:
    return json.dumps({"prompt": prompt, "answer": answer, **more}).encode() + b"\n"


def message(role: object, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


BAD_LINES: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "invalid json": (line() + b'{"prompt": "one",}\n', {}, "bad.jsonl:2: invalid JSON at column 18"),
    "cut short": (line()[:-3], {}, "bad.jsonl:1: invalid JSON at column"),
    "array": (b"[1, 2]\n", {}, "bad.jsonl:1: a JSON array, not an object"),
    "string": (b'"one"\n', {}, "bad.jsonl:1: a JSON string, not an object"),
    "null": (b"null\n", {}, "bad.jsonl:1: a JSON null, not an object"),
    "deep": (b"[" * 200_000 + b"\n", {}, "bad.jsonl:1: unreadable JSON"),
    "digits": (
        b'{"prompt": "one", "answer": ' + b"1" * 5000 + b"}\n",
        {},
        "bad.jsonl:1: unreadable JSON: a whole number has more than 4300 digits",
    ),
    "text as messages": (
        line(messages="find one"),
        {"prompt_field": "messages"},
        "field 'messages' is 'find one' (str), no list of chat messages in JSON; write a list of {role, content}",
    ),
    "messages without quotes": (line(prompt="[{role: user, content: one}]"), {}, "cannot be read as JSON"),
    "field misspelt": (b'{"promt": "one", "answer": 1}\n', {}, "field 'prompt' is missing; did you mean 'promt'?"),
    "field missing": (b'{"q": "one", "answer": 1}\n', {}, "field 'prompt' is missing; there are ['answer', 'q']"),
    "no answer": (b'{"prompt": "one"}\n', {}, "field 'answer' is missing; there are ['prompt']"),
    "null answer": (line(answer=None), {}, "field 'answer' is null; an answer is text or a number"),
    "list answer": (line(answer=["5"]), {}, "field 'answer' is ['5'] (list); an answer is text or a number"),
    "boolean answer": (line(answer=True), {}, "field 'answer' is True (bool)"),
    "not a number": (b'{"prompt": "one", "answer": NaN}\n', {}, "field 'answer' is nan; an answer is a finite number"),
    "empty answer": (line(answer=" "), {}, "field 'answer' is empty; give the answer or remove the row"),
    "no tests of a program": (
        line(answer='{"kind": "inputs", "tests": []}'),
        {"verifier": Verifier.code},
        "bad.jsonl:1: field 'answer' holds no tests of a program: \"tests\" of inputs is a list of at least one test; "
        "write the tests as in docs/code.md, or remove the row",
    ),
    "number as prompt": (line(prompt=7), {}, "field 'prompt' is 7 (int); a prompt is text or a list of messages"),
    "empty prompt": (line(prompt="  "), {}, "bad.jsonl:1: field 'prompt' is empty"),
    "half a surrogate": (line(prompt="one \ud800"), {}, "half a surrogate pair at character 4"),
    "long prompt": (
        line(prompt="one " * 9),
        {},
        "the prompt has 9 tokens, rollout.max_prompt_tokens is 8; raise it or remove the row",
    ),
    "no messages": (line(prompt=[]), {}, "field 'prompt' is an empty list of messages"),
    "message as text": (line(prompt=["one"]), {}, "message 0 of field 'prompt' is 'one' (str); write {role, content}"),
    "unknown role": (
        line(prompt=[message("user", "one"), message("bot", "two")]),
        {},
        "message 1 of field 'prompt' has the role 'bot' (str); known are system, user, assistant",
    ),
    "no role": (line(prompt=[{"content": "one"}]), {}, "message 0 of field 'prompt' has the role null"),
    "list role": (line(prompt=[message(["user"], "one")]), {}, "has the role ['user'] (list)"),
    "content parts": (line(prompt=[message("user", ["one"])]), {}, "has the content ['one'] (list); it must be text"),
    "empty message": (line(prompt=[message("user", "")]), {}, "message 0 of field 'prompt' is empty"),
    "answered": (line(prompt=[message("assistant", "one")]), {}, "is of the assistant; end with the user's"),
    "template refuses": (line(prompt=[message("user", "forbidden")]), {}, "refuses the messages: not this word"),
    "two system messages": (
        line(prompt=[message("system", "one"), message("user", "two")]),
        {"system": "be brief", "chat_template": True},
        "the messages have a system message of their own, and `system` is set",
    ),
    "invalid utf-8": (line() + b'{"prompt": "caf\xe9"}\n', {}, "bad.jsonl:2: byte 16 of the line is no UTF-8"),
    "utf-16": (line().decode().encode("utf-16"), {}, "bad.jsonl:1: byte 1 of the line is no UTF-8"),
    "a name twice": (b'{"prompt": "one", "prompt": "two"}\n', {}, 'the name "prompt" is there twice; keep one'),
    "empty file": (b"", {}, "there are no rows in it"),
    "blank file": (b"\n \n", {}, "there are no rows in it"),
    "same ids": (
        line(key=1) + line(key="1"),
        {"id_field": "key"},
        "bad.jsonl:2: field 'key' is '1', as at bad.jsonl:1; make ids unique",
    ),
    "list id": (line(key=[1]), {"id_field": "key"}, "field 'key' is [1] (list); an id is text or a whole number"),
    "no id": (line(), {"id_field": "key"}, "field 'key' is missing"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_row_is_named(tmp_path: Path, name: str) -> None:
    content, changes, message = BAD_LINES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_labelled(labelled(path, **changes), TOKENIZER, 8)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_all_bad_rows_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line() + b"broken\n" * 12 + line(answer=None))
    with pytest.raises(DataError) as caught:
        load_labelled(labelled(path), TOKENIZER, 8)
    assert len(caught.value.problems) == 13
    report = str(caught.value).splitlines()
    assert report[0] == f"{path}: 13 problems"
    assert report[1].startswith("  bad.jsonl:2: invalid JSON")
    assert report[-1] == "  ... and 3 more"
    assert len(report) == 12


def test_words_of_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "one"}]')
    (tmp_path / "fake.parquet").write_text('{"prompt": "one"}')
    (tmp_path / "empty.parquet").write_text("")
    pq.write_table(pa.table({"promt": ["one"]}), tmp_path / "typo.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "rowless.parquet")
    pq.write_table(pa.table({"prompt": ["one"] * 50_000}), tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-100])
    messages = {
        "none.jsonl": "does not exist; check the dataset's `path`",
        ".": "is a folder, not a file",
        "a.json": "the name ends in '.json'; use .parquet, or .jsonl with one JSON object a line",
        "fake.parquet": "not a readable Parquet file",
        "empty.parquet": "not a readable Parquet file",
        "cut.parquet": "not a readable Parquet file",
        "typo.parquet": "field 'prompt' is missing; did you mean 'promt'?",
        "rowless.parquet": "there are no rows in it",
    }
    for name, words in messages.items():
        with pytest.raises(DataError) as caught:
            load_unlabelled(unlabelled(tmp_path / name), TOKENIZER, 8)
        assert words in str(caught.value)


def test_bad_parquet_rows_are_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["one", None, " "]}), path)
    with pytest.raises(DataError) as caught:
        load_unlabelled(unlabelled(path), TOKENIZER, 8)
    assert caught.value.problems == (
        "a.parquet row 1: field 'prompt' is null; a prompt is text or a list of messages",
        "a.parquet row 2: field 'prompt' is empty",
    )


def test_config_that_does_not_fit_the_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "one", "answer": 1}])
    plain = make_tokenizer(template=None)
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: load_labelled(labelled(path, answer_field=None), TOKENIZER, 8), "needs `answer_field` and `verifier`"),
        (lambda: load_labelled(labelled(path, verifier=None), TOKENIZER, 8), "needs `answer_field` and `verifier`"),
        (lambda: load_unlabelled(labelled(path), TOKENIZER, 8), "`answer_field` is 'answer' on an unlabelled set"),
        (lambda: load_unlabelled(unlabelled(path, chat_template=True), plain, 8), "set chat_template=false"),
        (lambda: load_unlabelled(unlabelled(path, system="one"), TOKENIZER, 8), "`chat_template` is false"),
    ]
    for call, words in wrong:
        with pytest.raises(ValueError, match=words):
            call()


def test_messages_without_a_template_are_a_bad_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": [message("user", "one")]}])
    with pytest.raises(DataError, match="the tokenizer has no chat template; give text"):
        load_unlabelled(unlabelled(path), make_tokenizer(template=None), 8)


def test_messages_as_text_are_messages(tmp_path: Path) -> None:
    messages = [message("user", "find one")]
    rows = [{"prompt": messages}, {"prompt": json.dumps(messages)}, {"prompt": str(messages)}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    texts = {prompt.text for prompt in load_unlabelled(unlabelled(path), TOKENIZER, 16)}
    assert texts == {"<user> find one <assistant>"}
    assert len(set(question_keys(unlabelled(path)).values())) == 1
    cut = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "find one"}, {"prompt": json.dumps(messages)[:-3]}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: the prompt looks like a list of chat messages in a text"):
        load_unlabelled(unlabelled(cut), TOKENIZER, 16)


def test_a_word_outside_the_vocabulary_is_a_bad_row(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"find": 0, "one": 1}))  # no unknown token, as the quickstart's
    words.pre_tokenizer = WhitespaceSplit()
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "find one"}, {"prompt": "find it"}])
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: the tokenizer refuses the prompt: .*reword it, or remove the row"
    ):
        load_unlabelled(unlabelled(path), PreTrainedTokenizerFast(tokenizer_object=words), 8)


@pytest.mark.parametrize("around", ["$A </s>", "<s> $A </s>", "<s> $A", "$A", "$A </s> </s>"])
def test_an_end_token_behind_a_plain_prompt_is_left_out(tmp_path: Path, around: str) -> None:
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "find": 2, "one": 3}, unk_token="<s>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=around, special_tokens=[("<s>", 0), ("</s>", 1)])
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "find one"}, {"prompt": "one find </s>"}])
    prompts = load_unlabelled(unlabelled(path), PreTrainedTokenizerFast(tokenizer_object=words), 8)
    begin = (0,) if around.startswith("<s>") else ()
    assert [prompt.token_ids for prompt in prompts] == [(*begin, 2, 3), (*begin, 3, 2, 1)], "the user's own stays"


def test_a_template_gets_the_same_date_on_every_day(tmp_path: Path) -> None:
    template = "\n  {% if true %}{{ strftime_now('%d %B %Y %H:%M %-d %% %b') }}{% endif %} {{ messages[0].content }}"
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "find one"}])
    (prompt,) = load_unlabelled(unlabelled(path, chat_template=True), make_tokenizer(template), 32)
    assert prompt.text == "\n01 January 2025 00:00 1 % Jan find one"
    without = template.replace("strftime_now('%d %B %Y %H:%M %-d %% %b')", "'x'")
    (prompt,) = load_unlabelled(unlabelled(path, chat_template=True), make_tokenizer(without), 32)
    assert prompt.text == "\nx find one", "what stands around it is as it was"


def test_templates_without_a_default_are_a_bad_row_where_they_are_used(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"rag": TEMPLATE}
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "find one"}])
    assert load_unlabelled(unlabelled(path), tokenizer, 8)[0].text == "find one"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the tokenizer's chat template refuses the messages"):
        load_unlabelled(unlabelled(path, chat_template=True), tokenizer, 8)


def test_answers_do_not_reach_unlabelled_prompts(tmp_path: Path) -> None:
    assert {field.name for field in fields(UnlabelledPrompt)} == {"id", "text", "token_ids"}
    with pytest.raises((AttributeError, TypeError)):
        UnlabelledPrompt("a", "one", (5,)).answer = "5"  # type: ignore[attr-defined]
    loaded = []
    for answer in ("5", "6", None, ["x"], {"prompt": "two"}):
        path = write_jsonl(tmp_path / "u.jsonl", [{"prompt": "find one", "answer": answer}] * 3)
        loaded.append(load_unlabelled(unlabelled(path), TOKENIZER, 8))
    assert all(prompts == loaded[0] for prompts in loaded)


def test_parquet_answers_are_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "u.parquet"
    pq.write_table(pa.table({"prompt": ["find one"], "answer": ["5"], "key": ["k"]}), path)
    asked: list[list[str]] = []

    class Watched(pq.ParquetFile):
        def iter_batches(self, *args: Any, columns: list[str], **kwargs: Any) -> Any:
            asked.append(columns)
            return super().iter_batches(*args, columns=columns, **kwargs)

    monkeypatch.setattr(pq, "ParquetFile", Watched)
    load_unlabelled(unlabelled(path, id_field="key"), TOKENIZER, 8)
    assert asked == [["prompt", "key"]]


def test_damaged_answer_column_does_not_matter_to_the_unlabelled_set(tmp_path: Path) -> None:
    """The bytes of the answers are destroyed in the file; only a loader that reads them can notice."""
    path = tmp_path / "u.parquet"
    answers = [f"secret-{number}" for number in range(200)]
    table = pa.table({"prompt": ["find one"] * 200, "answer": answers})
    pq.write_table(table, path, compression="gzip", use_dictionary=False, write_statistics=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    start, length = column.data_page_offset, column.total_compressed_size
    content[start : start + length] = b"\xff" * length
    path.write_bytes(content)
    assert len(load_unlabelled(unlabelled(path), TOKENIZER, 8)) == 200
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load_labelled(labelled(path), TOKENIZER, 8)


def test_a_question_is_known_by_its_text_alone(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " find\none "}]
    rows = [{"prompt": "find one", "answer": "1"}, {"prompt": "find  one\n"}, {"prompt": chat}, {"prompt": "find two"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    keys = question_keys(unlabelled(path, suffix=" Box it.", system="Be kind.", chat_template=True))
    assert list(keys) == ["a:0", "a:1", "a:2", "a:3"]
    assert keys["a:0"] == keys["a:1"] == keys["a:2"] != keys["a:3"]
    assert keys["a:0"] == "e0e053305b2850ef81586345403e1e2e", "of earlier versions: seen.jsonl stays readable"
    assert question_keys(unlabelled(path, limit=1)) == {"a:0": keys["a:0"]}
    with pytest.raises(DataError, match="a prompt is text or a list of messages"):
        question_keys(unlabelled(write_jsonl(tmp_path / "b.jsonl", [{"prompt": 3}])))


def test_rows_may_name_their_verifiers(tmp_path: Path) -> None:
    rows = [{"prompt": "find one", "answer": "1", "who": who} for who in ("choice", "text", None)]
    config = labelled(write_jsonl(tmp_path / "a.jsonl", rows), verifier_field="who")
    assert [prompt.verifier for prompt in load_labelled(config, TOKENIZER, 8)] == ["choice", "text", "math"]
    bad = write_jsonl(tmp_path / "b.jsonl", [rows[0] | {"who": who} for who in ("maths", None, ["math"])])
    with pytest.raises(DataError) as caught:
        load_labelled(labelled(bad, verifier=None, verifier_field="who"), TOKENIZER, 8)
    assert len(caught.value.problems) == 3
    assert "field 'who' is 'maths' (str); known are math, countdown, choice, text, grid" in caught.value.problems[0]
    with pytest.raises(DataError, match="field 'whom' is missing; did you mean 'who'"):
        load_labelled(labelled(bad, verifier_field="whom"), TOKENIZER, 8)
