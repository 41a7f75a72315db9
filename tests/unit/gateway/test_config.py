"""Which providers are configured, with whose key, and how the file is refused."""

from pathlib import Path

import pytest

from torpor.config import FAKE_KEY, Secret, guest_environment, read_upstreams, torpor_home
from torpor.core.clock import SystemClock
from torpor.core.errors import InvalidInput, UpstreamFailed
from torpor.gateway.keys import KeyRing


def write(home: Path, text: str, mode: int = 0o600) -> Path:
    (home / "config.toml").write_text(text)
    (home / "config.toml").chmod(mode)
    return home


async def key_of(home: Path, environment: dict[str, str]) -> str | None:
    [upstream] = read_upstreams(home, environment)
    key = await KeyRing(SystemClock()).key(upstream)
    return None if key is None else key.reveal()


def test_the_variables_of_the_providers_clients_are_enough(tmp_path: Path) -> None:
    environment = {"OPENAI_API_KEY": "a", "ANTHROPIC_API_KEY": "b", "ANTHROPIC_BASE_URL": "http://proxy/"}
    openai, anthropic = read_upstreams(tmp_path, environment)
    assert (openai.base_url, openai.bearer) == ("https://api.openai.com/v1", True)
    assert (anthropic.base_url, anthropic.bearer) == ("http://proxy", False)


def test_streams_of_openais_family_are_asked_for_token_counts_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    assert [upstream.stream_usage for upstream in read_upstreams(tmp_path, {"OPENAI_API_KEY": "a"})] == [True]
    text = """
[upstreams.openai]
[upstreams.old]
family = "openai"
models = ["old-*"]
stream_usage = false
[upstreams.anthropic]
[upstreams.gemini]
stream_usage = true
"""
    told = {upstream.name: upstream.stream_usage for upstream in read_upstreams(write(tmp_path, text), {})}
    assert told == {"openai": True, "old": False, "anthropic": False, "gemini": True}


def test_without_any_setting_there_is_no_provider(tmp_path: Path) -> None:
    assert read_upstreams(tmp_path, {}) == ()


async def test_an_address_alone_is_called_without_a_key(tmp_path: Path) -> None:
    assert await key_of(tmp_path, {"OPENAI_BASE_URL": "http://127.0.0.1:11434/v1"}) is None


async def test_anthropics_auth_token_is_a_bearer(tmp_path: Path) -> None:
    [upstream] = read_upstreams(tmp_path, {"ANTHROPIC_AUTH_TOKEN": "t"})
    assert upstream.bearer
    assert await key_of(tmp_path, {"ANTHROPIC_AUTH_TOKEN": "t"}) == "t"


async def test_the_file_replaces_the_environment_whole(tmp_path: Path) -> None:
    """A key of the environment must not go to an address of the file."""
    home = write(tmp_path, '[upstreams.openai]\nbase_url = "http://elsewhere/v1"\n')
    assert await key_of(home, {"OPENAI_API_KEY": "secret"}) is None


