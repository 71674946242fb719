"""The documents keep to what is there: links, code, commands and the tests they name."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from rlm_sandbox import backend_names
from rlm_sandbox.cli import app
from rlm_sandbox.diagnosis.jail_layers import LAYERS
from rlm_sandbox.registry import load_backend

from .conftest import require_usable

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
QUICKSTART = ROOT / "examples" / "quickstart.py"

#: Places where machines keep people's files. An example may use a person who does not exist.
_MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|Users|root|work|workspace)/[\w.-]+")
_INVENTED = ("/home/alice",)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_NAMED_TEST = re.compile(r"`(test_\w+)`")


@cache
def tracked() -> tuple[Path, ...]:
    """Files under version control."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"these are not the files of a clone: {done.stderr.strip()}")
    return tuple(ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


def documents() -> list[Path]:
    """Every Markdown file of the project. Found by folder, so that collecting needs no version control."""
    folders = [ROOT, *(path for name in ("docs", "changes", "benchmarks", "images") if (path := ROOT / name).is_dir())]
    return sorted(path for folder in folders for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md")))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """The text without code blocks."""
    return _FENCE.sub("", path.read_text("utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as common hosts make them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in _HEADING.findall(prose(path))}


@cache
def known_tests() -> frozenset[str]:
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.add(path.stem)
        found.update(re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text("utf-8"), re.MULTILINE))
    return frozenset(found)


@pytest.mark.parametrize("path", documents(), ids=shown)
def test_relative_links_resolve(path: Path) -> None:
    for target in _LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        assert not name.startswith("/"), f"{target} is no relative link"
        there = (path.parent / name).resolve() if name else path
        assert there.is_relative_to(ROOT), f"{target} leads out of the project"
        assert there.exists(), f"{target} leads nowhere"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("path", documents(), ids=shown)
def test_a_test_that_is_named_exists(path: Path) -> None:
    for name in _NAMED_TEST.findall(path.read_text("utf-8")):
        assert name in known_tests(), f"{name} is named and does not exist"


@pytest.mark.parametrize("path", documents(), ids=shown)
def test_python_blocks_compile(path: Path) -> None:
    for language, code in _FENCE.findall(path.read_text("utf-8")):
        if language == "python":
            compile(code, shown(path), "exec")


def test_the_readme_shows_the_quickstart_as_it_is() -> None:
    source = QUICKSTART.read_text("utf-8")
    code = source.split('"""\n\n', 1)[1]
    assert code in [block for language, block in _FENCE.findall(README.read_text("utf-8")) if language == "python"]


def test_the_quickstart_prints_what_its_comments_say() -> None:
    require_usable("jail", load_backend("jail").probe())
    done = subprocess.run([sys.executable, QUICKSTART], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "ok 1",
        "[(4000000, 4000006, 'needle')]",
        "'a model would read 46 characters'",
        "limit time_seconds restored",
        "[(4000000, 4000006, 'needle')]",
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pool_of_threads", ["isqrt(sum(range(20))) = '13'", "all 4 sessions of the pool were in use for 0.1 seconds"]),
        ("async_server", ['"outcome": "limit"', '"outcome": "crashed"', "a model would read 4 characters", '"value": "81"']),
    ],
)
def test_an_example_runs(name: str, says: list[str]) -> None:
    require_usable("jail", load_backend("jail").probe())
    script = ROOT / "examples" / f"{name}.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for part in says:
        assert part in done.stdout


def test_commands_of_the_readme_exist() -> None:
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    named = set(re.findall(r"^rlm-sandbox (\w+)", README.read_text("utf-8"), re.MULTILINE))
    assert named
    assert named <= known
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=[ `]|$)", README.read_text("utf-8"), re.MULTILINE)) <= targets


@pytest.mark.parametrize("name", backend_names())
def test_each_backend_has_its_limitations_page(name: str) -> None:
    page = ROOT / "docs" / "limitations" / f"{name}.md"
    assert page.is_file()
    assert f"`{name}`" in page.read_text("utf-8").partition("\n")[0]
    assert f"docs/limitations/{name}.md" in README.read_text("utf-8")
    assert f"| `{name}` |" in README.read_text("utf-8")
    assert f"`{name}`" in (ROOT / "SECURITY.md").read_text("utf-8")


def test_each_decision_is_listed_once() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text("utf-8")) == pages
    # Unique, not consecutive: work that goes on side by side takes numbers from ranges of its own.
    assert len({name[:4] for name in pages}) == len(pages)
    for name in pages:
        text = (folder / name).read_text("utf-8")
        for part in ("Problem", "Decision", "Why", "What it costs", "Residual risk"):
            assert f"**{part}.**" in text, f"{name} has no {part}"


def test_no_file_holds_a_path_of_a_machine() -> None:
    here = {str(ROOT), str(Path.home()), sys.prefix, sys.base_prefix} - {"/", "/usr", "/usr/local"}
    for path in tracked():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # no text
        for found in _MACHINE_PATH.findall(text):
            assert found.startswith(_INVENTED), f"{shown(path)} names {found}"
        for place in here:
            assert f"{place}/" not in text, f"{shown(path)} names {place}"


def test_fragments_are_of_a_known_kind() -> None:
    kinds = re.findall(r"`(\w+)`", (ROOT / "changes" / "README.md").read_text("utf-8").partition("Kinds:")[2])
    for path in (ROOT / "changes").glob("*.md"):
        if path.name != "README.md":
            assert re.fullmatch(rf"\d+(\.\w+)?\.({'|'.join(kinds)})\.md", path.name), f"{path.name}: choose from {kinds}"
            assert path.read_text("utf-8").strip()


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "doctor").glob("*.txt")), ids=lambda path: path.stem)
def test_the_doctors_recordings_are_of_today(path: Path) -> None:
    """Every backend and every layer that the command looks at: if one is missing, run scripts/record_doctor.py."""
    text = path.read_text("utf-8")
    parts = re.split(r"^(\w+)\n\n", text.partition("\nWhat to do\n")[0], flags=re.MULTILINE)
    found: dict[str, str] = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(found) == list(backend_names())
    said = re.findall(r"^ (?:PASS|CAUTION|FAIL|SKIPPED) +(\S+(?: \S+)*)", found["jail"], re.MULTILINE)
    assert said[: len(LAYERS)] == [layer.name for layer in LAYERS]
    assert re.search(r"\nexit status 0\n\Z", text)
