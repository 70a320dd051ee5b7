"""A configuration is written to run folders and model cards, and its errors to logs: neither may hold a password."""

from __future__ import annotations

import pytest

from gdmd.cli.app import main
from gdmd.config.load import ConfigError, load_config
from gdmd.config.rewards import CompositeReward, RemoteReward

SECRET = "s3cret-of-somebody"
WITH_SECRETS = [
    f"https://user:{SECRET}@scores.example:8766",
    f"https://{SECRET}@scores.example",
    f"https://user:{SECRET * 9}@scores.example/{'a' * 90}",  # longer than an error shows
    f"https://:{SECRET}@scores.example",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_an_address_with_a_password_is_refused_and_the_password_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"url: got .*token_variable") as refused:
        load_config(RemoteReward, f"{{url: '{url}', reward: clip}}")
    assert SECRET not in str(refused.value) and "://...@" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        load_config(RemoteReward, "{url: 'http://localhost', reward: clip}", [f"url={url}", "retires=3"])
    assert len(refused.value.errors) == 2 and SECRET not in str(refused.value)


@pytest.mark.parametrize("rest", ["?key=x", "/#x"])
def test_an_address_with_a_query_is_refused(rest: str) -> None:
    with pytest.raises(ConfigError, match="address only"):
        load_config(RemoteReward, f"{{url: 'http://localhost{rest}', reward: clip}}")


def test_a_password_inside_a_value_of_the_wrong_kind_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(CompositeReward, f"{{kind: composite, parts: {{reward: {{url: '{WITH_SECRETS[0]}'}}}}}}")
    assert "parts" in str(refused.value) and SECRET not in str(refused.value)


def test_the_command_line_does_not_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "sd3_gdmd", f"rewards=[{{kind: remote, reward: clip, url: '{WITH_SECRETS[0]}'}}]"])
    said = capsys.readouterr()
    assert "password" in said.err and SECRET not in said.out + said.err