@pytest.mark.parametrize(
    ("line", "key"),
    [('key = "in the file"', "in the file"), ('key_env = "MINE"', "mine"), ('key_command = ["echo", "said"]', "said")],
)
async def test_a_key_comes_from_one_of_three_places(tmp_path: Path, line: str, key: str) -> None:
    assert await key_of(write(tmp_path, f"[upstreams.openai]\n{line}\n"), {"MINE": " mine\n"}) == key


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('key_env = "ABSENT"', "ABSENT is not set"),
        ('key_command = ["false"]', "status 1"),
        ('key_command = ["true"]', "status 0 and no key"),
        ('key_command = ["/no/such/program"]', "program_missing"),
    ],
)
async def test_a_key_that_is_missing_is_missed_when_it_is_needed(tmp_path: Path, line: str, reason: str) -> None:
    home = write(tmp_path, f"[upstreams.openai]\n{line}\n")
    with pytest.raises(UpstreamFailed, match=reason) as failed:
        await key_of(home, {})
    assert failed.value.code == "upstream_key_missing"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[upstreams", "config"),
        ("[upstreams.openai]\nbase_url = 3\n", "str"),
        ("[upstreams.openai]\nbase_ur = 'x'\n", "base_ur"),
        ("[upstreams.openai]\nbase_url = 'ftp://x'\n", "http"),
        ("[upstreams.openai]\nbase_url = 'https://me:pw@x'\n", "user name"),
        ("[upstreams.openai]\nconnect_seconds = 0\n", "connect_seconds"),
        ("[upstreams.mine]\nbase_url = 'http://x'\n", "family"),
        ("[upstreams.a]\nfamily = 'openai'\n[upstreams.b]\nfamily = 'openai'\n", "two upstreams"),
        ("[upstreams.openai]\nkey = 'a'\nkey_env = 'B'\n", "more than one"),
        (
            "[upstreams.a]\nfamily='openai'\nmodels=['x*']\n[upstreams.b]\nfamily='openai'\nmodels=['x*']\n",
            r"'x\*' in models",
        ),
        (
            "[upstreams.gemini]\npath_prefix='/p'\n[upstreams.openai]\npath_prefix='/p'\n",
            "'gemini' and 'openai', claim '/p' in path_prefix",
        ),
        ("[upstreams.openai]\npath_prefix = '/v1'\n", "path that is free"),
        ("[upstreams.openai]\npath_prefix = 'ollama/'\n", "path that is free"),
        ("[upstreams.openai]\npaths = ['/v1/embeddings']\n", "not a method and a path"),
        ("[upstreams.openai]\npaths = ['GET /[ab]']\n", "not a method and a path"),
        ("[upstreams.openai]\nretries = -1\n", "retries"),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason) as refused:
        read_upstreams(write(tmp_path, text), {})
    assert refused.value.code == "config_invalid"


def test_gemini_has_variables_of_its_own(tmp_path: Path) -> None:
    environment = {"GOOGLE_API_KEY": "a", "GEMINI_API_KEY": "b", "GOOGLE_GEMINI_BASE_URL": "http://proxy/"}
    [gemini] = read_upstreams(tmp_path, environment)
    assert (gemini.family, gemini.base_url, gemini.bearer) == ("gemini", "http://proxy", False)
    assert gemini.key.environment == "GOOGLE_API_KEY"


def test_an_upstream_for_some_models_leaves_its_familys_default_to_the_environment(tmp_path: Path) -> None:
    home = write(tmp_path, '[upstreams.local]\nfamily = "openai"\nbase_url = "http://l/v1"\nmodels = ["llama*"]\n')
    local, openai = read_upstreams(home, {"OPENAI_API_KEY": "k"})
    assert (local.is_default, openai.is_default) == (False, True)
    assert (openai.name, openai.base_url) == ("openai", "https://api.openai.com/v1")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    home = write(tmp_path, '[upstreams.openai]\nkey = "k"\n', mode=0o644)
    with pytest.raises(InvalidInput, match="other users") as refused:
        read_upstreams(home, {})
    assert "600" in refused.value.hint


def test_the_home_follows_the_variables() -> None:
    assert torpor_home({"TORPOR_HOME": "/t", "HOME": "/h"}) == Path("/t")
    assert torpor_home({"XDG_DATA_HOME": "/d", "HOME": "/h"}) == Path("/d/torpor")
    assert torpor_home({"HOME": "/h"}) == Path("/h/.local/share/torpor")
    with pytest.raises(InvalidInput, match="absolute"):
        torpor_home({"TORPOR_HOME": "here"})


def test_a_secret_shows_itself_to_no_one_who_does_not_ask() -> None:
    secret = Secret("sk-hidden")
    shown = f"{secret} {secret!r} {secret!s:>20} {[secret]} { ({'k': secret}) }" + "%s" % secret  # noqa: UP031
    assert "hidden" not in shown
    assert secret.reveal() == "sk-hidden"


def test_the_agents_environment_holds_no_real_key() -> None:
    inside = guest_environment()
    assert inside["OPENAI_BASE_URL"] == "http://127.0.0.1:4100/v1"
    assert inside["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:4100"
    assert inside["GOOGLE_GEMINI_BASE_URL"] == "http://127.0.0.1:4100"
    assert inside["GEMINI_API_KEY"] == FAKE_KEY
    assert inside["HTTPS_PROXY"] == "http://127.0.0.1:4101"
    assert inside["NO_PROXY"] == "127.0.0.1,localhost"
