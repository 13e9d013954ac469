"""Files of agents."""

from pathlib import Path

import pytest

from photon.endpoints.agent import read_agents
from photon.errors import PhotonError

GOOD = """
defaults: {endpoint: "http://127.0.0.1:8000/v1", model: tiny, temperature: 1}
agents:
  cold: {temperature: 0.0, system: Be short.}
  warm: {copies: 2}
  other: {endpoint: "https://models.example/v1", model: big, key_variable: BIG_KEY}
  past: {endpoint: "recorded:trace.jsonl"}
"""


def test_settings_are_joined_with_defaults_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "agents.yaml").write_text(GOOD)
    agents = read_agents(tmp_path / "agents.yaml")
    assert [one.name for one in agents] == ["cold", "warm-1", "warm-2", "other", "past"]
    assert [one.temperature for one in agents] == [0.0, 1, 1, 1, 1]
    assert agents[3].key_variable == "BIG_KEY"
    assert agents[4].endpoint == f"recorded:{tmp_path}/trace.jsonl"
    assert agents[0].conversation([{"role": "user", "content": "?"}])[0] == {
        "role": "system",
        "content": "Be short.",
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected a mapping `agents`"),
        ("agents: [a]", "expected a mapping `agents`"),
        ("agents: {}", "expected a mapping `agents`"),
        ("agents: {a: {model: m}}", "agents.a.endpoint: missing; give it here or in defaults"),
        ("agents: {a: {endpoint: 'http://h/v1'}}", "agents.a.model: missing"),
        ("agent: {}\nagents: {a: {}}", "agent: unknown key; did you mean 'agents'?"),
        ("agents: {a: {temprature: 1}}", "agents.a.temprature: unknown key; did you mean 'temperature'?"),
        ("defaults: {modell: x}\nagents: {a: {}}", "defaults.modell: unknown key; did you mean 'model'?"),
        ("agents: {a: 5}", "agents.a: expected settings"),
        ("agents: {a: {endpoint: ftp://h, model: m}}", "expected http://HOST:PORT/v1"),
        ("agents: {a: {endpoint: 'http://me:pw@h/v1', model: m}}", "name the variable that has the key"),
        ("agents: {a: {endpoint: 'http://h:x/v1', model: m}}", "no address"),
        ("agents: {a: {endpoint: 'http://h/v1', model: m, temperature: hot}}", "temperature='hot'"),
        ("agents: {a: {endpoint: 'http://h/v1', model: m, temperature: 3}}", "temperature=3"),
        ("agents: {a: {endpoint: 'http://h/v1', model: m, extra: {stream: true}}}", "extra.stream"),
        (
            "agents: {a: {endpoint: 'http://h/v1', model: m, extra: {day: 2024-01-01}}}",
            "extra: JSON, in which",
        ),
        ("agents: {a: {endpoint: 'http://h/v1', model: m, extra: {top_k: .nan}}}", "extra: JSON, in which"),
        (
            "agents: {a: {endpoint: 'http://h/v1', model: m, key_variable: sk-1234}}",
            "not the name of an environment",
        ),
        ("agents: {'a b': {endpoint: 'http://h/v1', model: m}}", "name='a b'"),
        ("agents: {a: {endpoint: 'http://h/v1', model: m, copies: 999}}", "copies=999"),
        (
            "defaults: {endpoint: 'http://h/v1', model: m}\nagents: {a: {copies: 2}, a-1: {}}",
            "a-1 is the name of two agents",
        ),
        (
            "defaults: {endpoint: 'http://h/v1', model: m, copies: 200}\nagents: {a: {}, b: {}}",
            "more than 256 agents",
        ),
        ("agents: {a: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_one_line_that_says_what_and_where(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "agents.yaml"
    file.write_text(text)
    with pytest.raises(PhotonError) as raised:
        read_agents(file)
    assert why in str(raised.value)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match=r"agents .*none.yaml: cannot be read"):
        read_agents(tmp_path / "none.yaml")
