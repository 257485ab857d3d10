"""What must not leave does not, and comes back: patterns, what they leave alone, hooks, placeholders that nobody wrote."""

import json
from types import MappingProxyType

import pytest

from llmlab import LabError
from llmlab.endpoints import BUILT_IN, Redactor, Vault

FOUND = {
    "emails": ["anna.b@example.org", "o'neil+x@mail.example.co.uk"],
    "phones": ["+49 30 1234567", "(030) 555-1234", "555 123 4567", "+1-202-555-0143", "030/1234567"],
    "ips": ["192.168.1.10", "2001:db8::1", "fe80::1"],
    "cards": ["4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009"],
    "secrets": ["sk-abcdefghijklmnopqrstuvwx", "ghp_abcdefghijklmnopqrst0123456789", "AKIAIOSFODNN7EXAMPLE",
                "d41d8cd98f00b204e9800998ecf8427e", "aGVsbG8gd29ybGQgSGVsbG8gV29ybGQ0MTIzNDU2",
                "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
                "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----"],
    "paths": ["/home/anna/notes.txt", "/Users/bo/x", "C:\\Users\\bo\\x.txt", "~/secret.txt"],
}
LEFT = ["1234 5678 9012 3456", "12:30:45", "2026-11-23", "version 1.2.3", "1,000,000", "3.14159", "100000000", "a@b", "::",
        "999.1.1.1", "the password is", "/usr/share/doc", "an_identifier_of_forty_letters_in_lower_case", "0000000000000000",
        "2 + 2 = 4", "https://example.org/a/page"]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_what_is_found_leaves_as_a_placeholder_and_comes_back(kind, text):
    vault, said = Vault(), f"Before {text}, after."
    sent, = Redactor().messages([{"role": "user", "content": said}], vault)
    assert text not in sent["content"] and len(vault) == 1 and text not in repr(vault)
    assert sent["content"] == f"Before [{kind[:-1].upper()}_1], after." and vault.restore(sent["content"]) == said
    alone = Vault()
    assert Redactor(kind).text(said, alone) == sent["content"]


@pytest.mark.parametrize("text", LEFT)
def test_what_is_left_alone(text):
    vault = Vault()
    assert Redactor().text(f"Before {text} after", vault) == f"Before {text} after" and not len(vault)


def test_what_is_said_to_be_a_secret_is_one():
    vault = Vault()
    assert Redactor().text('password: hunter22, API_KEY="abc123xyz"', vault) == 'password: [SECRET_1], API_KEY="[SECRET_2]"'


def test_the_user_and_the_home_of_this_computer(monkeypatch):
    monkeypatch.setenv("USER", "annabell")
    monkeypatch.setenv("HOME", "/srv/people/annabell")
    vault = Vault()
    assert Redactor("paths").text("annabell, see /srv/people/annabell/x", vault) == "[PATH_1], see [PATH_2]"


def test_placeholders_are_one_a_thing_and_never_somebodys_own_words():
    vault = Vault()
    first, second = Redactor().messages([{"role": "user", "content": "[EMAIL_1] is a@b.example; a@b.example, c@b.example"},
                                         {"role": "assistant", "content": [{"type": "text", "text": "c@b.example"}],
                                          "tool_calls": [{"function": {"arguments": '{"to": "d@b.example"}'}}]}], vault)
    assert first["content"] == "[EMAIL_1] is [EMAIL_2]; [EMAIL_2], [EMAIL_3]"
    assert second["content"] == [{"type": "text", "text": "[EMAIL_3]"}]
    assert second["tool_calls"][0]["function"]["arguments"] == '{"to": "[EMAIL_4]"}'
    assert vault.restore("Ask [EMAIL_1], [EMAIL_2] or [EMAIL_30]") == "Ask [EMAIL_1], a@b.example or [EMAIL_30]"


@pytest.mark.parametrize("text", [
    "password: abc-sk-abcdefghijklmnopqrstuvwx", "/home/anna@x.example/private/divorce", "/home/bo/192.168.1.10/notes",
    "password=x/home/anna/keys"])
def test_of_two_that_overlap_nothing_is_left_over(text):
    vault = Vault()
    sent = Redactor().text(text, vault)
    assert vault.restore(sent) == text and len(vault) == 1
    assert sent.removeprefix("password: ").removeprefix("password=") in ("[SECRET_1]", "[EMAIL_1]", "[PATH_1]")


@pytest.mark.parametrize("text", ["jürgen@example.org", "info@müller.de", "иван@пример.рф", "a@b.xn--p1ai",
                                  "ann\u0435@x.example"])
def test_addresses_in_any_script(text):
    vault = Vault()
    assert Redactor().text(f"to {text}!", vault) == "to [EMAIL_1]!" and vault.restore("[EMAIL_1]") == text


def test_paths_in_the_arguments_of_a_tool_are_escaped():
    said = json.dumps({"path": "C:\\Users\\bo\\x.txt"})
    assert Redactor().text(said, Vault()) == '{"path": "[PATH_1]"}'


def test_what_a_client_would_write_is_looked_through():
    """OpenAI's own objects, names of fields that are none, a schema with a property called type."""
    from openai.types.chat import ChatCompletionMessageFunctionToolCall as Call

    call = Call.model_validate({"id": "c", "type": "function", "function": {"name": "f", "arguments": '"a@b.example"'}})
    asked = [{"role": "assistant", "content": MappingProxyType({"type": "text", "text": "c@b.example"}), "tool_calls": [call]}]
    sent, = Redactor().messages(asked, Vault())
    assert "b.example" not in str(sent) and sent["tool_calls"][0]["function"]["name"] == "f" and sent["role"] == "assistant"
    schema = {"properties": {"type": {"type": "string", "description": "a@b.example"}}, "a@b.example": 1, "type": "x@b.example"}
    vault = Vault()
    assert Redactor().anything(schema, vault) == {
        "properties": {"type": {"type": "string", "description": "[EMAIL_1]"}}, "[EMAIL_1]": 1, "type": "[EMAIL_2]"}
    for value in (object(), iter(["a@b.example"]), {1: "a@b.example"}, b"a@b.example"):
        with pytest.raises(LabError, match="cannot be sent"):
            Redactor().messages([{"role": "user", "content": value}], Vault())


def test_hooks_run_first_and_close_when_they_fail():
    vault = Vault()
    assert Redactor((lambda text: text.replace("Anna", "X"), "emails")).text("Anna a@b.example", vault) == "X [EMAIL_1]"
    assert vault.changed == 1
    for hook in (lambda text: None, lambda text: 1 / 0):
        with pytest.raises(LabError, match="nothing leaves"):
            Redactor(hook).text("x", Vault())
    with pytest.raises(LabError, match="emails"):
        Redactor("e-mails")
    assert Redactor(()).text("a@b.example", Vault()) == "a@b.example" and set(BUILT_IN) == set(FOUND)


def test_long_texts_take_no_time_out_of_proportion():
    """Each would hang a pattern that goes back and forth."""
    for text in ("1 " * 20_000, "a@" * 20_000, "a.b@" + "a." * 20_000, "::" * 20_000, "(0" * 20_000, "a" * 100_000,
                 "password " * 10_000, "-----BEGIN PRIVATE KEY-----" * 500, "1-" * 20_000, "abcd:" * 10_000):
        Redactor().text(text, Vault())
