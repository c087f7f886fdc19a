from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from watchd.config import Config, flatten, load
from watchd.config.schema import Coherence, MountRule
from watchd.config.units import Address, Duration, FileMode, Percentage, Size
from watchd.errors import ConfigError, NotPermittedError

SHIPPED = Path(__file__).parents[2] / "config" / "watchd.yaml"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the main file, and more below conf.d; gives the main file."""

    def write(text: str | bytes, **conf_d: str) -> Path:
        main = tmp_path / "watchd.yaml"
        main.write_bytes(text if isinstance(text, bytes) else text.encode())
        (tmp_path / "conf.d").mkdir(exist_ok=True)
        for name, content in conf_d.items():
            (tmp_path / "conf.d" / f"{name}.yaml").write_text(content)
        return main

    return write


def error_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path.parent) + "/", "")


def test_shipped_file_states_the_built_in_defaults_and_leaves_no_key_out() -> None:
    loaded = load(SHIPPED)
    assert loaded.config == Config()
    assert [key for key, origin in loaded.origins.items() if origin == "default"] == []


def test_examples_of_the_shipped_file_are_valid(write: Write) -> None:
    text = SHIPPED.read_text().replace("\nlayers: []", "").replace("\nmounts: []", "")
    config = load(write(text.replace("#   ", ""))).config
    assert [(str(layer.path), layer.name, layer.backend) for layer in config.layers] == [("/srv/base", "base", "auto")]
    assert config.mounts[0].after == ("systemctl", "reload", "app")


def test_values_arrive_typed(write: Write) -> None:
    config = load(
        write(
            "coherence: {budget: 2.5%}\njournal: {max_delay: 250ms, segment_size: 1MiB}\n"
            "control: {mode: 0600}\nmetrics: {listen: '[::1]:80'}\nlayers: [{path: //srv//base/}]\n"
        )
    ).config
    assert config.coherence.budget == 0.025
    assert config.journal.max_delay == 250_000_000
    assert config.journal.segment_size == 1 << 20
    assert config.control.mode == stat.S_IRUSR | stat.S_IWUSR
    assert config.metrics.listen == ("::1", 80)
    assert config.layers[0].path == Path("/srv/base")


@pytest.mark.parametrize("text", ["metrics: off", "metrics: {listen: off}", 'metrics: {listen: "off"}'])
def test_metrics_can_be_turned_off(write: Write, text: str) -> None:
    loaded = load(write(text))
    assert loaded.config.metrics.listen is None
    assert loaded.origins["metrics.listen"].endswith("watchd.yaml:1")


def test_later_files_win_mappings_merge_and_lists_replace(write: Write) -> None:
    main = write(
        "sources: {backend: inotify, queue: default}\ndiscovery:\n  include: [/a, /b]\nmetrics: off\n",
        **{"20-b": "sources: {backend: poll}\n", "10-a": "sources: {backend: fanotify}\ndiscovery: {include: [/c]}\n"},
    )
    loaded = load(main)
    assert loaded.config.sources.backend == "poll"
    assert loaded.config.sources.queue == "default"
    assert loaded.config.discovery.include == ("/c",)
    assert [file.name for file in loaded.files] == ["watchd.yaml", "10-a.yaml", "20-b.yaml"]
    origins = {key: origin.replace(f"{main.parent}/", "") for key, origin in loaded.origins.items()}
    assert origins["sources.backend"] == "conf.d/20-b.yaml:1"
    assert origins["discovery.include"] == "conf.d/10-a.yaml:2"
    assert origins["sources.queue"] == "watchd.yaml:1"
    assert origins["metrics.listen"] == "watchd.yaml:4"
    assert origins["log.level"] == "default"


def test_editor_leftovers_in_conf_d_are_not_read(write: Write, tmp_path: Path) -> None:
    main = write("")
    for name in (".#a.yaml", "a.yaml~", "a.yaml.dpkg-old", "README"):
        (tmp_path / "conf.d" / name).write_text("nonsense")
    assert load(main).files == (main,)


def test_conf_d_is_read_though_the_default_file_is_absent(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    main = write("", a="log: {level: debug}")
    main.unlink()
    monkeypatch.setattr("watchd.config.DEFAULT_FILE", main)
    assert load().config.log.level == "debug"


def test_no_file_at_all_means_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watchd.config.DEFAULT_FILE", tmp_path / "etc" / "watchd.yaml")
    loaded = load()
    assert (loaded.config, loaded.files) == (Config(), ())


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    message = error_of(tmp_path / "absent.yaml")
    assert message == "absent.yaml: cannot be read: No such file or directory; name a file that exists"


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    assert error_of(tmp_path / "d") == "d: cannot be read: Is a directory"


def test_a_file_that_may_not_be_read_is_told_apart_from_a_bad_one(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = write("")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(NotPermittedError, match="run as root"):
        load(main)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "sources:\n#  backend: poll\n"])
def test_an_empty_file_or_section_means_the_defaults(write: Write, text: str) -> None:
    assert load(write(text)).config == Config()


def test_an_empty_section_does_not_undo_an_earlier_file(write: Write) -> None:
    assert load(write("sources: {backend: poll}", z="sources:\n")).config.sources.backend == "poll"


def test_an_error_is_found_though_a_later_file_hides_it(write: Write) -> None:
    main = write("\nsources: {backend: fanotfy}\n", z="sources: {backend: poll}")
    assert error_of(main).startswith("watchd.yaml:2: sources.backend: 'fanotfy'")


def test_an_error_in_conf_d_names_that_file(write: Write) -> None:
    assert error_of(write("", z="log:\n  level: loud\n")).startswith("conf.d/z.yaml:2: log.level: 'loud' is none of")


BAD = [
    ("\n\nsources:\n  backend: fanotfy", "4: sources.backend: 'fanotfy' is none of auto, fanotify, inotify, poll"),
    ("sources:\n  bakend: auto", "2: sources.bakend: unknown key, did you mean backend?"),
    ("source: {}", "1: source: unknown key, did you mean sources?"),
    ("log: {zzz: 1}", "1: log.zzz: unknown key, known here: format, level"),
    ("<<: {log: off}", "1: <<: unknown key, known here: state_directory, "),
    ("log: text", "1: log: expects keys below it: format, level"),
    ("log: [text]", "1: log: expects keys below it: format, level"),
    ("log: {level: [info]}", "1: log.level: expects one value, not a list"),
    ("log: {level: {a: b}}", "1: log.level: expects one value, not a mapping"),
    ("log: {level: }", "1: log.level: has no value; give one or leave the key out"),
    ("sources: {content: maybe}", "1: sources.content: 'maybe' is neither true nor false"),
    ("sources: {poll_interval: 2}", "1: sources.poll_interval: '2' is no duration such as 250ms, 2s or 30d"),
    ("sources: {poll_interval: 0s}", "1: sources.poll_interval: '0s' is not between 10ms and 1d"),
    ("journal: {segment_size: 64MB}", "1: journal.segment_size: '64MB' is no size such as 512KiB, 64MiB or 1GiB"),
    ("journal: {segment_size: 1B}", "1: journal.segment_size: '1B' is not between 4KiB and 4GiB"),
    ("journal: {retain_age: 9999999999999999999d}", "1: journal.retain_age: '9999999999999999999d' is no duration"),
    ("coherence: {budget: 0.1}", "1: coherence.budget: '0.1' is no percentage such as 10%"),
    ("coherence: {budget: 101%}", "1: coherence.budget: '101%' is not between 0.1% and 100%"),
    (
        "coherence: {actions: [evict, invalidate]}",
        "1: coherence.actions: actions are tried once each and in this order:",
    ),
    (
        "coherence: {actions: [evict, evict]}",
        "1: coherence.actions: actions are tried once each and in this order: write [evict]",
    ),
    (
        "coherence:\n  actions:\n  - invalidate\n  - evit",
        "4: coherence.actions[1]: 'evit' is none of invalidate, evict,",
    ),
    ("coherence: {actions: evict}", "1: coherence.actions: expects a list, such as ['evict']"),
    ("coherence: {actions: {a: b}}", "1: coherence.actions: expects a list, not a mapping"),
    ("control: {mode: 0999}", "1: control.mode: '0999' is no octal file mode such as 0660"),
    ("control: {group: ''}", "1: control.group: '' is empty"),
    ("metrics: {listen: 9877}", "1: metrics.listen: '9877' is no address such as 127.0.0.1:9877, and not off"),
    ("metrics: {listen: 'a:0'}", "1: metrics.listen: 'a:0' is no address such as 127.0.0.1:9877, and not off"),
    ("layers: [{path: srv}]", "1: layers[0].path: 'srv' is no absolute path"),
    ("layers:\n- name: a\n", "2: layers[0].path: is missing"),
    ("layers:\n- /srv\n", "2: layers[0]: expects keys below it: path, name, backend"),
    ("layers:\n- {path: /a}\n- {path: /a/}", "3: layers[1].path: '/a' is given twice"),
    ("layers:\n- {path: /a, name: n}\n- {path: /b, name: n}", "3: layers[1].name: 'n' is given twice"),
    ("mounts: [{mode: observe}]", "1: mounts[0].match: is missing"),
    ("mounts: [{match: /a, after: reload}]", "1: mounts[0].after: expects a list, such as ['reload']"),
    (
        "mounts: [{match: /a, after: systemctl reload app}]",
        "1: mounts[0].after: expects a list, such as ['systemctl', 'reload', 'app']",
    ),
    ("mounts: [{match: /a, after: ['']}]", "1: mounts[0].after[0]: '' is empty"),
    (
        "mounts: [{match: /a, after: [bin/x]}]",
        "1: mounts[0].after[0]: 'bin/x' is neither the name of a program nor an absolute path",
    ),
    ("mounts: [{match: /a, after_timeout: 0s}]", "1: mounts[0].after_timeout: '0s' is not between 1ms and 1d"),
    (f"runtime_directory: /{'r' * 96}", "1: runtime_directory: is too long to hold a socket, at most 95 bytes"),
    ('state_directory: "/a\\0"', "1: '/a\\x00' holds a character that no name can hold"),
    ('state_directory: "/\\ud800"', "1: '/\\ud800' holds a character that no name can hold"),
    ("log:\n  level: info\n  level: debug\n", "3: 'level' is given twice, first on line 2"),
    ("? [a]\n: b", "1: a key must be one word"),
    ("- a", "1: expected `key: value` lines"),
    ("text", "1: expected `key: value` lines"),
    ("a: &x [1]\nb: *x\n", "2: aliases (*) are not accepted, write the value out"),
    ("layers: " + "[" * 5000, "1: is nested more than 16 deep"),
    ("log: !!python/object:os.system {}", "1: the tag tag:yaml.org,2002:python/object:os.system is not accepted"),
    ("log: [\n", "2: while parsing a flow node, expected the node content, but found '<stream end>'"),
    ("log: {}\n--- \nlog: {}\n", "2: expected a single document in the stream, but found another document"),
    ('a: "\\UFFFFFFFF"', "1: is no YAML: "),
    ("log:\n\tlevel: info", "2: while scanning for the next token, found character '\\t' that cannot start any token"),
    ("a: b\nc: \x01", "2: holds a character that YAML forbids"),
    (b"a: b\nc: \xff", "2: is not UTF-8"),
    ("#" * (1 << 20) + "\n", " is larger than 1 MiB, this is no configuration of watchd"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_what_is_wrong_is_one_line_with_file_line_key_and_remedy(write: Write, text: str | bytes, message: str) -> None:
    assert error_of(write(text)).startswith(f"watchd.yaml:{message}")


def test_a_long_bad_value_does_not_flood_the_line(write: Write) -> None:
    assert len(error_of(write(f"log: {{level: {'x' * 100_000}}}"))) < 300


@pytest.mark.parametrize("text", ["0ns", "1ns", "250ms", "2s", "90s", "30d", "5m", "12h"])
def test_durations_are_written_as_they_were_read(text: str) -> None:
    assert str(Duration.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"), [("1000ms", "1s"), ("0d", "0ns"), ("60m", "1h"), ("1500ms", "1500ms"), ("24h", "1d")]
)
def test_durations_take_their_largest_exact_unit(text: str, canonical: str) -> None:
    assert str(Duration.parse(text)) == canonical


def test_other_values_are_written_as_they_were_read() -> None:
    assert str(Size.parse("64MiB")) == "64MiB"
    assert str(Percentage.parse("12.5%")) == "12.5%"
    assert str(Percentage.parse("100%")) == "100%"
    assert str(FileMode.parse("0660")) == "0660"
    assert str(Address.parse("[::1]:80")) == "[::1]:80"
    assert str(Address.parse("0.0.0.0:80")) == "0.0.0.0:80"


def test_the_first_rule_that_matches_any_mount_point_overrides_only_what_it_says() -> None:
    config = Config(
        coherence=Coherence(orphans="prune"),
        mounts=(
            MountRule(match="/srv/*", actions=("invalidate", "evict")),
            MountRule(match="/srv/app", mode="observe"),
        ),
    )
    assert config.coherence_for([b"/elsewhere", b"/srv/\xff"]) == Coherence(
        orphans="prune", actions=("invalidate", "evict")
    )
    assert config.coherence_for([b"/srv/app"]).mode == "repair"
    assert config.coherence_for([b"/other"]) == config.coherence
    assert config.rule_for([b"/other"]) is None


def test_keys_of_list_entries_are_flattened_only_where_they_are_given(write: Write) -> None:
    loaded = load(write("mounts:\n- match: /a\n\n  mode: observe\n"))
    keys = {key: os.path.basename(origin) for key, origin in loaded.origins.items() if key.startswith("mounts")}
    assert keys == {
        "mounts": "watchd.yaml:1",
        "mounts[0].match": "watchd.yaml:2",
        "mounts[0].mode": "watchd.yaml:4",
        "mounts[0].after": "default",
        "mounts[0].after_timeout": "default",
    }
    assert dict(flatten(loaded.config))["mounts[0].mode"] == "observe"
