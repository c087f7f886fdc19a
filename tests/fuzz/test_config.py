"""Random and hostile configuration: either it loads, or one line says why not."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from watchd.cli.config import dump_lines
from watchd.config import Config, Loaded, load
from watchd.config import schema as s
from watchd.config.units import Address, Duration, FileMode, Percentage, Size
from watchd.errors import ConfigError

SHIPPED = (Path(__file__).parents[2] / "config" / "watchd.yaml").read_bytes()


def load_bytes(data: bytes) -> Loaded:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "watchd.yaml")
        path.write_bytes(data)
        return load(path)


def complaint_about(data: bytes) -> str:
    """The one error that may come of it, or nothing."""
    try:
        load_bytes(data)
    except ConfigError as error:
        return str(error)
    return "watchd.yaml: good"


def assert_loads_or_says_why_not(data: bytes) -> None:
    complaint = complaint_about(data)
    assert complaint.isprintable()
    assert "watchd.yaml:" in complaint


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_a_configuration_error(data: bytes) -> None:
    assert_loads_or_says_why_not(data)


SIGNS = [*":-[]{},&*!|>'\"%@#?~\\ \t\n\r", "\n  ", ": ", "- ", "\x85", "\u2028", "\ufeff"]
WORDS = [
    *Config.__struct_fields__,
    "path",
    "match",
    "actions",
    "/a",
    "1",
    "2s",
    "off",
    "<<",
    "\\x0",
    "\\U0011",
    "%YAML 1.",
]
yaml_like = st.lists(st.sampled_from(SIGNS + WORDS), max_size=30).map("".join)


@settings(max_examples=400)
@given(yaml_like)
def test_text_that_looks_like_yaml_never_raises_anything_but_a_configuration_error(text: str) -> None:
    assert_loads_or_says_why_not(text.encode())


@settings(max_examples=200)
@given(st.integers(0, len(SHIPPED)), st.integers(0, 40), st.one_of(st.binary(max_size=8), yaml_like.map(str.encode)))
def test_damage_to_the_shipped_file_never_raises_anything_but_a_configuration_error(
    at: int, cut: int, put: bytes
) -> None:
    assert_loads_or_says_why_not(SHIPPED[:at] + put + SHIPPED[at + cut :])


@pytest.mark.parametrize("text", ["[" * 500_000, "a: &a [*a]", "{" * 100_000, "- " * 200_000, "%YAML 1." + "9" * 6000])
def test_small_files_cannot_exhaust_stack_or_memory(text: str) -> None:
    with pytest.raises(ConfigError):
        load_bytes(text.encode())


text = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=20)
paths = st.lists(text.filter(lambda name: "/" not in name and name not in (".", "..")), min_size=1, max_size=3).map(
    lambda names: Path("/" + "/".join(names))
)
ladders = st.sets(st.sampled_from(s.LADDER)).map(lambda some: tuple(one for one in s.LADDER if one in some))
budgets = st.integers(1, 1000).map(lambda tenths: Percentage.parse(f"{tenths // 10}.{tenths % 10}%"))
durations = st.integers(10**9, 60 * 10**9).map(Duration)
sizes = st.integers(4096, 1 << 32).map(Size)
programs = text.filter(lambda name: "/" not in name[1:])
layers = st.lists(
    st.builds(s.Layer, path=paths, name=st.one_of(st.just(msgspec.UNSET), text), backend=st.just("poll")),
    max_size=3,
    unique_by=(lambda layer: layer.path, lambda layer: layer.name),
)
rules = st.builds(
    s.MountRule,
    match=text,
    actions=st.one_of(st.just(msgspec.UNSET), ladders),
    budget=st.one_of(st.just(msgspec.UNSET), budgets),
    evict_limit=st.one_of(st.just(msgspec.UNSET), sizes),
    after=st.one_of(st.just(()), st.tuples(programs, text)),
    after_timeout=durations,
)
configs = st.builds(
    Config,
    state_directory=paths,
    layers=layers.map(tuple),
    mounts=st.lists(rules, max_size=3).map(tuple),
    discovery=st.builds(s.Discovery, include=st.lists(text, max_size=3).map(tuple)),
    sources=st.builds(s.Sources, content=st.booleans(), poll_interval=durations),
    coherence=st.builds(
        s.Coherence, actions=ladders, budget=budgets, evict_limit=sizes, drop_caches_interval=durations
    ),
    journal=st.builds(s.Journal, max_delay=durations, segment_size=sizes),
    metrics=st.builds(s.Metrics, listen=st.sampled_from([None, Address("::1", 1), Address("host", 65535)])),
    control=st.builds(s.Control, mode=st.integers(0, 0o777).map(FileMode), group=text),
)


@given(configs)
def test_what_is_dumped_loads_as_the_same_configuration(config: Config) -> None:
    dumped = "".join(f"{line}\n" for line in dump_lines(Loaded(config=config, origins={}, files=())))
    assert load_bytes(dumped.encode("utf-8", "surrogateescape")).config == config
