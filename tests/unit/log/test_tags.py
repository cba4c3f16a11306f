from pathlib import Path

import pytest

from rlfeed.errors import ConfigError, TagError
from rlfeed.log import tags

REGENERATE = "docs/metrics.md is not what tags.markdown() gives: write that into it"


@pytest.fixture(autouse=True)
def no_registered_tags(monkeypatch):
    monkeypatch.setattr(tags, "_registered", {})


@pytest.mark.parametrize(
    "name",
    [
        "rollout/ep_rew_mean", "rollout/ep_len_mean", "eval/mean_reward", "time/fps", "train/loss",
        "rollout/exploration_rate", "charts/episodic_return", "charts/episodic_length", "charts/SPS", "replay/size",
        "replay/ratio", "feed/wait_ms",
    ],
)  # fmt: skip
def test_lookup_tag_that_users_rely_on_is_declared(name):
    assert tags.lookup(name).name == name


def test_lookup_unknown_tag_suggests_the_nearest():
    with pytest.raises(TagError, match=r"'train/los': is not declared.*Did you mean 'train/loss'.*register"):
        tags.lookup("train/los")


def test_register_own_tag_makes_it_known():
    tag = tags.register("my_agent/entropy", "nats", "Entropy of the policy.")

    assert tags.lookup("my_agent/entropy") is tag
    assert (tag.unit, tag.meaning) == ("nats", "Entropy of the policy.")


def test_register_same_again_gives_the_same():
    tag = tags.register("my_agent/entropy", "nats", "Entropy of the policy.")

    assert tags.register("my_agent/entropy", "nats", "Entropy of the policy.") is tag


@pytest.mark.parametrize("name", ["my_agent/entropy", "train/loss"])
def test_register_other_meaning_is_an_error(name):
    tags.register("my_agent/entropy", "nats", "Entropy of the policy.")
    with pytest.raises(ConfigError, match="expected one meaning"):
        tags.register(name, "bits", "Entropy of the policy.")

    assert tags.lookup("my_agent/entropy").unit == "nats"


@pytest.mark.parametrize("name", ["entropy", "My agent/entropy", "/entropy", "a/", ""])
def test_register_malformed_name_is_an_error(name):
    with pytest.raises(ConfigError, match="expected group/quantity"):
        tags.register(name, "nats", "Entropy of the policy.")


def test_table_is_sorted_and_complete():
    assert list(tags.TAGS) == sorted(tags.TAGS)
    assert all(tag.unit and tag.meaning and tag.bad and tag.remedy for tag in tags.TAGS.values())


def test_metrics_page_is_generated_from_the_table():
    page = Path(__file__).parents[3] / "docs" / "metrics.md"

    assert page.read_text() == tags.markdown(), REGENERATE
